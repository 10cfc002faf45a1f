"""Convolutions of 8-bit images by every schedule for them: the definition's integers on every x86 level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxc
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lowered import run
from native_kernel import HOST
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxc.backends.cpu import schedules
from onnxc.backends.cpu.kernels import conv, integer_conv, integer_depthwise, integer_winograd, winograd_plan
from onnxc.backends.cpu.kernels.filtering import as_array, filtering
from onnxc.ir.dims import symbol
from onnxc.ir.dtypes import F32, I8, I32, U8
from onnxc.ir.functions import cast, maximum, minimum, round_even
from onnxc.ir.ops.quantization import quantize_linear
from onnxc.ir.target import Target
from onnxc.ir.tensors import Tensor
from onnxc.passes.regions import Region, Schedule
from onnxc.tools.bench_kernels import make_region

RANDOM = np.random.default_rng(0)
PHASES = (Phase.explicit, Phase.generate)
"""Without shrinking, as each example is compiled."""
LEVELS = ["host", "x86-64-v4", "x86-64-v3", "x86-64"] if HOST.architecture == "x86_64" else ["host"]
H, W = symbol("H"), symbol("W")


def integers(dtype: Any, *shape: int) -> np.ndarray:
    info = np.iinfo(dtype)
    return RANDOM.integers(info.min, info.max + 1, shape).astype(dtype)


def expected(x: np.ndarray, w: np.ndarray, zero: int, attributes: Mapping[str, Any]) -> np.ndarray:
    """The convolution of a channels-last image less its zero point, in i64."""
    (top, left, bottom, right), (down, along) = attributes["pads"], attributes["strides"]
    spread, group = attributes["dilations"], attributes["group"]
    padded = np.pad(x.astype(np.int64) - zero, ((0, 0), (top, bottom), (left, right), (0, 0)))
    reach = [(taps - 1) * step + 1 for taps, step in zip(w.shape[2:], spread, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(1, 2))
    windows = windows[:, ::down, ::along, :, :: spread[0], :: spread[1]]
    parts = zip(np.split(windows, group, axis=3), np.split(w, group), strict=True)
    return np.concatenate([np.einsum("nhwckl,fckl->nhwf", *part) for part in parts], axis=3)


class Case:
    """A drawn convolution: its arrays, and the region with what is known of it."""

    def __init__(self, data: st.DataObject, depthwise: bool = False, least: int = 1) -> None:
        draw = data.draw
        dtype = draw(st.sampled_from([np.uint8, np.int8]), "image")
        taps = [draw(st.integers(least, 4 if least == 1 else 3), "taps") for _ in range(2)]
        spread = [1, 1] if least > 1 else [draw(st.integers(1, 2), "dilation") for _ in range(2)]
        self.group = draw(st.integers(1, 100), "channels") if depthwise else draw(st.sampled_from([1, 1, 2]), "group")
        channels = 1 if depthwise else draw(st.integers(4 if least > 1 else 1, 20), "channels")
        filters = 1 if depthwise else draw(st.integers(2, 40), "filters")
        extents = [draw(st.integers((t - 1) * d + 1, 13), "extent") for t, d in zip(taps, spread, strict=True)]
        self.attributes = {
            "pads": [draw(st.integers(0, 2), "pad") for _ in range(4)],
            "strides": [draw(st.integers(1, 2), "stride") for _ in range(2)],
            "dilations": spread,
            "group": self.group,
            "layout": "channels_last",
        }
        self.x = integers(dtype, draw(st.integers(1, 2), "images"), *extents, self.group * channels)
        self.zero = integers(dtype) if draw(st.booleans(), "moved") else np.zeros((), dtype)
        unsigned = draw(st.booleans(), "unsigned weights")
        self.w = integers(np.uint8 if unsigned else np.int8, self.group * filters, channels, *taps)
        self.w_zero = np.array([128], np.uint8) if unsigned else np.zeros(1, np.int8)
        if not unsigned and draw(st.booleans(), "zero points by filter"):
            self.w = (self.w // 2).astype(np.int8)
            self.w_zero = RANDOM.integers(-60, 61, len(self.w)).astype(np.int8)
        self.known = draw(st.booleans(), "sizes known")
        self.known_zero = draw(st.booleans(), "zero known")
        self.sizes = {} if self.known else {"H": extents[0], "W": extents[1]}

    def region(self, **options: Any) -> Region:
        shape = self.x.shape if self.known else (len(self.x), H, W, self.x.shape[3])
        zero: Any = self.zero if self.known_zero else ((), self.zero.dtype)
        return make_region(
            "ConvInteger", [(shape, self.x.dtype), self.w, zero, self.w_zero], self.attributes, **options
        )

    def check(self, schedule: Schedule, target: str) -> None:
        chosen, region = Target.parse(target), self.region()
        lowered = schedule(region, chosen)
        assert lowered is not None
        inputs = [self.x, self.w, self.zero, self.w_zero]
        (found,) = run(region, lowered, chosen, inputs, self.sizes)
        weights = self.w.astype(np.int64) - self.w_zero.astype(np.int64).reshape(-1, 1, 1, 1)
        np.testing.assert_array_equal(found, expected(self.x, weights, int(self.zero), self.attributes))


def test_the_reference_is_onnxs() -> None:
    x, w = integers(np.uint8, 1, 6, 7, 4), integers(np.int8, 6, 2, 3, 2)
    attributes = {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2], "group": 2}
    zero = np.array(77, np.uint8)
    node = helper.make_node("ConvInteger", ["x", "w", "z"], ["y"], **attributes)
    (reference,) = ReferenceEvaluator(node).run(None, {"x": x.transpose(0, 3, 1, 2), "w": w, "z": zero})
    found = expected(x, w.astype(np.int64), 77, attributes)
    np.testing.assert_array_equal(found, reference.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("target", LEVELS)
@settings(max_examples=6, deadline=None, phases=PHASES)
@given(data=st.data())
def test_convolutions(target: str, data: st.DataObject) -> None:
    """Any image, kernel, stride, dilation, padding and group; any zero points, known or not."""
    Case(data).check(integer_conv.schedule, target)


@pytest.mark.parametrize("target", LEVELS)
@settings(max_examples=6, deadline=None, phases=PHASES)
@given(data=st.data())
def test_depthwise_convolutions(target: str, data: st.DataObject) -> None:
    Case(data, depthwise=True).check(integer_depthwise.schedule, target)


@pytest.mark.parametrize("target", LEVELS)
@settings(max_examples=4, deadline=None, phases=PHASES)
@given(data=st.data())
def test_minimal_filtering(target: str, data: st.DataObject) -> None:
    """Whatever the plan, and wherever the zero point is: no result differs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd_plan, "WORTH_EXACT", 1e9)
        Case(data, least=2).check(integer_winograd.schedule, target)


