"""Functions as arithmetic: errors measured against wider arithmetic, special cases, and the code that comes of them."""

from __future__ import annotations

import ctypes
import math
import re
from typing import Any

import ml_dtypes
import numpy as np
import onnxc
import pytest
from kernel_interpreter import MATH, Array, Interpreter
from onnx import TensorProto, helper
from onnxc.backends.cpu.jit import CodeImage
from onnxc.backends.cpu.llvm import render_kernel
from onnxc.backends.cpu.objects import assembly, compile_objects
from onnxc.ir import scalars as s
from onnxc.ir.dims import symbol
from onnxc.ir.dtypes import F32, F64, I32, of_numpy
from onnxc.ir.loops import For, Kernel, Store
from onnxc.ir.scalars import Buffer, Scalar, load
from onnxc.ir.target import Target
from onnxc.passes.math import expand_kernel, expand_math
from onnxc.passes.vectorize import Vectors, vectorize

SPECIAL = [
    0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 0.5, -0.5, 2.0, -2.0, 3.0, -3.0, 1e-45, -1e-45, 1.1754944e-38,
    3.4028235e38, -3.4028235e38, 88.72283, 88.72284, -87.33655, -103.97208, -104.0, 1.5, -1.5, 0.99999994, -0.99999994,
    16777216.0, 16777215.0, 8388609.0, -8388609.0, 128.0, -149.0, -150.0, 709.7827128933841, -745.1332191019411, 5e-324,
]  # fmt: skip
# In f64 these are built from other functions; the rest are held to 2 units in the last place.
LOOSER = {"tan": 2.6, "asin": 2.6, "acos": 2.4, "sinh": 2.8, "asinh": 2.2, "acosh": 2.2, "atanh": 2.3}


def compute(op: str, *operands: Array, fused: bool = True) -> Array:
    """The expanded function on whole arrays."""
    buffers = [Buffer(f"x{number}", of_numpy(x.dtype), len(x)) for number, x in enumerate(operands)]
    values = [load(buffer, 0, len(x)) for buffer, x in zip(buffers, operands, strict=True)]
    value = expand_math(s.unary(op, values[0]) if len(values) == 1 else s.binary(op, values[0], values[1]))
    assert not any(isinstance(part, s.Unary | s.Binary) and part.op in (*s.MATH, "pow") for part in s.walk(value))
    return Interpreter({buffer.name: x for buffer, x in zip(buffers, operands, strict=True)}, fused=fused).evaluate(
        value
    )


def errors(found: Array, exact: Array) -> Array:
    """Units in the last place between results and wider ones; infinite for a wrong NaN, infinity or sign of zero."""
    dtype = found.dtype
    with np.errstate(all="ignore"):
        nearest = exact.astype(dtype)
        unit = np.spacing(np.maximum(np.abs(nearest), np.finfo(dtype).tiny)).astype(exact.dtype)
        distance = (np.abs(found.astype(exact.dtype) - exact) / unit).astype(np.float64)
    special = ~np.isfinite(nearest) | ~np.isfinite(found) | (nearest == 0) & (found == 0)
    right = (np.isnan(found) & np.isnan(nearest)) | (found == nearest) & (np.signbit(found) == np.signbit(nearest))
    return np.where(special, np.where(right, 0.0, np.inf), distance)


def all_bit_patterns(count: int) -> Array:
    """f32 numbers of every exponent and sign, and the special ones."""
    bits = np.arange(count, dtype=np.uint64) * (2**32 // count) + np.arange(count, dtype=np.uint64) % 4093
    with np.errstate(over="ignore"):
        return np.concatenate([bits.astype(np.uint32).view(np.float32), np.array(SPECIAL).astype(np.float32)])


def worst(found: Array, exact: Array, *operands: Array) -> tuple[float, str]:
    all_errors = errors(found, exact)
    at = int(np.argmax(all_errors))
    return float(all_errors[at]), f"{[float(x[at]) for x in operands]}: {found[at]!r}, exact {exact[at]!r}"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("op", s.MATH)
def test_f32_is_within_two_units_everywhere(op: str, fused: bool) -> None:
    x = all_bit_patterns(2**20)
    with np.errstate(all="ignore"):
        exact = MATH[op](x.astype(np.float64))
    error, where = worst(compute(op, x, fused=fused), exact, x)
    assert error <= 2, where


@pytest.mark.parametrize("fused", [True, False])
def test_sigmoid_where_it_bends(fused: bool) -> None:
    x = np.linspace(-20, 20, 1 << 20).astype(np.float32)
    error, where = worst(compute("sigmoid", x, fused=fused), MATH["sigmoid"](x.astype(np.float64)), x)
    assert error <= 2, where


def test_sigmoid_in_machine_code() -> None:
    x = np.concatenate([all_bit_patterns(2**18), np.linspace(-20, 20, 1 << 18).astype(np.float32)])
    node = helper.make_node("Sigmoid", ["x"], ["y"])
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(x)]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", ports[:1], ports[1:]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    with np.errstate(all="ignore"):
        exact = MATH["sigmoid"](x.astype(np.float64))
    error, where = worst(onnxc.compile(model)(x), exact, x)
    assert error <= 2, where


