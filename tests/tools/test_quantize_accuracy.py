"""What quantization costs in right answers: networks for images, text and sound, on ONNX Runtime and compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnxc.tools import demo
from onnxc.tools.train_digits import INK, split_digits

from .sounds import sounds

Array = NDArray[Any]
DATA = Path(__file__).parent / "data"
Task = tuple[Path, str, Array, Array, Array]
"""The model, its input, samples to calibrate on, samples to name and their names."""


def digits() -> Task:
    images, _, held_out, labels = split_digits()
    path = demo.FILES / "digits.onnx"
    return path, "image", images[:100, None].astype(np.float32), held_out[:, None].astype(np.float32), labels


def depthwise() -> Task:
    *_, calibration, images, labels = digits()
    scale = np.float32(INK)
    return DATA / "depthwise.onnx", "image", calibration / scale, images / scale, labels


def text() -> Task:
    fragments = np.load(DATA / "text.npz")
    tokens = fragments["tokens"].astype(np.int64)
    return DATA / "text.onnx", "tokens", tokens[::10], tokens, fragments["kinds"]


def audio() -> Task:
    random = np.random.default_rng(5)
    calibration, _ = sounds(64, random)
    return DATA / "audio.onnx", "wave", calibration, *sounds(1000, random)


def right_on_onnxruntime(model: onnx.ModelProto | Path, name: str, samples: Array, labels: Array) -> float:
    """Percent of right answers, of the operators as they are: of 8-bit weights alone its optimiser makes products that
    round activations too, which changes two answers in a thousand."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    scores = np.asarray(session.run(None, {name: samples})[0])
    return 100 * float((scores.argmax(1) == labels).mean())


@pytest.mark.parametrize(
    ("task", "settings", "most"),
    [
        (digits, {}, 0.5),
        (digits, {"method": "minmax", "activations": "i8"}, 0.5),
        (depthwise, {}, 1.0),
        (text, {}, 0.5),
        (text, {"dynamic": True}, 0.5),
        (text, {"weights_only": "int8"}, 0.5),
        (audio, {}, 0.5),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_hardly_an_answer_changes(task: Callable[[], Task], settings: dict[str, Any], most: float) -> None:
    path, name, calibration, samples, labels = task()
    model = onnxc.quantize(path, {name: calibration}, **settings)
    before = right_on_onnxruntime(path, name, samples, labels)
    theirs = right_on_onnxruntime(model, name, samples, labels)
    scores = np.concatenate([onnxc.compile(model).run({name: samples})[out.name] for out in model.graph.output])
    ours = 100 * float((scores.argmax(1) == labels).mean())
    assert before > 80
    assert before - ours <= most and before - theirs <= most
    assert abs(ours - theirs) <= 0.1