def test_minimal_filtering_of_the_largest_numbers() -> None:
    """Transformed images and weights at the ends of their ranges, sums near what is still told apart."""
    found = filtering(4, 3, 1, True)
    row = as_array(found.data)[1]
    x = np.where(np.multiply.outer(np.pad(row, (0, 2)) > 0, np.pad(row, (0, 2)) > 0), 255, 0).astype(np.uint8)
    image = np.repeat(x[None, :, :, None], 64, axis=3)
    for value in (-128, 127):
        w = np.full((16, 64, 3, 3), value, np.int8)
        attributes = {"pads": [0] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1, "layout": "channels_last"}
        region = make_region("ConvInteger", [(image.shape, np.uint8), w], attributes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(winograd_plan, "WORTH_EXACT", 1e9)
            lowered = integer_winograd.schedule(region, HOST)
        assert lowered is not None
        (result,) = run(region, lowered, HOST, [image, w])
        np.testing.assert_array_equal(result, expected(image, w.astype(np.int64), 0, attributes))


def test_minimal_filtering_is_left_where_sums_are_too_large() -> None:
    """2^25 and above cannot be told from what is added to them, a multiple of 2^26."""
    assert not winograd_plan.fits(filtering(4, 3, 1, True), filtering(4, 3, 1, True), 27)
    assert winograd_plan.fits(filtering(4, 3, 1, True), filtering(4, 3, 1, True), 26)
    assert winograd_plan.fits(filtering(2, 3, 1, True), filtering(2, 3, 1, True), 30)


# What follows the sums.


def requantized(sums: Tensor, bias: Tensor, scale: Tensor, residual: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    real = cast(sums + bias, F32) * scale + cast(residual, F32) * 0.1
    return quantize_linear(real, step, zero)


@pytest.mark.parametrize("schedule", [integer_conv.schedule, integer_depthwise.schedule, integer_winograd.schedule])
@pytest.mark.parametrize("result", [np.uint8, np.int8])
def test_results_of_8_bits_are_the_same_on_every_level(schedule: Schedule, result: Any) -> None:
    """Bias, a scale by channel, a residual of 8 bits and quantization, all in one kernel."""
    channels = 72
    depthwise = schedule is integer_depthwise.schedule
    x = integers(np.uint8, 1, 12, 12, channels)
    w = integers(np.int8, channels, 1 if depthwise else channels, 3, 3)
    attributes = {
        "pads": [1] * 4,
        "strides": [1, 1],
        "dilations": [1, 1],
        "group": channels if depthwise else 1,
        "layout": "channels_last",
    }
    bias = RANDOM.integers(-1000, 1000, channels).astype(np.int32)
    scale = RANDOM.uniform(1e-3, 2e-3, channels).astype(np.float32) / (1 if depthwise else 8)
    residual, zero = integers(np.int8, *x.shape), np.array(3, result)
    step = np.array(1.25, np.float32)
    extras: list[Any] = [bias, scale, (residual.shape, np.int8), step, zero]
    region = make_region("ConvInteger", [(x.shape, np.uint8), w], attributes, extras, requantized)
    sums = expected(x, w.astype(np.int64), 0, attributes) + bias
    real = (sums.astype(np.float32) * scale + residual.astype(np.float32) * np.float32(0.1)) / step
    info = np.iinfo(result)
    wanted = np.clip(np.rint(real) + 3, info.min, info.max).astype(result)
    for level in LEVELS:
        target = Target.parse(level)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(winograd_plan, "WORTH_EXACT", 1e9)
            lowered = schedule(region, target)
        assert lowered is not None
        *before, _ = (made.kernel.name for made in lowered.kernel_calls)
        assert before in ([], ["widen_image"])
        (found,) = run(region, lowered, target, [x, w, bias, scale, residual, step, zero])
        np.testing.assert_array_equal(found, wanted, err_msg=level)


@pytest.mark.parametrize("level", LEVELS)
def test_sums_that_are_quantized_before_a_residual_is_added(level: str) -> None:
    """As models have it whose every tensor is quantized: rounded twice, limited twice."""
    x, w = integers(np.uint8, 1, 5, 6, 16), integers(np.int8, 40, 16, 3, 3)
    attributes = {"pads": [1] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1, "layout": "channels_last"}
    residual, scale = integers(np.uint8, 1, 5, 6, 40), RANDOM.uniform(1e-3, 4e-3, 40).astype(np.float32)

    def outputs(sums: Tensor, scale: Tensor, residual: Tensor, one: Tensor, zero: Tensor, other: Tensor) -> Tensor:
        inner = quantize_linear(cast(sums, F32) * scale, one, zero)
        real = cast(cast(inner, I32) - 100, F32) * 0.75 + cast(cast(residual, I32) - 30, F32) * 0.5
        return quantize_linear(real, one, other)

    one, zero, other = np.array(1, np.float32), np.array(100, np.uint8), np.array(7, np.uint8)
    extras: list[Any] = [scale, (residual.shape, np.uint8), one, zero, other]
    region = make_region("ConvInteger", [(x.shape, np.uint8), w], attributes, extras, outputs)
    sums = expected(x, w.astype(np.int64), 0, attributes).astype(np.float32) * scale
    inner = np.clip(np.rint(sums) + 100, 0, 255)
    real = (inner - 100).astype(np.float32) * np.float32(0.75) + (residual.astype(np.float32) - 30) * np.float32(0.5)
    wanted = np.clip(np.rint(real) + 7, 0, 255).astype(np.uint8)
    target = Target.parse(level)
    lowered = integer_conv.schedule(region, target)
    assert lowered is not None
    (found,) = run(region, lowered, target, [x, w, scale, residual, one, zero, other])
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("channels", "largest", "result"),
    [(6, 1e-3, np.uint8), (16, 1e30, np.int8), (40, 1e-3, np.int8), (150, 1e-3, np.uint8)],
)
def test_depthwise_results_are_packed_where_sums_lie(channels: int, largest: float, result: Any) -> None:
    """Four vectors of sums become one of bytes in their channels' order, without masks but for the last channels;
    also where sums are too large to be limited as integers, and next to a bias and a leaky activation."""
    x, w = integers(np.uint8, 1, 7, 9, channels), integers(np.int8, channels, 1, 3, 3)
    attributes = {"pads": [1] * 4, "strides": [1, 1], "dilations": [1, 1], "group": channels, "layout": "channels_last"}
    bias = RANDOM.integers(-9999, 9999, channels).astype(np.int32)
    scale = RANDOM.uniform(largest / 2, largest, channels).astype(np.float32)
    info = np.iinfo(result)

    def outputs(sums: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        real = cast(sums + bias, F32) * scale
        moved = round_even(maximum(real, real * 0.25)) + 3.0
        return cast(minimum(maximum(moved, float(info.min)), float(info.max)), U8 if info.min == 0 else I8)

    region = make_region("ConvInteger", [(x.shape, np.uint8), w], attributes, [bias, scale], outputs)
    real = (expected(x, w.astype(np.int64), 0, attributes) + bias).astype(np.float32) * scale
    wanted = np.clip(np.rint(np.maximum(real, real * np.float32(0.25))) + 3, info.min, info.max).astype(result)
    for target in [*map(Target.parse, LEVELS), Target.parse("neoverse-v1")]:
        lowered = integer_depthwise.schedule(region, target)
        assert lowered is not None
        (call,) = lowered.kernel_calls
        assert channels < 16 or f"pack_{'u8' if result == np.uint8 else 'i8'}" in str(call.kernel)
        assert ("_limited" in call.kernel.name) == (largest < 1)
        interpret = target.architecture != HOST.architecture
        (found,) = run(region, lowered, target, [x, w, bias, scale], interpret=interpret)
        np.testing.assert_array_equal(found, wanted, err_msg=target.name)


@pytest.mark.parametrize("target", ["aarch64+dotprod", "neoverse-v1"])
@pytest.mark.parametrize("image", [np.uint8, np.int8])
def test_for_other_processors(target: str, image: Any) -> None:
    """As the interpreter of kernels has it."""
    chosen = Target.parse(target)
    x, zero = integers(image, 1, 4, 5, 20), np.array(7, image)
    attributes = {"pads": [1] * 4, "strides": [1, 2], "dilations": [1, 1], "layout": "channels_last"}
    for group, schedule in ((20, integer_depthwise.schedule), (1, integer_conv.schedule)):
        w = integers(np.int8, *((20, 1) if group == 20 else (8, 20)), 3, 3)
        region = make_region("ConvInteger", [(x.shape, image), w, zero], {**attributes, "group": group})
        lowered = schedule(region, chosen)
        assert lowered is not None
        (found,) = run(region, lowered, chosen, [x, w, zero], interpret=True)
        np.testing.assert_array_equal(found, expected(x, w.astype(np.int64), 7, {**attributes, "group": group}))


@pytest.mark.parametrize(("channels", "times"), [(5, 2), (70, 2), (24, 4), (3, 64)])
@pytest.mark.parametrize("image", [np.uint8, np.int8])
def test_several_filters_for_each_channel(channels: int, times: int, image: Any) -> None:
    x, w, zero = integers(image, 2, 6, 5, channels), integers(np.int8, channels * times, 1, 3, 3), np.array(9, image)
    attributes = {"pads": [1] * 4, "strides": [1, 2], "dilations": [1, 1], "group": channels, "layout": "channels_last"}
    region = make_region("ConvInteger", [(x.shape, image), w, zero], attributes)
    lowered = integer_depthwise.schedule(region, HOST)
    assert lowered is not None and "depthwise" in lowered.kernel_calls[-1].kernel.name
    (found,) = run(region, lowered, HOST, [x, w, zero])
    np.testing.assert_array_equal(found, expected(x, w.astype(np.int64), 9, attributes))


@settings(max_examples=8, deadline=None, phases=PHASES)
@given(data=st.data())
def test_rows_of_the_kernel_as_one_stretch_of_bytes(data: st.DataObject) -> None:
    """Of few channels; any padding, stride and zero point, sizes that only the run tells, every level."""
    draw = data.draw
    channels, taps = draw(st.sampled_from([1, 1, 2, 3]), "channels"), draw(st.integers(3, 7), "taps")
    dtype, level = draw(st.sampled_from([np.uint8, np.int8]), "image"), draw(st.sampled_from(LEVELS), "level")
    height, width = draw(st.integers(taps, 12), "height"), draw(st.integers(taps, 40), "width")
    x, w = integers(dtype, 2, height, width, channels), integers(np.int8, 20, channels, draw(st.integers(1, 3)), taps)
    zero, known = integers(dtype), draw(st.booleans(), "sizes known")
    attributes = {
        "pads": [draw(st.integers(0, 3), "pad") for _ in range(4)],
        "strides": [draw(st.integers(1, 3), "stride") for _ in range(2)],
        "dilations": [draw(st.integers(1, 2), "dilation"), 1],
        "group": 1,
        "layout": "channels_last",
    }
    if height <= (w.shape[2] - 1) * attributes["dilations"][0]:  # type: ignore[operator]
        return
    target = Target.parse(level)
    shape = x.shape if known else (2, H, W, channels)
    region = make_region("ConvInteger", [(shape, dtype), w, zero], attributes)
    lowered = integer_conv.schedule(region, target)
    assert lowered is not None
    merged = any("rows_of_bytes" in call.kernel.name for call in lowered.kernel_calls)
    assert merged or "dot4_u8_i8" not in target.dot_products
    (found,) = run(region, lowered, target, [x, w, zero], {} if known else {"H": height, "W": width})
    np.testing.assert_array_equal(found, expected(x, w.astype(np.int64), int(zero), attributes))


def test_one_axis() -> None:
    x, w, zero = integers(np.int8, 2, 30, 7), integers(np.int8, 9, 7, 5), np.array(-11, np.int8)
    attributes = {"pads": [2, 1], "strides": [2], "dilations": [1], "group": 1, "layout": "channels_last"}
    region = make_region("ConvInteger", [(x.shape, np.int8), w, zero], attributes)
    whole = {"pads": [0, 2, 0, 1], "strides": [1, 2], "dilations": [1, 1], "group": 1}
    wanted = expected(x[:, None], w[:, :, None].astype(np.int64), -11, whole)[:, 0]
    for schedule in (integer_conv.schedule, integer_winograd.schedule):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(winograd_plan, "WORTH_EXACT", 1e9)
            lowered = schedule(region, HOST)
        assert lowered is not None or schedule is integer_winograd.schedule
        if lowered is not None:
            (found,) = run(region, lowered, HOST, [x, w, zero])
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("channels", [3, 10])
def test_no_pixel_is_copied_for_each_tap_that_reads_it(channels: int) -> None:
    """Without padding a convolution is a matrix product too, whose rows would have to be made of odd channels."""
    x, w, zero = integers(np.uint8, 1, 9, 8, channels), integers(np.int8, 16, channels, 3, 3), np.array(7, np.uint8)
    attributes = {"pads": [0] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1, "layout": "channels_last"}
    region = make_region("ConvInteger", [(x.shape, np.uint8), w, zero], attributes)
    lowered = schedules.schedule(region, HOST)
    assert lowered is not None and not any("copy_rows" in made.kernel.name for made in lowered.kernel_calls)
    (found,) = run(region, lowered, HOST, [x, w, zero])
    np.testing.assert_array_equal(found, expected(x, w.astype(np.int64), 7, attributes))


def test_rows_that_are_copied_for_three_axes() -> None:
    """Of which only the last two lie side by side."""
    x, w = integers(np.uint8, 2, 4, 5, 6, 3), integers(np.int8, 7, 3, 2, 3, 2)
    attributes = {"pads": [0] * 6, "strides": [1, 2, 1], "dilations": [1, 1, 2], "layout": "channels_last"}
    region = make_region("ConvInteger", [(x.shape, np.uint8), w, np.array(9, np.uint8)], attributes)
    lowered = schedules.schedule(region, HOST)
    assert lowered is not None and any("copy_rows" in made.kernel.name for made in lowered.kernel_calls)
    (found,) = run(region, lowered, HOST, [x, w, np.array(9, np.uint8)])
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.int64) - 9, (2, 3, 3), axis=(1, 2, 3))
    wanted = np.einsum("ndhwcjkl,fcjkl->ndhwf", windows[:, :, ::2, :, :, :, :, ::2], w.astype(np.int64))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("channels", "group"), [(514, 1), (7, 30), (50, 1), (2, 40)])
