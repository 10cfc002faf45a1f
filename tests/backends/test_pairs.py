"""Products and convolutions of bf16 by pairs: every shape and target, exact where sums are whole numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnxc
import pytest
from convolution_reference import convolution
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import run
from native_kernel import HOST, RUNNABLE, kernel, run_native
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnxc.backends.cpu.build import scheduled
from onnxc.backends.cpu.kernels import (
    gemm,
    pair_conv,
    pair_depthwise,
    pair_gemm,
    strassen,
    widened_gemm,
    winograd,
    winograd_plan,
)
from onnxc.backends.cpu.llvm import render_kernel
from onnxc.backends.cpu.objects import assembly
from onnxc.ir import loops as k
from onnxc.ir import scalars as s
from onnxc.ir.dims import symbol
from onnxc.ir.dtypes import BF16, F32, U32
from onnxc.ir.functions import maximum
from onnxc.ir.scalars import Buffer, load
from onnxc.ir.target import Target
from onnxc.passes.regions import Region
from onnxc.tools.bench_kernels import make_region
from small_models import model_of_text

BF = ml_dtypes.bfloat16
RANDOM = np.random.default_rng(0)
TARGETS = [name for name in ("host", "x86-64-v4", "x86-64-v3") if name == "host" or HOST.architecture == "x86_64"]
M, S, B = symbol("M"), symbol("S"), symbol("B")


def whole(*shape: int) -> np.ndarray:
    """Whole numbers, so that sums are exact in any order."""
    return RANDOM.integers(-4, 5, shape).astype(BF)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape, np.float32).astype(BF)


def check(
    region: Region, inputs: Sequence[np.ndarray], sizes: Mapping[str, int], expected: np.ndarray, target: str
) -> None:
    chosen = Target.parse(target)
    lowered = pair_gemm.schedule(region, chosen)
    assert lowered is not None and "bf16_gemm" in lowered.kernel_calls[-1].kernel.name
    (result,) = run(region, lowered, chosen, inputs, sizes)
    np.testing.assert_array_equal(result, expected)


def f32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)


# The instruction, and what stands in for it.


def test_dot_products_have_the_same_bits_on_every_target() -> None:
    """Of normal numbers: the second product is added first, each sum rounded once, as by VDPBF16PS."""
    lanes = 16
    y, c = Buffer("y", F32, lanes), Buffer("c", F32, lanes)
    a, b = Buffer("a", U32, lanes), Buffer("b", U32, lanes)
    dot = s.Call(F32, lanes, "dot2_bf16_bf16", (load(c, 0, lanes), load(a, 0, lanes), load(b, 0, lanes)))
    made = kernel([k.Store(y, 0, dot)], y, c, a, b)
    for scale in (1.0, 1e3, 1e-3):
        left, right, total = normal(lanes, 2), normal(lanes, 2), f32(normal(lanes)) * np.float32(scale)
        exact = total.astype(np.float64)
        for part in (1, 0):  # products of 16 bits are exact, and sums in f64 are but rarely rounded twice
            exact = f32(exact + left[:, part].astype(np.float64) * right[:, part].astype(np.float64)).astype(np.float64)
        data = {"a": left.view(np.uint32)[:, 0], "b": right.view(np.uint32)[:, 0], "c": total}
        for target in [target for target in RUNNABLE if target.fma]:
            found = {**data, "y": np.zeros(lanes, np.float32)}
            run_native(made, found, target=target)
            np.testing.assert_array_equal(found["y"], exact.astype(np.float32), err_msg=str(target))


@pytest.mark.parametrize("subnormals", [True, False])
def test_rounding_to_bf16(subnormals: bool) -> None:
    """To even, NaN kept; numbers below the least normal one as they are, or where allowed as zeros."""
    bits = RANDOM.integers(0, 1 << 32, 4096, np.uint64).astype(np.uint32)
    bits[:4] = 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800001  # ties, beyond the greatest, NaN
    x, y = Buffer("x", F32, 4096), Buffer("y", BF16, 4096)
    at = symbol("v", 0, 4095)
    made = kernel([k.For("v", 4096, (k.Store(y, at, s.cast(load(x, at, 16), BF16)),), step=16)], y, x)
    found = {"x": bits.view(np.float32), "y": np.zeros(4096, BF)}
    run_native(made, found, target=replace(HOST, subnormals=subnormals))
    with np.errstate(invalid="ignore"):
        expected = found["x"].astype(BF)
    small = np.abs(found["x"]) < np.finfo(np.float32).tiny
    same = found["y"].view(np.uint16) == expected.view(np.uint16)
    assert np.isnan(found["y"][np.isnan(expected)].astype(np.float32)).all()
    assert same[~small & ~np.isnan(expected)].all()
    assert (same | (found["y"] == 0))[small].all() and (not subnormals or same[small].all())


def test_the_loop_is_dot_products_of_memory() -> None:
    target = Target.parse("znver4")
    region = make_region("MatMul", [((64, 256), BF), normal(256, 192)])
    lowered = pair_gemm.schedule(region, target)
    assert lowered is not None
    (call,) = lowered.kernel_calls
    text = assembly(render_kernel(scheduled(call.kernel, target), target, threaded=False), target)
    assert "vcvtneps2bf16" not in text  # subnormals are kept unless the target says so
    blocks = [block for block in re.split(r"\n\.L\w+:", text) if block.count("vdpbf16ps") >= 16]
    assert blocks and not any(re.search(r"zmm.*\(%rsp\)|\(%rsp\).*zmm", block) for block in blocks)
    flushing = replace(target, subnormals=False)
    assert "vcvtneps2bf16" in assembly(render_kernel(scheduled(call.kernel, flushing), flushing, False), flushing)


# Matrix products.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("known", [True, False])
@settings(max_examples=8, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(2, 150), depth=st.integers(2, 70))
def test_constant_right_operand(target: str, known: bool, m: int, n: int, depth: int) -> None:
    a, w, bias, residual = whole(m, depth), whole(depth, n), f32(whole(n)), f32(whole(m, n))
    rows: Any = m if known else M
    region = make_region(
        "MatMul",
        [((rows, depth), BF), w],
        {"result": F32},
        [bias, ((rows, n), "f4")],
        lambda y, b, r: maximum(y + b + r, 0.0),
    )
    expected = np.maximum(f32(a) @ f32(w) + bias + residual, 0)
    check(region, [a, w, bias, residual], {"M": m}, expected, target)


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_operands_that_lie_the_other_way(target: str, data: st.DataObject) -> None:
    """Transposed operands, constant or not, of even and odd depth; results rounded to bf16."""
    m, n, depth = (data.draw(st.integers(2, 40)) for _ in range(3))
    left, right = data.draw(st.booleans()), data.draw(st.booleans())
    a, b = whole(*((depth, m) if left else (m, depth))), whole(*((n, depth) if right else (depth, n)))
    second: Any = b if data.draw(st.booleans()) else (b.shape, BF)
    expected = (f32(a).T if left else f32(a)) @ (f32(b).T if right else f32(b))
    region = make_region("Gemm", [(a.shape, BF), second], {"transA": int(left), "transB": int(right)})
    check(region, [a, b], {}, expected.astype(BF), target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("batch", "length", "heads", "width"), [(1, 5, 2, 8), (2, 19, 3, 16), (1, 34, 2, 24)])
def test_products_of_attention(target: str, known: bool, batch: int, length: int, heads: int, width: int) -> None:
    """A right operand whose pairs are neighbours, and one whose pairs are rows; sizes that only the run tells."""
    q, key, scores = (whole(*d) for d in ((batch, length, heads, width),) * 2 + ((batch, heads, length, length),))
    shape: Any = q.shape if known else (B, S, heads, width)
    square: Any = scores.shape if known else (B, heads, S, S)
    sizes = {} if known else {"B": batch, "S": length}
    for equation, operands, arrays in (
        ("bqhd,bkhd->bhqk", [(shape, BF), (shape, BF)], [q, key]),
        ("bhqk,bkhd->bhqd", [(square, BF), (shape, BF)], [scores, q]),
    ):
        expected = np.einsum(equation, *map(f32, arrays)).astype(BF)
        check(make_region("Einsum", operands, {"equation": equation}), arrays, sizes, expected, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_weights_of_f16_that_are_read_once_stay_narrow(target: str, rows: int) -> None:
    chosen = Target.parse(target)
    a, w = whole(rows, 37).astype(np.float16), whole(37, 85).astype(np.float16)
    region = make_region("MatMul", [(a.shape, "f2"), w], {"result": F32})
    lowered = gemm.schedule(region, chosen)
    assert lowered is not None
    (packed,) = (make() for make in lowered.packed.values())
    assert packed.dtype == (np.float32 if rows == 40 else np.float16)
    (result,) = run(region, lowered, chosen, [a, w])
    np.testing.assert_array_equal(result, f32(a) @ f32(w))


@pytest.mark.parametrize("target", TARGETS)
def test_rows_of_f16_are_widened_once(target: str) -> None:
    """Of a transposed operand and of several batches too; few rows are converted where they are read."""
    chosen = Target.parse(target)
    w = whole(24, 85).astype(np.float16)
    for shape, transposed in (((2, 19, 24), False), ((24, 33), True)):
        a = whole(*shape).astype(np.float16)
        region = make_region("Gemm", [(shape, "f2"), w], {"transA": 1}) if transposed else make_region(
            "MatMul", [(shape, "f2"), w], {"result": F32}
        )  # fmt: skip
        lowered = widened_gemm.schedule(region, chosen)
        assert lowered is not None and lowered.kernel_calls[0].kernel.name == "widen_rows"
        (result,) = run(region, lowered, chosen, [a, w])
        expected = f32(a.T if transposed else a) @ f32(w)
        np.testing.assert_array_equal(result, expected.astype(result.dtype))
    assert widened_gemm.schedule(make_region("MatMul", [((8, 24), "f2"), w]), chosen) is None


def test_strassens_method() -> None:
    """Within its error: sums of blocks are rounded, which doubles that of the definition."""
    target = replace(Target.parse("znver4"), strassen=1)
    for m, depth, n in ((64, 256, 192), (37, 128, 200)):
        a, w = normal(m, depth), normal(depth, n)
        region = make_region("MatMul", [(a.shape, BF), w], {"result": F32})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(strassen, "WORTH", (0.0, 0.0))
            lowered = pair_gemm.schedule(region, target)
        assert lowered is not None and "bf16_strassen_" in lowered.kernel_calls[-1].kernel.name
        if not HOST.has("avx512bf16"):
            continue
        (result,) = run(region, lowered, target, [a, w])
        exact = a.astype(np.float64) @ w.astype(np.float64)
        assert 1e-4 < np.abs(result - exact).max() / np.abs(exact).max() < 8e-3


# Convolutions.


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_convolutions(target: str, data: st.DataObject) -> None:
    """Any image, kernel, stride, padding and group; of one group also an odd number of channels."""
    chosen = Target.parse(target)
    group = data.draw(st.sampled_from([1, 1, 2]), "group")
    channels = data.draw(st.integers(1, 20), "channels") * (2 if group != 1 else 1)
    filters = data.draw(st.integers(1, 40), "filters")
    kernel_size = [data.draw(st.integers(1, 4), "taps") for _ in range(2)]
    strides = [data.draw(st.integers(1, 2), "stride") for _ in range(2)]
    pads = [data.draw(st.integers(0, 2), "pad") for _ in range(4)]
    extents = [data.draw(st.integers(taps, 12), "extent") for taps in kernel_size]
    images = data.draw(st.integers(1, 2), "images")
    x, w = whole(images, *extents, group * channels), whole(group * filters, channels, *kernel_size)
    bias = f32(whole(group * filters)).astype(BF)
    attributes = {"pads": pads, "strides": strides, "group": group, "layout": "channels_last"}
    region = make_region("Conv", [(x.shape, BF), w, bias], attributes, epilogue=lambda y: maximum(y, 0.0))
    lowered = pair_conv.schedule(region, chosen)
    if lowered is None:
        assert group * filters == 1  # a vector of one column is no vector
        return
    (result,) = run(region, lowered, chosen, [x, w, bias])
    expected = np.maximum(convolution(x, w, pads, strides, group) + bias.astype(np.float64), 0)
    np.testing.assert_array_equal(result, expected.astype(BF))


@pytest.mark.skipif(not HOST.has("avx512bf16"), reason="other targets widen pixels")
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_depthwise_convolutions(data: st.DataObject) -> None:
    """Any image, kernel, stride, dilation and padding; also an odd number of kernel rows."""
    channels = data.draw(st.integers(4, 70), "channels")
    taps = [data.draw(st.integers(low, 5), "taps") for low in (2, 1)]
    strides = [data.draw(st.integers(1, 2), "stride") for _ in range(2)]
    pads = [data.draw(st.integers(0, 2), "pad") for _ in range(4)]
    extents = [data.draw(st.integers(size, 14), "extent") for size in taps]
    x, w = whole(data.draw(st.integers(1, 2)), *extents, channels), whole(channels, 1, *taps)
    attributes = {"pads": pads, "strides": strides, "group": channels, "layout": "channels_last"}
    region = make_region("Conv", [(x.shape, BF), w], attributes, epilogue=lambda y: maximum(y, 0.0))
    lowered = pair_depthwise.schedule(region, HOST)
    assert lowered is not None
    (result,) = run(region, lowered, HOST, [x, w])
    padded = np.pad(x.astype(np.float64), ((0, 0), (pads[0], pads[2]), (pads[1], pads[3]), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps, axis=(1, 2))[:, :: strides[0], :: strides[1]]
    expected = np.maximum(np.einsum("nhwckl,ckl->nhwc", windows, w[:, 0].astype(np.float64)), 0)
    np.testing.assert_array_equal(result, expected.astype(BF))


def test_transposed_convolutions() -> None:
    x, w = whole(2, 5, 7, 6), whole(6, 10, 3, 3)
    attributes = {"strides": [2, 2], "pads": [1, 1, 1, 1], "layout": "channels_last"}
    region = make_region("ConvTranspose", [(x.shape, BF), w], attributes)
    lowered = pair_conv.transposed(region, HOST)
    assert lowered is not None and len(lowered.kernel_calls) == 4
    (result,) = run(region, lowered, HOST, [x, w])
    definition = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], pads=[1] * 4)
    (expected,) = ReferenceEvaluator(definition).run(None, {"x": f32(x).transpose(0, 3, 1, 2), "w": f32(w)})
    np.testing.assert_array_equal(result, expected.transpose(0, 2, 3, 1).astype(BF))


@pytest.mark.parametrize(("stride", "channels", "group"), [(1, 64, 1), (1, 5, 1), (2, 32, 1), (1, 16, 2)])
def test_minimal_filtering(stride: int, channels: int, group: int) -> None:
    """Products of bf16 for F(2x2), of f32 for larger ones: within the errors of each."""
    target = replace(Target.parse("znver4"), winograd=True)
    x, w = normal(2, 11, 13, group * channels), (f32(normal(group * 24, channels, 3, 3)) / 20).astype(BF)
    attributes = {"pads": [1] * 4, "strides": [stride] * 2, "group": group, "layout": "channels_last"}
    region = make_region("Conv", [(x.shape, BF), w], attributes)
    exact = convolution(x, w, [1] * 4, [stride] * 2, group)
    for narrow, bound in ((True, 1.2e-2), (False, 5e-3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(winograd_plan, "WORTH", float("inf"))
            plans = [p for p in winograd_plan.plans(_problem(region, target), target) if p.narrow == narrow]
            best = min(plans, key=lambda plan: plan.cycles)
            patch.setattr(winograd_plan, "_best", lambda *_, best=best: best)
            lowered = winograd.schedule(region, target)
        assert lowered is not None
        assert all(axis.outputs <= winograd_plan.NARROW_OUTPUTS for plan in plans if narrow for axis in plan.axes)
        if HOST.has("avx512bf16"):
            (result,) = run(region, lowered, target, [x, w])
            assert np.abs(result.astype(np.float64) - exact).max() <= bound * np.abs(exact).max()


def _problem(region: Region, target: Target) -> winograd_plan.Problem:
    """What the schedule asks plans for."""
    found: list[winograd_plan.Problem] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd_plan, "_best", lambda problem, target: found.append(problem))
        winograd.schedule(region, target)
    return found[0]


# Whole models.


def test_models_of_bf16_agree_between_targets() -> None:
    """A target without the instruction computes the same sums, but for the order in which tiles add them."""
    weights = {"w": f32(normal(64, 96)) / 8, "v": f32(normal(96, 33)) / 10}
    model = model_of_text(
        """g (float[rows, 64] x) => (float[rows, 33] y) {
            h = MatMul (x, w)
            r = Relu (h)
            y = MatMul (r, v)
        }""",
        **weights,
    )
    x = f32(normal(9, 64))
    exact = np.maximum(x @ weights["w"], 0) @ weights["v"]
    for target in TARGETS:
        y = onnxc.compile(model, precision="bf16", target=target)(x)
        assert np.abs(y - exact).max() <= 1e-2 * np.abs(exact).max()
