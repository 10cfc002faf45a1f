"""Transforms of short frames are convolutions."""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from onnx import helper, numpy_helper
from pass_checks import parsed, transformed
from single_node import model_of

RANDOM = np.random.default_rng(0)


def model(length: int, step: int, onesided: int, window: np.ndarray | None, flat: bool) -> onnxc.Executable:
    initializers = [numpy_helper.from_array(np.array(v), n) for n, v in (("step", step), ("length", length))]
    if window is not None:
        initializers.append(numpy_helper.from_array(window, "window"))
    shape = ["batch", "samples"] if flat else ["batch", "samples", 1]
    operands = ["x", "step", "window" if window is not None else "", "length"]
    graph = helper.make_graph(
        [helper.make_node("STFT", operands, ["y"], onesided=onesided)],
        "frames",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        initializers,
    )
    return onnxc.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), threads=1)


@pytest.mark.parametrize(
    ("length", "step", "onesided", "windowed", "flat"),
    [(20, 5, 1, True, True), (16, 4, 0, True, False), (7, 9, 1, False, False), (32, 1, 1, True, True)],
)
def test_numbers(length: int, step: int, onesided: int, windowed: bool, flat: bool) -> None:
    window = np.hanning(length).astype(np.float32) if windowed else None
    x = RANDOM.standard_normal((2, 203)).astype(np.float32)
    (found,) = model(length, step, onesided, window, flat).run({"x": x if flat else x[..., None]}).values()
    cut = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), length, 1)[:, ::step]
    cut = cut * (1 if window is None else window)
    wanted = np.fft.rfft(cut) if onesided else np.fft.fft(cut)
    np.testing.assert_allclose(found, np.stack((wanted.real, wanted.imag), -1), atol=3e-6 * length**0.5)


def test_a_constant_signal_has_a_phase() -> None:
    """As vocoders take it, by a division: 0/0 in every frame of silence, and the whole sound of Kokoro was NaN."""
    window = np.hanning(21)[:20].astype(np.float32)
    (found,) = model(20, 5, 1, window, True).run({"x": np.full((1, 90), -0.04061246, np.float32)}).values()
    assert found.any(-1).all()
    np.testing.assert_allclose(found[0, 0, 2:], 0, atol=1e-6)


def test_a_length_that_only_the_run_tells() -> None:
    """It must be the window's, which is known, and is the size of an axis by its own name."""
    window, x = np.hanning(7).astype(np.float32), RANDOM.standard_normal((3, 20, 1)).astype(np.float32)
    inputs = {"x": x, "length": np.array(7)}
    node = helper.make_node("STFT", ["x", "step", "window", "length"], ["y"], onesided=1)
    found = model_of([node], inputs, {"step": np.array(4), "window": window}, ["y"])
    (result,) = onnxc.compile(found).run(inputs).values()
    cut = np.lib.stride_tricks.sliding_window_view(x[..., 0], 7, 1)[:, ::4] * window
    wanted = np.fft.rfft(cut)
    np.testing.assert_allclose(result, np.stack((wanted.real, wanted.imag), -1), atol=1e-5)


GRAPH = """
graph @g(%x: f32[1, samples], %given: f32[LENGTH]) -> (%y: f32[1, floordiv(samples - LENGTH, 5) + 1, BINS, 2]) {
  %step = constant @"step" : i64[]
  %window = constant @"window" : f32[LENGTH]
  %y = STFT(%x, %step, WINDOW) {onesided = 1} : f32[1, floordiv(samples - LENGTH, 5) + 1, BINS, 2]
}
"""


@pytest.mark.parametrize(
    ("length", "window", "op"), [(20, "%window", "Conv"), (64, "%window", "STFT"), (20, "%given", "STFT")]
)
def test_only_short_frames_of_a_known_window(length: int, window: str, op: str) -> None:
    text = GRAPH.replace("LENGTH", str(length)).replace("BINS", str(length // 2 + 1)).replace("WINDOW", window)
    graph = parsed(text, {"step": np.array(5), "window": np.ones(length, np.float32)})
    assert op in [node.op for node in transformed("short-frames", graph).nodes]
