"""Marking speech in a recording with Silero VAD: the loop over chunks that carries the network's state.

Follows the package `silero-vad`. A model is any callable {name: array} -> {name: array}.
"""

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Model = Callable[[Arrays], Arrays]

CHUNK = {16000: 512, 8000: 256}  # samples a step, by sampling rate
CONTEXT = {16000: 64, 8000: 32}  # samples of the step before that the network sees again
SPEECH_THRESHOLD = 0.5


def recording(path: Path) -> tuple[NDArray[np.float32], int]:
    """Samples in -1..1 and the sampling rate of a 16-bit mono WAV file."""
    with wave.open(str(path)) as file:
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise ValueError(f"{path.name}: want 16-bit mono")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return (samples / 32768).astype(np.float32), file.getframerate()


def frames(signal: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """[steps, context + chunk]: each chunk with the end of the one before; the last is filled up with zeros."""
    chunk, context = CHUNK[rate], CONTEXT[rate]
    steps = -(-len(signal) // chunk)
    padded = np.zeros(context + steps * chunk, np.float32)
    padded[context : context + len(signal)] = signal
    return np.stack([padded[k * chunk : (k + 1) * chunk + context] for k in range(steps)])


def speech_probabilities(model: Model, signal: NDArray[np.float32], rate: int, with_rate: bool = True) -> list[float]:
    """Probability of speech in each chunk. `with_rate`: whether the network has the input `sr`."""
    state = np.zeros((2, 1, 128), np.float32)
    probabilities = []
    for frame in frames(signal, rate):
        inputs: Arrays = {"input": frame[None], "state": state}
        if with_rate:
            inputs["sr"] = np.array(rate, np.int64)
        outputs = model(inputs)
        state = outputs["stateN"]
        probabilities.append(float(outputs["output"][0, 0]))
    return probabilities


def sequence_probabilities(model: Model, signal: NDArray[np.float32], rate: int) -> list[float]:
    """The same by the variant that takes all chunks in one call."""
    zero = np.zeros((1, 1, 128), np.float32)
    outputs = model({"input": frames(signal, rate), "h": zero, "c": zero})
    return [float(p) for p in outputs["speech_probs"]]


def speech_intervals(probabilities: list[float], rate: int, gap: float = 0.3) -> list[tuple[float, float]]:
    """Stretches of speech, start and end in seconds; pauses shorter than `gap` seconds do not split one."""
    step = CHUNK[rate] / rate
    intervals: list[tuple[float, float]] = []
    for k, probability in enumerate(probabilities):
        if probability > SPEECH_THRESHOLD:
            start, end = k * step, (k + 1) * step
            if intervals and start - intervals[-1][1] < gap:
                start = intervals.pop()[0]
            intervals.append((start, end))
    return intervals