@pytest.mark.parametrize("planes", [False, True])
def test_a_copy_of_many_channels_is_a_loop(channels: int, group: int, planes: bool) -> None:
    """Its text grew with the channels: LLVM took minutes for 1,090 of them, no multiple of four."""
    x, zero = integers(np.int8, 2, 4, 5, group * channels), np.array(7, np.int8)
    w = integers(np.int8, 2 * group, channels, 3, 1)
    attributes = {"pads": [1, 0, 1, 0], "strides": [1, 1], "dilations": [1, 1], "group": group}
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("ConvInteger", ["image", "w", "zero"], ["y"], **attributes)]
            if planes
            else [
                helper.make_node("Transpose", ["image"], ["x"], perm=[0, 3, 1, 2]),
                helper.make_node("ConvInteger", ["x", "w", "zero"], ["y"], **attributes),
            ],
            "convolution",
            [helper.make_tensor_value_info("image", 3, [2, group * channels, 4, 5] if planes else x.shape)],
            [helper.make_tensor_value_info("y", 6, None)],
            [numpy_helper.from_array(w, "w"), numpy_helper.from_array(zero, "zero")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
    )
    (found,) = onnxc.compile(model, threads=1).run({"image": x.transpose(0, 3, 1, 2).copy() if planes else x}).values()
    np.testing.assert_array_equal(found, expected(x, w.astype(np.int64), 7, attributes).transpose(0, 3, 1, 2))
    region = make_region("ConvInteger", [(x.shape, np.int8), w, zero], attributes | {"layout": "channels_last"})
    lowered = integer_conv.schedule(region, HOST)
    assert lowered is not None
    assert all(str(made.kernel).count("=") < 50 for made in lowered.kernel_calls if "four_" in made.kernel.name)


