"""Makes speech.wav (16 kHz, 16 bit, mono) and speech.json (where in it somebody speaks, in seconds).

Two sentences spoken by espeak-ng (Debian package of that name) between stretches of room noise, from one seed:
    python make_speech.py
"""

import json
import subprocess
import tempfile
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RATE = 16000
SENTENCES = ("compile the model once", "then run it")
PAUSE = 0.85  # seconds before, between and after the sentences
NOISE = 0.0015  # amplitude of the room, full scale 1
LOUDNESS = 0.5  # peak of the speech


def spoken(sentence: str) -> NDArray[np.float64]:
    """One sentence from espeak-ng at 16 kHz, without the silence at its ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sentence.wav"
        subprocess.run(["espeak-ng", "-v", "en-gb", "-s", "150", "-w", str(path), sentence], check=True)
        with wave.open(str(path)) as file:
            rate = file.getframerate()
            signal = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float64)
    signal = resampled(signal / np.abs(signal).max(), rate)
    loud = np.nonzero(np.abs(signal) > 0.02)[0]
    return LOUDNESS * signal[loud[0] : loud[-1] + 1]


def resampled(signal: NDArray[np.float64], rate: int) -> NDArray[np.float64]:
    """The signal at RATE samples a second, by cutting its spectrum (rate > RATE)."""
    length = round(len(signal) * RATE / rate)
    return np.fft.irfft(np.fft.rfft(signal)[: length // 2 + 1], length) * (length / len(signal))


def main() -> None:
    random = np.random.default_rng(16000)
    pause = np.zeros(round(PAUSE * RATE))
    parts, speech, position = [pause], [], len(pause)
    for sentence in map(spoken, SENTENCES):
        speech.append([round(position / RATE, 3), round((position + len(sentence)) / RATE, 3)])
        parts += [sentence, pause]
        position += len(sentence) + len(pause)
    signal = np.concatenate(parts)
    signal += NOISE * random.normal(0, 1, len(signal))
    here = Path(__file__).parent
    with wave.open(str(here / "speech.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.round(np.clip(signal, -1, 1) * 32767).astype("<i2").tobytes())
    (here / "speech.json").write_text(json.dumps({"sentences": list(SENTENCES), "speech": speech}) + "\n")


if __name__ == "__main__":
    main()