def doubles(count: int) -> Array:
    random = np.random.default_rng(3)
    parts: list[Any] = [
        random.integers(0, 2**64, count, dtype=np.uint64).view(np.float64),
        np.exp(random.uniform(-40, 7, count)) * random.choice([1, -1], count),
        random.uniform(-3, 3, count),
        random.uniform(-745, 710, count),
        SPECIAL,
    ]
    return np.concatenate(parts)


def wide(op: str, x: Array) -> Array:
    """The function in numpy's longest float."""
    with np.errstate(all="ignore"):
        long = x.astype(np.longdouble)
        if op == "sigmoid":
            small = np.exp(-np.abs(long))
            return np.where(long < 0, small, np.longdouble(1)) / (1 + small)
        return np.asarray(MATH[op](long))


@pytest.mark.skipif(np.finfo(np.longdouble).nmant <= 52, reason="no float here is longer than f64")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("op", [op for op in s.MATH if op != "erf"])
def test_f64(op: str, fused: bool) -> None:
    x = doubles(20000)
    error, where = worst(compute(op, x, fused=fused), wide(op, x), x)
    assert error <= LOOSER.get(op, 2), where


@pytest.mark.parametrize("fused", [True, False])
def test_f64_erf(fused: bool) -> None:
    """Against the C library's, which may be wrong by one unit itself."""
    x = doubles(20000)
    with np.errstate(all="ignore"):
        expected = MATH["erf"](x)
    error, where = worst(compute("erf", x, fused=fused), expected, x)
    assert error <= 2, where


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("op", ["exp", "tanh", "erf", "sigmoid", "log", "sin"])
def test_narrow_floats_are_those_of_f32_rounded(op: str, dtype: Any) -> None:
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(all="ignore"):
        nearest = MATH[op](x.astype(np.float64)).astype(np.float32).astype(dtype)
    found = compute(op, x)
    number = ~np.isnan(nearest)
    assert np.isnan(found[~number]).all()
    steps = np.abs(found[number].view(np.int16).astype(np.int32) - nearest[number].view(np.int16))
    assert steps.max() <= 1
    assert np.mean(steps) < 0.001


def power_operands(dtype: Any) -> tuple[Array, Array]:
    random = np.random.default_rng(5)
    count = 20000
    bases = [
        np.exp(random.uniform(-80, 80, count)),
        np.exp(random.uniform(-3, 3, count)) * random.choice([1, -1], count),
        random.uniform(0.99, 1.01, count),
        np.repeat(SPECIAL, len(SPECIAL)),
    ]
    exponents = [
        random.uniform(-3, 3, count),
        random.integers(-50, 50, count).astype(np.float64),
        random.uniform(-9000, 9000, count),
        np.tile(SPECIAL, len(SPECIAL)),
    ]
    with np.errstate(over="ignore"):
        return np.concatenate(bases).astype(dtype), np.concatenate(exponents).astype(dtype)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pow(dtype: Any, fused: bool) -> None:
    if dtype == np.float64 and np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("no float here is longer than f64")
    x, y = power_operands(dtype)
    with np.errstate(all="ignore"):
        exact = np.power(x.astype(np.longdouble), y.astype(np.longdouble))
    error, where = worst(compute("pow", x, y, fused=fused), exact, x, y)
    assert error <= 2, where


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.0, 4.0, 7.0, -1.0, -2.0, 0.5, -0.5, 0.75, math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pow_by_a_constant(dtype: Any, exponent: float) -> None:
    x = all_bit_patterns(2**14) if dtype == np.float32 else doubles(3000)
    buffer = Buffer("x", of_numpy(x.dtype), len(x))
    value = expand_math(s.binary("pow", load(buffer, 0, len(x)), s.const(exponent, buffer.dtype)))
    found = Interpreter({"x": x}).evaluate(value)
    with np.errstate(all="ignore"):
        exact = np.power(x.astype(np.longdouble), np.longdouble(exponent))
    error, where = worst(found, exact, x)
    assert error <= 2, where
    if exponent in (2.0, 0.5):
        assert sum(1 for _ in s.walk(value)) < 12


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint32])
def test_pow_of_integers(dtype: Any) -> None:
    bases = [0, 1, 2, 3, 7, 10, 255 if dtype == np.uint8 else 1 << 15] + (
        [] if np.dtype(dtype).kind == "u" else [-1, -2, -3]
    )
    exponents = [0, 1, 2, 3, 5, 8, 31, 64, 100, 101] + ([] if np.dtype(dtype).kind == "u" else [-1, -2, -5])
    width = np.dtype(dtype).itemsize * 8

    def exact(base: int, exponent: int) -> int:
        if exponent < 0:
            return (base if exponent & 1 else 1) if base in (1, -1) else 0
        wrapped = int(pow(base, exponent)) & ((1 << width) - 1)
        return int(wrapped - (1 << width)) if np.dtype(dtype).kind == "i" and wrapped >> (width - 1) else int(wrapped)

    x, y = np.repeat(bases, len(exponents)).astype(dtype), np.tile(exponents, len(bases)).astype(dtype)
    found = compute("pow", x, y)
    np.testing.assert_array_equal(found, [exact(int(a), int(b)) for a, b in zip(x, y, strict=True)])