@pytest.mark.parametrize("pads", [[2, 0, 1, 0], [0, 0, 0, 0]], ids=["padded", "inside"])
def test_an_image_of_one_column_is_convolved_as_one_row(pads: list[int]) -> None:
    """Whose pixels share registers (magika: 0.20 of the limit before, 0.96 so)."""
    x, w, zero = integers(np.uint8, 2, 40, 1, 8), integers(np.int8, 16, 8, 5, 1), np.array(9, np.uint8)
    attributes = {"pads": pads, "strides": [2, 1], "dilations": [1, 1], "group": 1, "layout": "channels_last"}
    region = make_region("ConvInteger", [(x.shape, np.uint8), w, zero], attributes)
    lowered = integer_conv.schedule(region, HOST)
    assert lowered is not None and any("conv1x5" in made.kernel.name for made in lowered.kernel_calls)
    (found,) = run(region, lowered, HOST, [x, w, zero])
    np.testing.assert_array_equal(found, expected(x, w.astype(np.int64), 9, attributes))
    real, weights = RANDOM.standard_normal(x.shape, np.float32), RANDOM.standard_normal(w.shape, np.float32)
    region = make_region("Conv", [(x.shape, np.float32), weights], attributes)
    lowered = conv.schedule(region, HOST)
    assert lowered is not None
    (found,) = run(region, lowered, HOST, [real, weights])
    padded = np.pad(real.astype(np.float64), ((0, 0), (pads[0], pads[2]), (0, 0), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 5, axis=1)[:, ::2]
    np.testing.assert_allclose(found, np.einsum("nhwck,fck->nhwf", windows, weights[..., 0]), rtol=1e-4, atol=1e-4)


def test_one_filter_takes_dot_products_of_a_whole_instruction() -> None:
    """Vectors of two sums have none: they were slower than floats (nmp's last layers: 5.3 ms, now 1.5)."""
    x, w, zero = integers(np.uint8, 1, 9, 11, 8), integers(np.int8, 1, 8, 5, 5), np.array(3, np.uint8)
    attributes = {"pads": [2] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1, "layout": "channels_last"}
    region = make_region("ConvInteger", [(x.shape, np.uint8), w, zero], attributes)
    lowered = integer_conv.schedule(region, HOST)
    assert lowered is not None and any(
        made.kernel.name.split("_")[-1].endswith("x1x4") for made in lowered.kernel_calls
    )
    (found,) = run(region, lowered, HOST, [x, w, zero])
    np.testing.assert_array_equal(found, expected(x, w.astype(np.int64), 3, attributes))
