"""Channels-last convolutions, dense and depthwise: every geometry, epilogue and target against the definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import run, spills, summing_loops
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnxc.backends.cpu.schedules import SCHEDULES
from onnxc.ir.dims import symbol
from onnxc.ir.functions import logistic, maximum
from onnxc.ir.ops import REGISTRY
from onnxc.ir.target import Target
from onnxc.ir.tensors import Tensor, reduce_axes, view
from onnxc.passes.regions import Lowered, Region
from onnxc.tools.bench_kernels import make_region

RANDOM = np.random.default_rng(0)
TARGETS = [name for name in ("host", "x86-64-v3", "x86-64") if name == "host" or Target.host().architecture == "x86_64"]
N, H, W = symbol("N"), symbol("H"), symbol("W")


def floats(*shape: int) -> np.ndarray:
    """Whole numbers, so that sums are exact in any order."""
    return RANDOM.integers(-4, 5, shape).astype(np.float32)


def schedule(region: Region, target: Target) -> Lowered:
    """The kernels by the first schedule that applies; there must be one."""
    assert region.anchor is not None
    lowered = next((found for each in SCHEDULES[region.anchor.op] if (found := each(region, target)) is not None), None)
    assert lowered is not None
    return lowered


def reference(x: np.ndarray, w: np.ndarray, bias: np.ndarray, attributes: Mapping[str, Any]) -> np.ndarray:
    """The convolution of a channels-last image by ONNX's reference."""
    plain = {name: value for name, value in attributes.items() if name != "layout"}
    names = ["x", "w", "b"]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in [*names, "y"]]
    graph = helper.make_graph([helper.make_node("Conv", names, ["y"], **plain)], "g", values[:3], values[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    (y,) = ReferenceEvaluator(model).run(None, {"x": np.moveaxis(x, -1, 1), "w": w, "b": bias})
    return np.moveaxis(np.asarray(y), 1, -1)


def transposed_reference(x: np.ndarray, w: np.ndarray, bias: np.ndarray, attributes: Mapping[str, Any]) -> np.ndarray:
    """The transposed convolution of a channels-last image: every input adds to the outputs that its taps reach."""
    rank, group = x.ndim - 2, attributes["group"]
    strides, dilations = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
    pads, extra = attributes.get("pads", [0] * 2 * rank), attributes.get("output_padding", [0] * rank)
    axes = list(zip(x.shape[1:-1], w.shape[2:], strides, dilations, extra, strict=True))
    full = np.zeros((x.shape[0], *((n - 1) * s + (k - 1) * d + 1 + e for n, k, s, d, e in axes), w.shape[1] * group))
    for tap in np.ndindex(*w.shape[2:]):
        places = [slice(t * d, t * d + (n - 1) * s + 1, s) for t, (n, _, s, d, _) in zip(tap, axes, strict=True)]
        for part in range(group):
            own = slice(part * x.shape[-1] // group, (part + 1) * x.shape[-1] // group)
            made = slice(part * w.shape[1], (part + 1) * w.shape[1])
            full[(slice(None), *places, made)] += x[..., own] @ w[(own, slice(None), *tap)]
    inside = [slice(pads[a], full.shape[1 + a] - pads[rank + a]) for a in range(rank)]
    return (full[(slice(None), *inside)] + bias).astype(np.float32)


def check(
    shape: Sequence[int],
    filters: int,
    kernel: Sequence[int],
    *,
    op: str = "Conv",
    target: str = "host",
    known: bool = True,
    **given: Any,
) -> str:
    """Convolution + bias + residual + ReLU on the machine, and where it is small by the interpreter.

    Returns the kernel's name.
    """
    chosen = Target.parse(target)
    attributes = {"group": 1, **given, "layout": "channels_last"}
    x, bias = floats(*shape), floats(filters)
    group = attributes["group"]
    w = floats(*((filters, shape[-1] // group) if op == "Conv" else (shape[-1], filters // group)), *kernel)
    expected = (reference if op == "Conv" else transposed_reference)(x, w, bias, attributes)
    residual = floats(*expected.shape)
    names = [N, H, W] if len(shape) == 4 else [N, W]
    symbolic: Any = x.shape if known else (*names, shape[-1])
    sizes = {} if known else {str(name): extent for name, extent in zip(names, shape[:-1], strict=True)}
    operands = [(symbolic, "f4"), w, bias]
    output = make_region(op, operands, attributes).outputs[0][1].shape
    region = make_region(op, operands, attributes, [(output, "f4")], lambda y, other: maximum(y + other, 0.0))
    lowered = schedule(region, chosen)
    for interpret in (False, True) if x.size * expected.size < 20000 else (False,):
        (result,) = run(region, lowered, chosen, [x, w, bias, residual], sizes, interpret)
        np.testing.assert_array_equal(result, np.maximum(expected + residual, 0))
    return lowered.calls[-1].kernel.name  # type: ignore[union-attr]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("known", [True, False])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_geometry(target: str, known: bool, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([1, 1, 2, 3]), "group")
    depthwise = data.draw(st.booleans(), "depthwise")
    channels = group * data.draw(st.integers(1, 9), "channels per group")
    filters = channels if depthwise else group * data.draw(st.integers(1, 40), "filters per group")
    kernel = [data.draw(st.integers(1, 4), "kernel") for _ in range(2)]
    strides = [data.draw(st.integers(1, 2), "stride") for _ in range(2)]
    dilations = [data.draw(st.integers(1, 2), "dilation") for _ in range(2)]
    pads = [data.draw(st.integers(0, 3), "pad") for _ in range(4)]
    spatial = [data.draw(st.integers((kernel[a] - 1) * dilations[a] + 1, 20), "extent") for a in range(2)]
    images = data.draw(st.integers(1, 2), "images")
    check(
        (images, *spatial, channels),
        filters,
        kernel,
        target=target,
        known=known,
        group=channels if depthwise else group,
        strides=strides,
        dilations=dilations,
        pads=pads,
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape", "filters", "kernel", "given"),
    [
        ("conv3x3_", (1, 5, 5, 3), 5, (3, 3), {"pads": [1, 1, 1, 1]}),
        ("conv3x3s2", (1, 15, 14, 16), 40, (3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ("conv7x7s2", (1, 26, 30, 3), 32, (7, 7), {"pads": [3, 3, 3, 3], "strides": [2, 2]}),
        ("conv5x5", (2, 2, 2, 6), 24, (5, 5), {"pads": [4, 4, 4, 4]}),
        ("conv1x5", (2, 23, 6), 24, (5,), {"pads": [2, 2]}),
        ("conv1x1", (1, 8, 9, 6), 24, (1, 1), {"pads": [1, 1, 1, 1]}),
        ("gemm", (1, 8, 9, 6), 24, (1, 1), {}),
        ("gemm", (1, 8, 9, 6), 24, (1, 1), {"strides": [2, 2]}),
        ("depthwise3x3_", (1, 14, 14, 40), 40, (3, 3), {"group": 40, "pads": [1, 1, 1, 1]}),
        ("depthwise3x3s2", (2, 9, 11, 21), 21, (3, 3), {"group": 21, "pads": [1, 0, 2, 1], "strides": [2, 2]}),
        ("depthwise7x7", (1, 5, 3, 6), 6, (7, 7), {"group": 6, "pads": [3, 3, 3, 3]}),
        ("depthwise1x5", (2, 23, 24), 24, (5,), {"group": 24, "pads": [2, 2]}),
    ],
)
def test_each_kind(
    target: str, known: bool, kind: str, shape: Sequence[int], filters: int, kernel: Sequence[int], given: Any
) -> None:
    assert kind in check(shape, filters, kernel, target=target, known=known, **given)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("known", [True, False])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_transposed(target: str, known: bool, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([1, 1, 2]), "group")
    channels, filters = (group * data.draw(st.integers(1, 6), "per group") for _ in range(2))
    rank = data.draw(st.integers(1, 2), "rank")
    kernel = [data.draw(st.integers(1, 4), "kernel") for _ in range(rank)]
    strides = [data.draw(st.integers(1, 3), "stride") for _ in range(rank)]
    dilations = [data.draw(st.integers(1, 2), "dilation") for _ in range(rank)]
    extra = [data.draw(st.integers(0, stride - 1), "output padding") for stride in strides]
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    pads = [data.draw(st.integers(0, min(2, r)), "pad") for r in reach * 2]
    spatial = [data.draw(st.integers(3, 9), "extent") for _ in range(rank)]
    given = {"strides": strides, "dilations": dilations, "pads": pads, "output_padding": extra}
    check(
        (2, *spatial, channels), filters, kernel, op="ConvTranspose", target=target, known=known, group=group, **given
    )


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_transposed_to_one_channel_in_patches(target: str, data: st.DataObject) -> None:
    """Windows that do not overlap: all phases of an input pixel in one vector."""
    rank = data.draw(st.integers(1, 2), "rank")
    strides = data.draw(st.sampled_from([[2, 2], [1, 2], [2, 1], [3, 1], [2, 3]]), "strides")[-rank:]
    kernel = [data.draw(st.integers(1, stride), "kernel") for stride in strides]
    spatial = [data.draw(st.integers(2, 21), "extent") for _ in range(rank)]
    channels = data.draw(st.integers(1, 26), "channels")
    extra = [stride - size for size, stride in zip(kernel, strides, strict=True)]
    options = {"strides": strides, "output_padding": extra}
    name = check((2, *spatial, channels), 1, kernel, op="ConvTranspose", target=target, **options)
    places = int(np.prod(strides))
    chosen = Target.parse(target)
    assert ("upsample" in name) == (1 < places <= chosen.lanes(32))


@pytest.mark.parametrize("group", [1, 3])
def test_one_filter_per_group(group: int) -> None:
    check((1, 7, 9, 6), group, (3, 3), group=group, pads=[1, 1, 1, 1])
    check((1, 7, 9, 6), group, (2, 2), op="ConvTranspose", group=group, strides=[2, 2])


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("known", [True, False])
def test_automatic_padding(pad: str, known: bool) -> None:
    check((1, 13, 10, 5), 7, (3, 4), known=known, auto_pad=pad, strides=[2, 1])


def test_sizes_of_zero() -> None:
    w, bias = floats(20, 3, 3, 3), floats(20)
    region = make_region("Conv", [((N, H, W, 3), "f4"), w, bias], {"pads": [1] * 4, "layout": "channels_last"})
    host = Target.host()
    sizes = {"N": 0, "H": 5, "W": 6}
    (result,) = run(region, schedule(region, host), host, [floats(0, 5, 6, 3), w, bias], sizes)
    assert result.shape == (0, 5, 6, 20)


def region_of_view(
    stored: np.ndarray, w: np.ndarray, attributes: dict[str, Any], image: Callable[[Tensor], Tensor]
) -> Region:
    """A convolution of what `image` sees in a stored array."""
    region = make_region(
        "Conv",
        [(stored.shape, "f4"), w],
        attributes,
        define=lambda memory, weights: REGISTRY["Conv"]([image(memory), weights], attributes)[0],  # type: ignore[arg-type, return-value]
    )
    memory, weights = region.operands
    assert memory is not None
    return replace(region, operands=(image(memory), weights))


@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_operand_that_is_a_view(group: int, transposed: bool) -> None:
    """A slice of a wider image's channels is read where it lies, a channels-first image is copied."""
    x, w = floats(1, 9, 10, 12), floats(15, 5 // group, 3, 3)
    attributes = {"pads": [1] * 4, "layout": "channels_last", "group": group}
    stored = np.moveaxis(x, -1, 1) if transposed else x

    def image(memory: Tensor) -> Tensor:
        return view(memory, (1, 9, 10, 5), lambda n, h, w, c: (n, c + 4, h, w) if transposed else (n, h, w, c + 4))

    region = region_of_view(stored, w, attributes, image)
    host = Target.host()
    lowered = schedule(region, host)
    assert len(lowered.calls) == 1 + transposed
    (result,) = run(region, lowered, host, [stored, w])
    np.testing.assert_array_equal(result, reference(x[..., 4:9], w, np.zeros(15, np.float32), attributes))


@pytest.mark.parametrize("group", [1, 12])
def test_epilogue_that_reads_other_elements(group: int) -> None:
    x, w, bias = floats(1, 6, 7, 12), floats(12, 12 // group, 3, 3), floats(12)
    attributes = {"pads": [1] * 4, "layout": "channels_last", "group": group}
    region = make_region(
        "Conv", [(x.shape, "f4"), w, bias], attributes, epilogue=lambda y: y - reduce_axes("max", y, (3,))
    )
    host = Target.host()
    (result,) = run(region, schedule(region, host), host, [x, w, bias])
    expected = reference(x, w, bias, attributes)
    np.testing.assert_array_equal(result, expected - expected.max(3, keepdims=True))


@pytest.mark.parametrize("dtype", ["f2", "f8"])
@pytest.mark.parametrize("group", [1, 8])
def test_other_element_types(dtype: str, group: int) -> None:
    x, w = floats(1, 6, 7, 8), floats(8, 8 // group, 3, 3)
    attributes = {"pads": [1] * 4, "layout": "channels_last", "group": group}
    region = make_region("Conv", [(x.shape, dtype), w.astype(dtype)], attributes)
    host = Target.host()
    (result,) = run(region, schedule(region, host), host, [x.astype(dtype), w.astype(dtype)])
    np.testing.assert_array_equal(result, reference(x, w, np.zeros(8, np.float32), attributes).astype(dtype))


@pytest.mark.parametrize("target", ["x86-64-v4", "x86-64-v3", "x86-64", "aarch64"])
@pytest.mark.parametrize("epilogue", [lambda y: maximum(y, 0.0), lambda y: y * logistic(y)])
@pytest.mark.parametrize(
    ("shape", "filters", "kernel", "group"),
    [((1, 56, 56, 64), 64, 3, 1), ((1, H, W, 3), 64, 7, 1), ((1, 28, 28, 96), 96, 3, 96), ((1, 28, 28, 96), 96, 5, 96)],
)
def test_summing_loops_do_not_spill(
    target: str, epilogue: Any, shape: Any, filters: int, kernel: int, group: int
) -> None:
    chosen = Target.parse(target)
    attributes = {"pads": [kernel // 2] * 4, "layout": "channels_last", "group": group}
    w = floats(filters, shape[-1] // group, kernel, kernel)
    lowered = schedule(make_region("Conv", [(shape, "f4"), w], attributes, epilogue=epilogue), chosen)
    loops = summing_loops(lowered, chosen)
    assert loops
    assert not [loop for loop in loops if spills(loop)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 5, 7), (2, 9, 10), (3, 16, 33)])
def test_images_of_few_channels_are_copied_by_vectors(target: str, channels: int, size: tuple[int, int, int]) -> None:
    images, height, width = size
    x, w = floats(images, channels, height, width), floats(9, channels, 3, 3)
    attributes = {"pads": [1] * 4, "strides": [2, 2], "layout": "channels_last"}

    def image(memory: Tensor) -> Tensor:
        return view(memory, (images, height, width, channels), lambda n, h, w, c: (n, c, h, w))

    region = region_of_view(x, w, attributes, image)
    chosen = Target.parse(target)
    lowered = schedule(region, chosen)
    assert "interleave" in lowered.calls[0].kernel.name  # type: ignore[union-attr]
    expected = reference(np.moveaxis(x, 1, -1), w, np.zeros(9, np.float32), attributes)
    for interpret in (False, True) if x.size < 800 else (False,):
        (result,) = run(region, lowered, chosen, [x, w], None, interpret)
        np.testing.assert_array_equal(result, expected)
