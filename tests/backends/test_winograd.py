"""Convolutions by minimal filtering: every geometry, epilogue and target within the method's error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from convolution_reference import convolution
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import run, spills, summing_loops
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxc.backends.cpu.kernels import filtering, winograd, winograd_plan
from onnxc.backends.cpu.kernels.winograd_plan import Plan
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


def lowered_by(region: Region, target: Target, pick: Callable[[list[Plan]], Plan]) -> Lowered:
    """The schedule by the plan that is picked, also where the definition would be about as fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd_plan, "WORTH", float("inf"))
        patch.setattr(winograd_plan, "_best", lambda problem, target: pick(list(winograd_plan.plans(problem, target))))
        lowered = winograd.schedule(region, target)
    assert lowered is not None
    return lowered


def fastest(plans: list[Plan]) -> Plan:
    return min(plans, key=lambda plan: plan.cycles)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("taps", [2, 3, 5, 7])
@pytest.mark.parametrize("outputs", [1, 2, 3, 4, 6])
def test_algorithms_are_exact(outputs: int, taps: int, stride: int) -> None:
    """In rational numbers an algorithm gives what the definition gives; its products are as few as they can be."""
    if not filtering.exists(outputs, taps, stride):
        return
    found = filtering.filtering(outputs, taps, stride)
    data = [Fraction(3 * i * i - 7 * i + 2, i + 1) for i in range(found.inputs)]
    weights = [Fraction(5 - 2 * k, k * k + 3) for k in range(taps)]
    products = [
        sum(map(mul, a, data), Fraction(0)) * sum(map(mul, b, weights), Fraction(0))
        for a, b in zip(found.data, found.weights, strict=True)
    ]
    expected = [sum(data[i * stride + k] * weights[k] for k in range(taps)) for i in range(outputs)]
    assert [sum(map(mul, row, products), Fraction(0)) for row in found.results] == expected
    counts = [len(range(phase, taps, stride)) for phase in range(min(stride, taps))]
    assert found.products == sum(outputs + count - 1 for count in counts)


KERNELS = [(3, 3), (3, 3), (1, 3), (3, 1), (5, 5), (2, 2), (1, 7), (5, 3)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("known", [True, False])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_geometry(target: str, known: bool, data: st.DataObject) -> None:
    """Any image, kernel, stride, padding, group, algorithm and number of tasks, with bias, residual and ReLU; sizes
    known, or told by the run."""
    chosen = machine(target, data.draw(st.integers(1, 3), "tasks"))
    lanes = chosen.lanes(32)
    group = data.draw(st.sampled_from([1, 1, 2]), "group")
    channels, filters = (data.draw(st.integers(2, 2 * lanes + 3), what) for what in ("channels", "filters"))
    kernel = data.draw(st.sampled_from(KERNELS), "kernel")
    strides = [data.draw(st.sampled_from([1, 1, 2]), "stride") for _ in range(2)]
    pads = [data.draw(st.integers(0, 2), "pad") for _ in range(4)]
    spatial = [data.draw(st.integers(taps, 14), "extent") for taps in kernel]
    random = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    images = data.draw(st.integers(1, 3), "images")
    x = random.standard_normal((images, *spatial, group * channels)).astype(np.float32)
    w = (random.standard_normal((group * filters, channels, *kernel)) / 8).astype(np.float32)
    bias = random.standard_normal(group * filters).astype(np.float32)
    sums = convolution(x, w, pads, strides, group) + bias
    residual = random.standard_normal(sums.shape).astype(np.float32)
    symbolic: Any = x.shape if known else (N, H, W, group * channels)
    sizes = {} if known else dict(zip("NHW", x.shape[:3], strict=True))
    attributes = CHANNELS_LAST | {"pads": pads, "strides": strides, "group": group}
    output = make_region("Conv", [(symbolic, "f4"), w, bias], attributes).outputs[0][1].shape
    region = make_region(
        "Conv", [(symbolic, "f4"), w, bias], attributes, [(output, "f4")], lambda y, other: maximum(y + other, 0.0)
    )
    lowered = lowered_by(region, chosen, lambda plans: plans[data.draw(st.integers(0, len(plans) - 1), "plan")])
    small = x.size * sums.size < 10_000
    for interpret in (False, True) if small else (False,):
        (result,) = run(region, lowered, chosen, [x, w, bias, residual], sizes, interpret)
        expected = np.maximum(sums + residual, 0)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(sums).max())


