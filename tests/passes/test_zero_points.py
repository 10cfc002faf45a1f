"""Products of integers whose zero points are taken out of them: the same sums, whatever is known when."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnxc.compiler.driver import compile_model
from onnxc.compiler.options import Options
from onnxc.ir.target import Target
from onnxc.passes import PIPELINES
from pass_checks import agree, filecheck, parsed, transformed
from single_node import model_of

Example = tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray]
PIPELINE = PIPELINES["cuda"]
RANDOM = np.random.default_rng(5)


def bytes_of(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    info = np.iinfo(dtype)
    return RANDOM.integers(info.min, info.max + 1, shape).astype(dtype)


def test_weights_take_their_zero_points_in_and_their_sums_are_constant() -> None:
    graph = parsed(
        """
        graph @g(%x: u8[n, 8]) -> (%y: i32[n, 4]) {
          %w = Constant() {value=@w} : u8[8, 4]
          %zx = Constant() {value=@zx} : u8[]
          %zw = Constant() {value=@zw} : u8[4]
          %y = MatMulInteger(%x, %w, %zx, %zw) : i32[n, 4]
        }
        """,
        {
            "w": np.arange(96, 128, dtype=np.uint8).reshape(8, 4),
            "zx": np.array(3, np.uint8),
            "zw": np.array([100, 101, 120, 130], np.uint8),
        },
    )
    after = transformed("zero-points,fold,cleanup", graph)
    agree(graph, after)
    filecheck(
        """
        // CHECK: %y.weights = constant {{.*}} : i8[8, 4]
        // CHECK: %y.mul = constant {{.*}} : i32[4]
        // CHECK: %y.bytes = MatMulInteger(%x, %y.weights)
        // CHECK: %y = Sub(%y.bytes, %y.mul)
        """,
        str(after),
    )


def test_an_image_is_surrounded_by_its_zero_point() -> None:
    graph = parsed(
        """
        graph @g(%x: u8[n, 2, 5, 5]) -> (%y: i32[n, 3, 3, 3]) {
          %w = Constant() {value=@w} : i8[3, 2, 3, 3]
          %zx = Constant() {value=@zx} : u8[]
          %y = ConvInteger(%x, %w, %zx) {pads=[1, 1, 1, 1], strides=[2, 2]} : i32[n, 3, 3, 3]
        }
        """,
        {"w": bytes_of(3, 2, 3, 3, dtype=np.int8), "zx": np.array(7, np.uint8)},
    )
    after = transformed(PIPELINE, graph)
    agree(graph, after)
    filecheck(
        """
        // CHECK: Pad(
        // CHECK: ConvInteger({{[^,]+}}, {{[^,]+}}) {{.*}}strides = [2, 2]
        // CHECK: Sub
        """,
        str(after),
    )


def test_an_image_whose_zero_point_is_0_is_convolved_as_it_is() -> None:
    graph = parsed(
        """
        graph @g(%x: u8[1, 2, 5, 5]) -> (%y: i32[1, 3, 5, 5]) {
          %w = Constant() {value=@w} : i8[3, 2, 3, 3]
          %zx = Constant() {value=@zx} : u8[]
          %y = ConvInteger(%x, %w, %zx) {pads=[1, 1, 1, 1]} : i32[1, 3, 5, 5]
        }
        """,
        {"w": bytes_of(3, 2, 3, 3, dtype=np.int8), "zx": np.array(0, np.uint8)},
    )
    after = transformed("zero-points,cleanup", graph)
    agree(graph, after)
    filecheck("// CHECK: %y = ConvInteger(%x, %w) {", str(after))
    assert "Pad(" not in str(after) and "Sub(" not in str(after)


@st.composite
def products(draw: st.DrawFn) -> Example:
    """A MatMulInteger with zero points of every form, its inputs, and the result by sums of i64."""
    rows, depth, columns = (draw(st.integers(1, 9)) for _ in range(3))
    batch = draw(st.sampled_from([(), (2,)]))
    types = [draw(st.sampled_from([np.uint8, np.int8])) for _ in range(2)]
    shared = draw(st.booleans())
    a, b = (
        bytes_of(*batch, rows, depth, dtype=types[0]),
        bytes_of(*(() if shared else batch), depth, columns, dtype=types[1]),
    )
    za = draw(st.sampled_from([None, (), (1,), (rows,)]))
    zb = draw(st.sampled_from([None, (), (1,), (columns,)]))
    inputs: dict[str, np.ndarray] = {"a": a}
    constants: dict[str, np.ndarray] = {}
    (constants if draw(st.booleans()) else inputs)["b"] = b
    shifted = [a.astype(np.int64), b.astype(np.int64)]
    names = ["a", "b", "", ""]
    for number, (name, shape, dtype) in enumerate(zip(("za", "zb"), (za, zb), types, strict=True)):
        if shape is None:
            continue
        zero = np.zeros(shape, dtype) if draw(st.booleans()) else bytes_of(*shape, dtype=dtype)
        (constants if draw(st.booleans()) else inputs)[name] = zero
        names[2 + number] = name
        shifted[number] -= zero.reshape(-1, 1) if number == 0 and len(shape) == 1 else zero.astype(np.int64)
    while not names[-1]:
        names.pop()
    model = model_of([helper.make_node("MatMulInteger", names, ["y"])], inputs, constants, ["y"])
    return model, inputs, (shifted[0] @ shifted[1]).astype(np.int32)


@st.composite
def convolutions(draw: st.DrawFn) -> Example:
    """A ConvInteger with weights that are known, its inputs, and the result by sums of i64."""
    group, channels, filters = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kernel = [draw(st.integers(1, 3)) for _ in range(2)]
    strides, pads = [draw(st.integers(1, 2)) for _ in range(2)], [draw(st.integers(0, 2)) for _ in range(4)]
    size = [draw(st.integers(k, 7)) for k in kernel]
    types = [draw(st.sampled_from([np.uint8, np.int8])) for _ in range(2)]
    x = bytes_of(draw(st.integers(1, 2)), group * channels, *size, dtype=types[0])
    w = bytes_of(group * filters, channels, *kernel, dtype=types[1]) // draw(st.sampled_from([1, 4]))
    zero = bytes_of(*draw(st.sampled_from([(), (1,)])), dtype=types[0]) * types[0](draw(st.integers(0, 1)))
    zeros = bytes_of(*draw(st.sampled_from([(), (group * filters,)])), dtype=types[1]) // draw(st.sampled_from([1, 4]))
    wide = x.astype(np.int64) - int(zero.reshape(-1)[0])
    wide = np.pad(wide, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    windows = np.lib.stride_tricks.sliding_window_view(wide, kernel, (2, 3))[:, :, :: strides[0], :: strides[1]]
    windows = windows.reshape(len(x), group, channels, *windows.shape[2:])
    factors = (w.astype(np.int64) - zeros.reshape(-1, 1, 1, 1)).reshape(group, filters, channels, *kernel)
    wanted = np.einsum("ngchwij,gfcij->ngfhw", windows, factors)
    names = ["x", "w", "zero", *(["zeros"] if draw(st.booleans()) else [])]
    if len(names) == 3:
        wanted = np.einsum("ngchwij,gfcij->ngfhw", windows, w.astype(np.int64).reshape(factors.shape))
    node = helper.make_node("ConvInteger", names, ["y"], strides=strides, pads=pads, group=group)
    constants, inputs = {"w": w.astype(types[1]), "zeros": zeros.astype(types[1])}, {"x": x}
    (constants if draw(st.booleans()) else inputs)["zero"] = zero.astype(types[0])
    wanted = wanted.reshape(len(x), group * filters, *wanted.shape[3:]).astype(np.int32)
    return model_of([node], inputs, {n: a for n, a in constants.items() if n in names}, ["y"]), inputs, wanted


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What the model computes on this CPU, compiled by the pipeline of GPUs."""
    return list(compile_model(model, Options(Target.host(), pipeline=PIPELINE)).run(inputs).values())


@settings(max_examples=20, deadline=None)
@given(st.one_of(products(), convolutions()))
def test_any_zero_points(example: Example) -> None:
    """Run on a CPU, whose kernels the pass is not made for: it is right by itself."""
    model, inputs, wanted = example
    (found,) = run(model, inputs)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("seed", range(3))
def test_a_product_of_two_activations(seed: int) -> None:
    random = np.random.default_rng(seed)
    inputs = {
        "a": random.integers(0, 256, (2, 5, 70)).astype(np.uint8),
        "b": random.integers(-128, 128, (2, 70, 9)).astype(np.int8),
        "za": np.array(random.integers(0, 256), np.uint8),
        "zb": np.array(random.integers(-128, 128), np.int8),
    }
    model = model_of([helper.make_node("MatMulInteger", list(inputs), ["y"])], inputs, {}, ["y"])
    (found,) = run(model, inputs)
    wide = {name: array.astype(np.int64) for name, array in inputs.items()}
    np.testing.assert_array_equal(found, (wide["a"] - wide["za"]) @ (wide["b"] - wide["zb"]))
