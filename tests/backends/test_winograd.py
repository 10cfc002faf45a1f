"""3x3 convolutions by minimal filtering: every geometry, epilogue and target within the method's error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import run, spills, summing_loops
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxc.backends.cpu.kernels import winograd
from onnxc.ir.dims import symbol
from onnxc.ir.errors import OnnxcError
from onnxc.ir.functions import maximum
from onnxc.ir.target import Target
from onnxc.passes.regions import Lowered, Region
from onnxc.tools.bench_kernels import make_region

TARGETS = [name for name in ("host", "x86-64-v3", "x86-64") if name == "host" or Target.host().architecture == "x86_64"]
N, H, W = symbol("N"), symbol("H"), symbol("W")
CHANNELS_LAST = {"layout": "channels_last", "group": 1}


def machine(name: str, threads: int = 1) -> Target:
    return replace(Target.parse(name), winograd=True, threads=threads)


def always(region: Region, target: Target, monkeypatch: pytest.MonkeyPatch) -> Lowered:
    """The schedule also where the definition would be about as fast."""
    monkeypatch.setattr(winograd, "WORTH", float("inf"))
    lowered = winograd.schedule(region, target)
    assert lowered is not None
    return lowered


def convolution(x: np.ndarray, w: np.ndarray, pads: Sequence[int]) -> np.ndarray:
    """The convolution of a channels-last image in f64."""
    top, left, bottom, right = pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.einsum("nhwckl,fckl->nhwf", windows, w.astype(np.float64))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("known", [True, False])
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_geometry(target: str, known: bool, data: st.DataObject) -> None:
    """Any image, padding and number of tasks, with bias, residual and ReLU; sizes known, or told by the run."""
    chosen = machine(target, data.draw(st.integers(1, 3), "tasks"))
    lanes = chosen.lanes(32)
    channels, filters = (lanes * data.draw(st.integers(1, 3), what) for what in ("channels", "filters"))
    pads = [data.draw(st.integers(0, 2), "pad") for _ in range(4)]
    spatial = [data.draw(st.integers(3, 14), "extent") for _ in range(2)]
    random = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    x = random.standard_normal((data.draw(st.integers(1, 3), "images"), *spatial, channels)).astype(np.float32)
    w = (random.standard_normal((filters, channels, 3, 3)) / 8).astype(np.float32)
    bias = random.standard_normal(filters).astype(np.float32)
    sums = convolution(x, w, pads) + bias
    residual = random.standard_normal(sums.shape).astype(np.float32)
    symbolic: Any = x.shape if known else (N, H, W, channels)
    sizes = {} if known else dict(zip("NHW", x.shape[:3], strict=True))
    attributes = CHANNELS_LAST | {"pads": pads}
    output = make_region("Conv", [(symbolic, "f4"), w, bias], attributes).outputs[0][1].shape
    region = make_region(
        "Conv", [(symbolic, "f4"), w, bias], attributes, [(output, "f4")], lambda y, other: maximum(y + other, 0.0)
    )
    with pytest.MonkeyPatch.context() as patch:
        lowered = always(region, chosen, patch)
    small = x.size * sums.size < 50_000
    for interpret in (False, True) if small else (False,):
        (result,) = run(region, lowered, chosen, [x, w, bias, residual], sizes, interpret)
        expected = np.maximum(sums + residual, 0)
        np.testing.assert_allclose(result, expected, rtol=0, atol=3e-5 * np.abs(sums).max())


def test_exact_on_numbers_that_need_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights whose transforms are exact, sums are exact too: no coefficient is a little wrong."""
    chosen = machine("host")
    lanes = chosen.lanes(32)
    random = np.random.default_rng(0)
    x = random.integers(-2, 3, (1, 9, 10, lanes)).astype(np.float32)
    w = (576 * random.integers(-1, 2, (lanes, lanes, 3, 3))).astype(np.float32)
    region = make_region("Conv", [(x.shape, "f4"), w], CHANNELS_LAST | {"pads": [1, 1, 1, 1]})
    (result,) = run(region, always(region, chosen, monkeypatch), chosen, [x, w])
    np.testing.assert_array_equal(result, convolution(x, w, [1, 1, 1, 1]))


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "x86-64"])
def test_inner_loop_has_no_spills(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = machine(target)
    w = np.ones((64, 64, 3, 3), np.float32)
    region = make_region("Conv", [((1, 56, 56, 64), "f4"), w], CHANNELS_LAST | {"pads": [1, 1, 1, 1]})
    loops = summing_loops(always(region, chosen, monkeypatch), chosen)
    assert loops
    assert not any(spills(loop) for loop in loops)


@pytest.mark.parametrize(
    ("size", "channels", "filters", "chosen"),
    [(56, 64, 64, True), (28, 128, 128, True), (14, 256, 256, True), (3, 16, 16, False), (8, 512, 2048, False)],
)
def test_chosen_where_it_pays(size: int, channels: int, filters: int, chosen: bool) -> None:
    target = replace(Target.parse("x86-64-v4"), winograd=True)
    w = np.ones((filters, channels, 3, 3), np.float32)
    region = make_region("Conv", [((1, size, size, channels), "f4"), w], CHANNELS_LAST | {"pads": [1, 1, 1, 1]})
    assert (winograd.schedule(region, target) is not None) == chosen


@pytest.mark.parametrize("given", [{"strides": [2, 2]}, {"dilations": [2, 2]}, {"group": 2}])
def test_left_to_other_schedules(given: dict[str, Any]) -> None:
    w = np.ones((64, 64 // given.get("group", 1), 3, 3), np.float32)
    region = make_region("Conv", [((1, 56, 56, 64), "f4"), w], CHANNELS_LAST | {"pads": [1, 1, 1, 1]} | given)
    assert winograd.schedule(region, machine("host")) is None


def model(path: Path) -> onnx.ModelProto:
    """Three convolutions in a chain, each with ReLU."""
    random = np.random.default_rng(1)
    nodes, weights = [], []
    for number in range(3):
        weights.append(
            numpy_helper.from_array((random.standard_normal((64, 64, 3, 3)) / 24).astype("f4"), f"w{number}")
        )
        nodes.append(helper.make_node("Conv", [f"x{number}", f"w{number}"], [f"c{number}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"x{number + 1}"]))
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64, "h", 30]) for name in ("x0", "x3")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(found, path)
    return found


def test_only_when_it_is_asked_for(tmp_path: Path) -> None:
    proto = model(tmp_path / "m.onnx")
    x = np.random.default_rng(2).standard_normal((1, 64, 27, 30), np.float32)
    (expected,) = ReferenceEvaluator(proto).run(None, {"x0": x})
    plain = onnxc.compile(tmp_path / "m.onnx")
    fast = onnxc.compile(tmp_path / "m.onnx", winograd="auto", dims={"h": 27})
    assert "winograd" not in plain.dump("kernels")
    assert fast.dump("kernels").count("kernel f32_winograd") >= 1
    scale = np.abs(expected).max()
    np.testing.assert_allclose(plain(x), expected, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(fast(x), expected, rtol=0, atol=2e-5 * scale)
    with pytest.raises(OnnxcError, match="off or auto"):
        onnxc.compile(tmp_path / "m.onnx", winograd="sometimes")
