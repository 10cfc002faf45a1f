"""Kernels of bytes: the steps of quantizing an element, divisions by constants, look-ups in tables of 256 bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_kernel import HOST, RUNNABLE, run_native
from onnx import helper
from onnxc.backends.cpu.build import scheduled
from onnxc.ir import loops
from onnxc.ir import scalars as s
from onnxc.ir.dtypes import BY_NAME, F32, I8, I32, U8, DType
from onnxc.ir.loops import For, Kernel, Store
from onnxc.ir.ops.quantization import saturated
from onnxc.ir.scalars import Buffer, Scalar, const, load
from onnxc.ir.target import Target
from onnxc.passes.rounding_steps import round_in_steps, size
from single_node import model_of

Element = Callable[[Scalar], Scalar]
SPECIAL = np.array(
    [
        0,
        -0.0,
        np.inf,
        -np.inf,
        3e38,
        -3e38,
        1e-45,
        -1e-45,
        1e-30,
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        -2.5,
        255.5,
        254.5,
        -128.5,
    ],
    np.float32,
)


def kernel_of(length: int, element: Element, dtype: DType, source: DType = F32) -> Kernel:
    x, y = Buffer("x", source, length), Buffer("y", dtype, length)
    index = loops.index_symbol("i", length)
    body = (For("i", length, (Store(y, index, element(load(x, index))),), "vector"),)
    return Kernel("bytes", (x, y), ("y",), (), body)


def run(x: np.ndarray, element: Element, dtype: DType, target: Target = HOST) -> np.ndarray:
    source = BY_NAME["f32"] if x.dtype == np.float32 else U8 if x.dtype == np.uint8 else I8
    out = np.zeros(x.shape, dtype.numpy)
    kernel = scheduled(kernel_of(x.size, element, dtype, source), target)
    run_native(kernel, {"x": x, "y": out}, target=target)
    return out


def expected(x: np.ndarray, scale: float, zero: int, dtype: DType) -> np.ndarray:
    low, high = dtype.limits
    with np.errstate(all="ignore"):
        return np.clip(np.rint(x / np.float32(scale)) + np.float32(zero), low, high).astype(dtype.numpy)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["u8", "i8", "u16", "i16"]),
    st.floats(2.0**-20, 2.0**20, width=32),
    st.integers(0, 255),
    st.integers(0, 99),
)
def test_a_quotient_by_a_constant_rounded(name: str, scale: float, zero: int, seed: int) -> None:
    """Near halves too, where a quotient that were not correctly rounded would show."""
    dtype = BY_NAME[name]
    zero = min(zero, int(dtype.limits[1]))
    random = np.random.default_rng(seed)
    halves = (random.integers(-300, 300, 400) + 0.5) * np.float32(scale)
    near = np.concatenate([np.nextafter(halves, towards).astype(np.float32) for towards in (halves, -np.inf, np.inf)])
    with np.errstate(over="ignore"):
        x = np.concatenate([near, SPECIAL, SPECIAL * np.float32(scale), random.standard_normal(333) * 100 * scale])
    x = x.astype(np.float32)
    found = run(x, lambda v: saturated(v / const(scale, F32), const(zero, dtype), dtype), dtype)
    np.testing.assert_array_equal(found, expected(x, scale, zero, dtype))


@pytest.mark.parametrize("target", RUNNABLE, ids=str)
@pytest.mark.parametrize("name", ["u8", "i8"])
def test_the_same_on_every_target(target: Target, name: str) -> None:
    dtype = BY_NAME[name]
    x = np.concatenate([SPECIAL, np.random.default_rng(1).standard_normal(1001).astype(np.float32) * 3])
    for scale in (0.0173, 3e-25):
        found = run(x, lambda v, c=scale: saturated(v / const(c, F32), const(5, dtype), dtype), dtype, target)  # type: ignore[misc]
        np.testing.assert_array_equal(found, expected(x, scale, 5, dtype))


def test_nan_is_the_lowest_value() -> None:
    """As in ONNX Runtime."""
    x = np.full(37, np.nan, np.float32)
    for dtype in (U8, I8):
        found = run(x, lambda v, t=dtype: saturated(v / const(0.1, F32), const(3, t), t), dtype)  # type: ignore[misc]
        np.testing.assert_array_equal(found, np.full(37, dtype.limits[0]))


def test_a_scale_and_a_zero_point_that_come_at_run_time() -> None:
    x = np.random.default_rng(2).standard_normal(131).astype(np.float32)
    given_ = {"x": x, "scale": np.array([0.031], np.float32), "zero": np.array([77], np.uint8)}
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    (found,) = onnxc.compile(model_of([node], given_, {}, ["y"])).run(given_).values()
    np.testing.assert_array_equal(found, expected(x, 0.031, 77, U8))


@pytest.mark.parametrize("target", RUNNABLE, ids=str)
def test_sums_of_two_dequantized_tensors(target: Target) -> None:
    """Their size is known, so nothing is limited before it is rounded."""
    random = np.random.default_rng(3)
    given_ = {name: random.integers(0, 256, 1003).astype(np.uint8) for name in "ab"}
    scales = {"as": 0.0173, "bs": 0.0273, "ys": 0.0373}
    zeros = {"az": 121, "bz": 111, "yz": 101}
    constants = {n: np.array(v, np.float32) for n, v in scales.items()}
    constants |= {n: np.array(v, np.uint8) for n, v in zeros.items()}
    nodes = [helper.make_node("DequantizeLinear", [n, n + "s", n + "z"], [n + "f"]) for n in "ab"]
    nodes += [
        helper.make_node("Add", ["af", "bf"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["y"]),
    ]
    (found,) = onnxc.compile(model_of(nodes, given_, constants, ["y"]), target=target).run(given_).values()
    a, b = ((given_[n].astype(np.float32) - zeros[n + "z"]) * constants[n + "s"] for n in "ab")
    np.testing.assert_array_equal(found, expected(a + b, 0.0373, 101, U8))


@pytest.mark.parametrize("shape", [(1, 5, 7, 37), (2, 11, 3, 16)])
def test_means_of_bytes_are_the_same_on_every_target(shape: tuple[int, ...]) -> None:
    """Nothing is multiplied and added with one rounding, and channels are added in one order."""
    given_ = {"x": np.random.default_rng(4).integers(0, 256, shape).astype(np.uint8)}
    constants = {"s": np.array(0.0173, np.float32), "z": np.array(121, np.uint8), "axes": np.array([1, 2])}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["f"]),
        helper.make_node("ReduceMean", ["f", "axes"], ["y"]),
    ]
    model = model_of(nodes, given_, constants, ["y"])
    found = [onnxc.compile(model, target=target).run(given_)["y"] for target in RUNNABLE]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_nothing_is_divided_where_there_are_fused_multiply_adds() -> None:
    kernel = kernel_of(64, lambda v: saturated(v / const(0.1, F32), const(3, U8), U8), U8)
    fast, plain = (str(round_in_steps(kernel, fma)) for fma in (True, False))
    assert "fma(" in fast and " / " not in fast and "round" not in fast
    assert "fma(" not in plain and " / " in plain and "round" not in plain
    by_zero = kernel_of(64, lambda v: saturated(v / const(0.0, F32), const(3, U8), U8), U8)
    assert " / 0.0" in str(round_in_steps(by_zero, True))


def test_what_is_known_of_sizes() -> None:
    byte, real = load(Buffer("b", U8, 1), 0), load(Buffer("f", F32, 1), 0)
    centred = s.cast(s.cast(byte, I32) - const(121, I32), F32) * const(0.5, F32)
    assert size(centred) == (255 + 121) * 0.5
    assert size(centred + centred) == 376 and size(centred / const(2.0, F32)) == 94
    assert size(real) == size(centred * real) == size(centred / real) == np.inf


@pytest.mark.parametrize("target", RUNNABLE, ids=str)
@pytest.mark.parametrize(
    ("length", "index", "entry"), [(199, np.uint8, np.int8), (33, np.int8, np.uint8), (7, np.uint8, np.uint8)]
)
def test_look_ups(target: Target, index: Any, entry: Any, length: int) -> None:
    random = np.random.default_rng(length)
    table = random.permutation(256).astype(np.uint8).view(entry)
    x = random.integers(0, 256, length).astype(np.uint8).view(index)
    nodes = [
        helper.make_node("Cast", ["x"], ["byte"], to=int(helper.np_dtype_to_tensor_dtype(np.dtype(np.uint8)))),
        helper.make_node("Cast", ["byte"], ["index"], to=int(helper.np_dtype_to_tensor_dtype(np.dtype(np.int32)))),
        helper.make_node("Gather", ["table", "index"], ["y"]),
    ]
    executable = onnxc.compile(model_of(nodes, {"x": x}, {"table": table}, ["y"]), target=target)
    (found,) = executable.run({"x": x}).values()
    np.testing.assert_array_equal(found, table[x.view(np.uint8)])


def test_look_ups_among_other_arithmetic() -> None:
    """In as many lanes as the reals take."""
    random = np.random.default_rng(0)
    table, x = random.integers(0, 256, 256).astype(np.uint8), random.integers(0, 256, 83).astype(np.uint8)
    nodes = [
        helper.make_node("Cast", ["x"], ["index"], to=int(helper.np_dtype_to_tensor_dtype(np.dtype(np.int32)))),
        helper.make_node("Gather", ["table", "index"], ["t"]),
        helper.make_node("Cast", ["t"], ["f"], to=int(helper.np_dtype_to_tensor_dtype(np.dtype(np.float32)))),
        helper.make_node("Sqrt", ["f"], ["y"]),
    ]
    (found,) = onnxc.compile(model_of(nodes, {"x": x}, {"table": table}, ["y"])).run({"x": x}).values()
    np.testing.assert_array_equal(found, np.sqrt(table[x].astype(np.float32)))