def test_kernels_are_expanded_in_indices_too() -> None:
    x, y = Buffer("x", F32, 16), Buffer("y", F32, 16)
    where = s.as_dim(s.cast(s.unary("exp2", load(x, 1)), I32), 0, 15)
    kernel = Kernel("k", (y, x), ("y",), (), (For("v", 16, (Store(y, symbol("v"), load(x, where)),)),))
    assert "exp2" in str(kernel)
    assert "exp2" not in str(expand_kernel(kernel))


# Compiled.


def loop_over(value: Scalar, *operands: Buffer) -> Kernel:
    """y[v] = value for v < n."""
    n = symbol("n")
    y = Buffer("y", value.dtype, n)
    return Kernel("f", (y, *operands), ("y",), ("n",), (For("v", n, (Store(y, symbol("v"), value),), "vector"),))


def rendered(value: Scalar, target: Target, *operands: Buffer) -> str:
    kernel = expand_kernel(vectorize(loop_over(value, *operands), Vectors.of(target)))
    return render_kernel(kernel, target, threaded=False)


@pytest.mark.parametrize("op", s.MATH)
def test_compiled_functions(op: str) -> None:
    target, n = Target.host(), symbol("n")
    x = all_bit_patterns(2**16 + 5)
    text = rendered(s.unary(op, load(Buffer("x", F32, n), symbol("v"))), target, Buffer("x", F32, n))
    image = CodeImage(compile_objects([("f", text)], target), ["f"], target)
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(image.address("f"))
    y = np.empty_like(x)
    call(y.ctypes.data, x.ctypes.data, len(x), 1)
    with np.errstate(all="ignore"):
        exact = MATH[op](x.astype(np.float64))
    error, where = worst(y, exact, x)
    assert error <= 2, where


@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4", "aarch64"])
@pytest.mark.parametrize("op", ["exp", "tanh", "erf", "sigmoid", "log"])
def test_hot_loops_neither_spill_nor_call(op: str, name: str) -> None:
    target, n = Target.parse(name), symbol("n")
    text = assembly(rendered(s.unary(op, load(Buffer("x", F32, n), symbol("v"))), target, Buffer("x", F32, n)), target)
    to_stack = r"%[xyz]mm\d+, -?\d*\(%r[sb]p\)" if target.architecture == "x86_64" else r"\tst[rp]\t.*\[sp"
    loops_of_text = re.split(r"\n(?=\.LBB)", text)
    vector = max(loops_of_text, key=lambda block: len(re.findall(r"zmm|ymm|\bv\d+\.4s", block)))
    assert not re.search(to_stack, vector), vector
    assert not re.search(r"\tcallq?\s|\tbl\s", text)


def test_powers_need_no_library_on_old_machines() -> None:
    target, n, v = Target.parse("x86-64"), symbol("n"), symbol("v")
    for dtype in (F32, F64):
        x, y = Buffer("x", dtype, n), Buffer("z", dtype, n)
        text = assembly(rendered(s.binary("pow", load(x, v), load(y, v)), target, x, y), target)
        assert not re.search(r"\tcallq?\s", text)


def test_functions_of_one_kernel_share_their_parts() -> None:
    """sin and cos of one argument reduce it once."""
    x = load(Buffer("x", F32, 8), 0, 8)
    both = expand_math(s.unary("sin", x) + s.unary("cos", x))
    assert sum(1 for _ in s.walk(both)) < 1.4 * sum(1 for _ in s.walk(expand_math(s.unary("sin", x))))
