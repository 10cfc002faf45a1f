"""Convolutions on a GPU: every kind of kernel on the emulator against ONNX's reference, and what NVRTC makes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda_lowered import aligned, run, text
from emulator import harness
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnxc.backends.cuda import nvrtc, report
from onnxc.backends.cuda.schedules import schedule
from onnxc.backends.cuda.source import prelude
from onnxc.ir.dims import symbol
from onnxc.ir.functions import maximum
from onnxc.ir.ops import REGISTRY
from onnxc.ir.target import Target
from onnxc.ir.tensors import Tensor, reduce_axes, view
from onnxc.passes.regions import Lowered, Region
from onnxc.tools.bench_kernels import make_region

N = symbol("N")
RANDOM = np.random.default_rng(0)
needs_compiler = pytest.mark.skipif(harness.compiler() is None, reason="the emulator needs g++")
needs_nvrtc = pytest.mark.skipif(not nvrtc.is_available(), reason="NVRTC is not installed")
DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64}
Array = np.ndarray[Any, Any]


def numbers(shape: Sequence[int], dtype: str) -> Array:
    """Whole numbers so small that sums and roundings of them are exact."""
    return RANDOM.integers(-2, 3, shape).astype(DTYPES[dtype])


def reference(op: str, x: Array, w: Array, bias: Array, attributes: Mapping[str, Any]) -> Array:
    """The operator of a channels-last image, in f32."""
    if op == "ConvTranspose" and attributes["group"] > 1:  # The reference fails on groups.
        parts = zip(*(np.split(a, attributes["group"], axis) for a, axis in ((x, -1), (w, 0), (bias, 0))), strict=True)
        return np.concatenate([reference(op, *part, {**attributes, "group": 1}) for part in parts], -1)
    plain = {name: value for name, value in attributes.items() if name != "layout"}
    names = ["x", "w", "b"]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in [*names, "y"]]
    graph = helper.make_graph([helper.make_node(op, names, ["y"], **plain)], "g", values[:3], values[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    feed = {"x": np.moveaxis(x, -1, 1), "w": w, "b": bias}
    (y,) = ReferenceEvaluator(model).run(None, {name: np.float32(array) for name, array in feed.items()})
    return np.moveaxis(np.asarray(y), 1, -1)


def region_of(
    op: str, shape: Sequence[Any], w: Array, bias: Array, attributes: Mapping[str, Any], constant: bool = True
) -> Region:
    """max(op(x) + residual, 0), all addresses aligned."""
    operands = [(tuple(shape), w.dtype), w if constant else (w.shape, w.dtype), bias]
    output = make_region(op, operands, attributes).outputs[0][1].shape
    extras = [(output, w.dtype)]
    return aligned(make_region(op, operands, attributes, extras, lambda y, other: maximum(y + other, 0.0)))


def check(
    shape: Sequence[int],
    filters: int,
    kernel: Sequence[int],
    *,
    op: str = "Conv",
    dtype: str = "f32",
    symbolic: Sequence[int] = (),
    constant: bool = True,
    checked: bool = False,
    products: str = "f32",
    **given: Any,
) -> str:
    """Convolution, bias, residual and ReLU on the emulator; axes in `symbolic` have sizes known at run time only.

    Returns the kernels' text.
    """
    attributes = {"group": 1, **given, "layout": "channels_last"}
    group = attributes["group"]
    own = (filters, shape[-1] // group) if op == "Conv" else (shape[-1], filters // group)
    x, w, bias = numbers(shape, dtype), numbers((*own, *kernel), dtype), numbers((filters,), dtype)
    expected = reference(op, x, w, bias, attributes)
    residual = numbers(expected.shape, dtype)
    known: list[Any] = [symbol(f"d{axis}") if axis in symbolic else extent for axis, extent in enumerate(shape)]
    region = region_of(op, known, w, bias, attributes, constant)
    chosen = replace(Target.parse("cuda:sm_90"), products=products)
    lowered = schedule(region, chosen)
    assert lowered is not None
    sizes = {f"d{axis}": shape[axis] for axis in symbolic}
    (result,) = run(region, lowered, chosen, [x, w, bias, residual], sizes, checked)
    np.testing.assert_array_equal(np.float32(result), np.maximum(expected + np.float32(residual), 0))
    return text(lowered)


def resources(lowered: Lowered, architecture: str) -> tuple[int, str]:
    """Bytes that all kernels spill, and their SASS."""
    found = nvrtc.compile_source(prelude() + text(lowered), architecture)
    spilled = sum(each.spill_store_bytes + each.stack_bytes for each in found.resources.values())
    return spilled, report.sass(found.image) if report.has_disassembler() else ""


# Depthwise


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "filters", "kernel", "given"),
    [
        ((2, 9, 11, 24), 24, (3, 3), {"pads": [1, 1, 1, 1], "dtype": "f16"}),
        ((1, 8, 9, 6), 6, (3, 3), {"pads": [1, 0, 2, 1], "strides": [2, 2], "symbolic": (0, 1, 2)}),
        ((1, 17, 24), 24, (4,), {"pads": [3, 0], "dtype": "bf16", "symbolic": (1,)}),
        ((1, 3, 7, 6, 4), 8, (2, 3, 2), {"pads": [1, 0, 1, 0, 2, 1]}),
        ((1, 9, 9, 5), 15, (3, 2), {"dilations": [2, 3], "dtype": "f16"}),
        ((1, 12, 7, 16), 32, (5, 5), {"pads": [2] * 4, "constant": False, "dtype": "f16"}),
        ((1, 6, 7, 2), 4, (3, 3), {"dtype": "f64"}),
        ((1, 50, 16), 16, (31,), {"pads": [15, 15], "dtype": "f16"}),
    ],
)
def test_depthwise(shape: Sequence[int], filters: int, kernel: Sequence[int], given: Any) -> None:
    assert "depthwise" in check(shape, filters, kernel, group=shape[-1], **given)


@needs_compiler
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_depthwise_geometry(data: st.DataObject) -> None:
    channels, multiplier = data.draw(st.integers(2, 20), "channels"), data.draw(st.integers(1, 3), "multiplier")
    kernel, strides, dilations = ([data.draw(st.integers(1, 3)) for _ in range(2)] for _ in range(3))
    pads = [data.draw(st.integers(0, 2), "pad") for _ in range(4)]
    spatial = [data.draw(st.integers((kernel[a] - 1) * dilations[a] + 1, 14), "extent") for a in range(2)]
    given = {"strides": strides, "dilations": dilations, "pads": pads, "group": channels}
    symbolic = data.draw(st.sampled_from([(), (0, 1, 2)]), "symbolic")
    shape = (data.draw(st.integers(1, 2), "images"), *spatial, channels)
    check(shape, channels * multiplier, kernel, symbolic=symbolic, **given)


@needs_compiler
def test_depthwise_checked() -> None:
    check((1, 5, 6, 16), 16, (3, 3), group=16, pads=[1] * 4, dtype="f16", checked=True)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("kernel", "dtype"), [(3, "f16"), (5, "f32"), (7, "f16")])
def test_depthwise_keeps_registers(architecture: str, kernel: int, dtype: str) -> None:
    w, bias = numbers((96, 1, kernel, kernel), dtype), numbers((96,), dtype)
    attributes = {"group": 96, "pads": [kernel // 2] * 4, "layout": "channels_last"}
    target = Target.parse(f"cuda:{architecture}")
    for images in (1, 32):
        lowered = schedule(region_of("Conv", (images, 56, 56, 96), w, bias, attributes), target)
        assert lowered is not None
        spilled, _ = resources(lowered, architecture)
        assert spilled == 0


# Dense


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "filters", "kernel", "given"),
    [
        ((1, 9, 10, 16), 24, (3, 3), {"pads": [1] * 4, "dtype": "f16"}),
        ((2, 7, 6, 8), 40, (3, 3), {"pads": [1, 0, 2, 1], "strides": [2, 1], "dtype": "bf16", "symbolic": (0, 1, 2)}),
        ((1, 8, 9, 24), 17, (1, 1), {"dtype": "f16", "symbolic": (0,)}),
        ((1, 8, 9, 20), 16, (1, 1), {"strides": [2, 2], "products": "tf32"}),
        ((1, 8, 9, 6), 16, (1, 1), {"pads": [1, 1, 1, 1], "symbolic": (1, 2)}),
        ((1, 10, 12, 3), 20, (5, 5), {"pads": [2] * 4, "strides": [2, 2], "dtype": "f16"}),
        ((1, 10, 12, 3), 20, (3, 3), {"pads": [1] * 4, "products": "tf32", "symbolic": (0, 1, 2)}),
        ((2, 9, 9, 1), 8, (3, 3), {}),
        ((1, 30, 12), 16, (3,), {"pads": [2, 2], "dilations": [2], "dtype": "f16", "symbolic": (1,)}),
        ((1, 4, 5, 6, 8), 8, (3, 2, 2), {"pads": [1, 0, 0, 1, 1, 0], "dtype": "f16"}),
        ((1, 40, 4), 6, (35,), {"pads": [17, 17]}),
        ((8, 25, 25, 3), 8, (7, 7), {"pads": [3] * 4, "dtype": "f16"}),
        ((8, 25, 25, 2), 8, (7, 7), {"pads": [3] * 4, "symbolic": (0, 1, 2)}),
        ((1, 6, 7, 32), 64, (3, 3), {"group": 2, "pads": [1] * 4, "dtype": "f16"}),
        ((1, 6, 7, 32), 32, (3, 3), {"group": 8, "pads": [1] * 4, "products": "tf32"}),
        ((1, 6, 7, 12), 8, (3, 3), {"group": 4, "constant": False}),
        ((1, 6, 7, 16), 8, (3, 3), {"constant": False, "dtype": "f16"}),
        ((1, 5, 6, 4), 3, (2, 2), {"dtype": "f64"}),
        ((1, 4, 4, 512), 64, (3, 3), {"pads": [1] * 4, "dtype": "f16"}),
    ],
)
def test_dense(shape: Sequence[int], filters: int, kernel: Sequence[int], given: Any) -> None:
    made = check(shape, filters, kernel, **given)
    uses_tensor_cores = given.get("dtype") in ("f16", "bf16") or "products" in given
    assert ("mma_m16n8" if uses_tensor_cores else "fma") in made


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "filters", "kernel", "given"),
    [
        ((1, 5, 6, 16), 8, (3, 3), {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1], "dtype": "f16"}),
        ((2, 4, 5, 6), 4, (2, 2), {"strides": [2, 2], "group": 2, "symbolic": (0, 1, 2)}),
        ((1, 9, 4), 4, (3,), {"strides": [4]}),
        (
            (1, 3, 4, 12),
            6,
            (4, 4),
            {"strides": [2, 2], "pads": [1] * 4, "group": 3, "dtype": "f16", "symbolic": (1, 2)},
        ),
        ((1, 6, 8), 5, (3,), {"strides": [2], "pads": [0, 1], "constant": False}),
        ((1, 6, 8), 5, (3,), {"strides": [2], "output_padding": [1], "pads": [1, 1], "dtype": "f16"}),
        ((1, 5, 8), 4, (5,), {"strides": [3], "dilations": [3], "pads": [3, 2]}),
        ((1, 4, 5, 8), 8, (3, 4), {"dilations": [2, 1], "strides": [1, 3], "products": "tf32", "constant": False}),
    ],
)
def test_transposed(shape: Sequence[int], filters: int, kernel: Sequence[int], given: Any) -> None:
    check(shape, filters, kernel, op="ConvTranspose", **given)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "filters", "kernel", "given"),
    [
        ((1, 5, 6, 8), 8, (3, 3), {"pads": [1] * 4, "dtype": "f16"}),
        ((1, 5, 6, 8), 12, (3, 3), {"pads": [1, 0, 0, 1], "symbolic": (0, 1, 2)}),
        ((1, 7, 7, 3), 8, (3, 3), {"pads": [1] * 4, "strides": [2, 2], "dtype": "bf16"}),
        ((1, 7, 7, 3), 8, (3, 3), {"pads": [1] * 4, "products": "tf32"}),
        ((2, 5, 6, 16), 16, (1, 1), {"strides": [2, 2], "group": 2, "dtype": "f16"}),
        ((1, 3, 3, 256), 8, (3, 3), {"pads": [1] * 4, "dtype": "f16"}),
        ((2, 3, 4, 8), 8, (3, 3), {"strides": [2, 2], "op": "ConvTranspose", "dtype": "f16", "constant": False}),
    ],
)
def test_checked(shape: Sequence[int], filters: int, kernel: Sequence[int], given: Any) -> None:
    check(shape, filters, kernel, checked=True, **given)


@needs_compiler
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_geometry(data: st.DataObject) -> None:
    rank = data.draw(st.sampled_from([1, 2, 2, 3]), "rank")
    op = data.draw(st.sampled_from(["Conv", "Conv", "ConvTranspose"]), "op")
    group = data.draw(st.sampled_from([1, 1, 2, 3]), "group")
    channels, filters = (group * data.draw(st.sampled_from([1, 2, 3, 4, 8, 12, 24])) for _ in range(2))
    kernel, strides, dilations = ([data.draw(st.integers(1, 3)) for _ in range(rank)] for _ in range(3))
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    pads = [data.draw(st.integers(0, min(2, r)), "pad") for r in reach * 2]
    spatial = [data.draw(st.integers(r + 1, 9 if rank < 3 else 7), "extent") for r in reach]
    shape = (data.draw(st.integers(1, 2), "images"), *spatial, channels)
    given = {"strides": strides, "dilations": dilations, "pads": pads, "group": group, "op": op}
    given["symbolic"] = data.draw(st.sampled_from([(), tuple(range(rank + 1))]), "symbolic")
    given["dtype"] = data.draw(st.sampled_from(["f32", "f16", "bf16"]), "dtype")
    given["products"] = data.draw(st.sampled_from(["f32", "tf32"]), "products")
    check(shape, filters, kernel, **given)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("shape", "filters", "kernel", "given"),
    [
        ((1, 7, 7, 512), 512, 3, {}),
        ((32, 28, 28, 128), 128, 3, {}),
        ((32, 224, 224, 3), 64, 7, {"strides": [2, 2]}),
        ((1, 224, 224, 3), 32, 3, {"strides": [2, 2]}),
        ((8, 56, 56, 256), 512, 1, {"strides": [2, 2]}),
        ((symbol("n"), symbol("h"), symbol("w"), 64), 96, 3, {"group": 2}),
    ],
)
@pytest.mark.parametrize(("dtype", "products"), [("f32", "f32"), ("f32", "tf32"), ("f16", "f32"), ("bf16", "f32")])
def test_instructions(
    shape: Sequence[Any], filters: int, kernel: int, given: Any, architecture: str, dtype: str, products: str
) -> None:
    if architecture == "sm_80" and dtype == "bf16":
        pytest.skip("as f16")
    group = given.get("group", 1)
    attributes = {"pads": [kernel // 2] * 4, "layout": "channels_last", "group": group, **given}
    w, bias = numbers((filters, shape[-1] // group, kernel, kernel), dtype), numbers((filters,), dtype)
    lowered = schedule(
        region_of("Conv", shape, w, bias, attributes), replace(Target.parse(f"cuda:{architecture}"), products=products)
    )
    assert lowered is not None
    spilled, sass = resources(lowered, architecture)
    assert spilled == 0
    if sass:
        wanted = {"f16": r"HMMA\.16816\.F32", "bf16": r"HMMA\.16816\.F32\.BF16", "f32": r"HMMA\.1688\.F32\.TF32"}
        matrix = dtype != "f32" or products == "tf32"
        assert bool(re.search(wanted[dtype], sass)) == matrix
        assert ("LDGSTS" in sass) or shape[-1] == 3


# Other operands, layouts and epilogues


@needs_compiler
@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("images", [1, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_operand_that_is_a_view(images: int, group: int, transposed: bool) -> None:
    """A slice of a wider image's channels, or a channels-first image."""
    x, w = numbers((images, 25, 26, 12), "f16"), numbers((15, 5 // group, 5, 5), "f16")
    attributes = {"pads": [2] * 4, "layout": "channels_last", "group": group}
    stored = np.ascontiguousarray(np.moveaxis(x, -1, 1)) if transposed else x

    def image(memory: Tensor) -> Tensor:
        where = (lambda n, h, w, c: (n, c + 4, h, w)) if transposed else (lambda n, h, w, c: (n, h, w, c + 4))
        return view(memory, (images, 25, 26, 5), where)

    def define(memory: Tensor, weights: Tensor) -> Tensor:
        (result,) = REGISTRY["Conv"]([image(memory), weights], attributes)
        assert isinstance(result, Tensor)
        return result

    region = aligned(make_region("Conv", [(stored.shape, "f2"), w], attributes, define=define))
    memory, weights = region.operands
    assert memory is not None
    region = replace(region, operands=(image(memory), weights))
    target = Target.parse("cuda:sm_90")
    lowered = schedule(region, target)
    assert lowered is not None
    (result,) = run(region, lowered, target, [stored, w])
    np.testing.assert_array_equal(result, reference("Conv", x[..., 4:9], w, np.zeros(15), attributes))


@needs_compiler
@pytest.mark.parametrize(
    ("channels", "group", "dtype"), [(3, 1, "f16"), (16, 1, "f32"), (64, 1, "f16"), (8, 8, "f16"), (12, 4, "f32")]
)
def test_channels_first(channels: int, group: int, dtype: str) -> None:
    x, w, bias = (
        numbers((2, channels, 9, 10), dtype),
        numbers((24, channels // group, 3, 3), dtype),
        numbers((24,), dtype),
    )
    attributes = {"pads": [1] * 4, "strides": [2, 1], "group": group}
    region = aligned(make_region("Conv", [((N, *x.shape[1:]), x.dtype), w, bias], attributes))
    target = Target.parse("cuda:sm_90")
    lowered = schedule(region, target)
    assert lowered is not None and (dtype == "f32" or "_mma_" in text(lowered))
    (result,) = run(region, lowered, target, [x, w, bias], {"N": 2})
    expected = reference("Conv", np.moveaxis(x, 1, -1), w, bias, attributes)
    np.testing.assert_array_equal(np.float32(result), np.moveaxis(expected, -1, 1))


@needs_compiler
@pytest.mark.parametrize("group", [1, 12])
def test_epilogue_that_reads_other_elements(group: int) -> None:
    x, w, bias = numbers((1, 6, 7, 12), "f32"), numbers((12, 12 // group, 3, 3), "f32"), numbers((12,), "f32")
    attributes = {"pads": [1] * 4, "layout": "channels_last", "group": group}
    region = make_region(
        "Conv", [(x.shape, "f4"), w, bias], attributes, epilogue=lambda y: y - reduce_axes("max", y, (3,))
    )
    target = Target.parse("cuda:sm_90")
    (result,) = run(region, schedule(region, target), target, [x, w, bias])
    expected = reference("Conv", x, w, bias, attributes)
    np.testing.assert_array_equal(result, expected - expected.max(3, keepdims=True))


@needs_compiler
@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("channels", "group"), [(5, 1), (6, 6)])
def test_automatic_padding(pad: str, channels: int, group: int) -> None:
    given = {"auto_pad": pad, "strides": [2, 1], "group": group}
    check((1, 13, 10, channels), 6, (3, 4), symbolic=(1, 2), **given)


@needs_compiler
@pytest.mark.parametrize(("channels", "group"), [(3, 1), (6, 6)])
def test_sizes_of_zero(channels: int, group: int) -> None:
    w, bias = numbers((6, channels // group, 3, 3), "f32"), numbers((6,), "f32")
    attributes = {"pads": [1] * 4, "layout": "channels_last", "group": group}
    region = region_of("Conv", (N, 5, 6, channels), w, bias, attributes)
    target = Target.parse("cuda:sm_90")
    x, residual = np.zeros((0, 5, 6, channels), np.float32), np.zeros((0, 5, 6, 6), np.float32)
    (result,) = run(region, schedule(region, target), target, [x, w, bias, residual], {"N": 0})
    assert result.shape == (0, 5, 6, 6)