@pytest.mark.parametrize("stride", [1, 2])
def test_exact_on_numbers_that_need_no_rounding(stride: int) -> None:
    """Of weights whose transforms are exact, sums are exact too."""
    chosen = machine("host")
    lanes = chosen.lanes(32)
    random = np.random.default_rng(0)
    x = random.integers(-2, 3, (1, 9, 10, lanes)).astype(np.float32)
    w = (4 * random.integers(-1, 2, (lanes, lanes, 3, 3))).astype(np.float32)
    region = make_region("Conv", [(x.shape, "f4"), w], CHANNELS_LAST | {"pads": [1] * 4, "strides": [stride] * 2})
    lowered = lowered_by(
        region, chosen, lambda plans: next(p for p in plans if p.axes[0].outputs == 2 == p.axes[1].outputs)
    )
    (result,) = run(region, lowered, chosen, [x, w])
    np.testing.assert_array_equal(result, convolution(x, w, [1] * 4, [stride] * 2))


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "x86-64"])
def test_inner_loop_has_no_spills(target: str) -> None:
    chosen = machine(target)
    w = np.ones((64, 64, 3, 3), np.float32)
    region = make_region("Conv", [((1, 56, 56, 64), "f4"), w], CHANNELS_LAST | {"pads": [1, 1, 1, 1]})
    loops = summing_loops(lowered_by(region, chosen, fastest), chosen)
    assert loops
    assert not any(spills(loop) for loop in loops)


@pytest.mark.parametrize(
    ("size", "channels", "filters", "stride", "chosen"),
    [
        (56, 64, 64, 1, True),
        (14, 256, 256, 1, True),
        (7, 512, 512, 1, True),
        (120, 96, 24, 1, True),
        (56, 128, 128, 2, True),
        (3, 16, 16, 1, False),
        (8, 512, 2048, 2, False),
        (112, 3, 64, 2, False),
    ],
)
def test_chosen_where_it_pays(size: int, channels: int, filters: int, stride: int, chosen: bool) -> None:
    target = replace(Target.parse("znver4"), winograd=True)
    w = np.ones((filters, channels, 3, 3), np.float32)
    attributes = CHANNELS_LAST | {"pads": [1] * 4, "strides": [stride] * 2}
    region = make_region("Conv", [((1, size, size, channels), "f4"), w], attributes)
    assert (winograd.schedule(region, target) is not None) == chosen


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_share_blocks_evenly(threads: int) -> None:
    """A layer of few stretches is cut so that no thread waits long for another one."""
    problem = winograd_plan.Problem((14, 14), (3, 3), (1, 1), 1, 1, 256, 256)
    plan = fastest(list(winograd_plan.plans(problem, replace(Target.parse("znver4"), threads=threads))))
    down, along = (-(-14 // axis.outputs) for axis in plan.axes)
    blocks = -(-down * along // plan.block)
    assert blocks % threads == 0


def test_weights_that_do_not_fit_a_cache_are_read_once() -> None:
    """Stretches of several images share a block, so that 512 channels are not streamed for each image."""
    target = Target.parse("znver4")
    for images in (1, 8):
        problem = winograd_plan.Problem((7, 7), (3, 3), (1, 1), images, 1, 512, 512)
        plan = fastest(list(winograd_plan.plans(problem, target)))
        stretches = images * np.prod([-(-7 // axis.outputs) for axis in plan.axes])
        assert plan.block == stretches


def test_multiply_adds_of_targets() -> None:
    """Zen 4 does 512-bit vectors in halves, servers of Intel and Zen 5 two at a time; without FMA one sum a cycle."""
    names = ("znver4", "znver5", "sapphirerapids", "haswell", "x86-64", "neoverse-v1", "aarch64")
    assert [Target.parse(name).multiply_adds for name in names] == [1, 2, 2, 2, 1, 4, 2]


@pytest.mark.parametrize("given", [{"dilations": [2, 2]}, {"group": 64}])
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


def test_unless_it_is_turned_off(tmp_path: Path) -> None:
    proto = model(tmp_path / "m.onnx")
    x = np.random.default_rng(2).standard_normal((1, 64, 27, 30), np.float32)
    (expected,) = ReferenceEvaluator(proto).run(None, {"x0": x})
    plain = onnxc.compile(tmp_path / "m.onnx", winograd="off")
    fast = onnxc.compile(tmp_path / "m.onnx", dims={"h": 27})
    assert "winograd" not in plain.dump("kernels")
    assert fast.dump("kernels").count("kernel f32_winograd") >= 1
    scale = np.abs(expected).max()
    np.testing.assert_allclose(plain(x), expected, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(fast(x), expected, rtol=0, atol=1e-5 * scale)
    with pytest.raises(OnnxcError, match="off or auto"):
        onnxc.compile(tmp_path / "m.onnx", winograd="sometimes")
