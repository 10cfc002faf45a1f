"""Complex numbers in kernels: arithmetic on their parts against numpy, and movement of whole numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxc
import pytest
from gpu import emulated_gpu
from native_kernel import run_native
from onnx import helper
from onnxc.ir import loops as k
from onnxc.ir import scalars as s
from onnxc.ir.dims import symbol
from onnxc.ir.dtypes import BOOL, C64, C128, F32, F64, U64, DType
from onnxc.ir.errors import UnsupportedError
from onnxc.ir.scalars import Buffer, Scalar, load
from onnxc.passes.complex_types import without_complex_types
from onnxc.passes.narrow_types import without_narrow_types
from single_node import assert_equal, compiled, model_of, reference

Array = np.ndarray[Any, Any]
COUNT = 37
RNG = np.random.default_rng(8)
OPERATIONS: dict[str, tuple[Callable[[Scalar, Scalar], Scalar], Callable[[Array, Array], Array]]] = {
    "add": (lambda a, b: a + b, np.add),
    "sub": (lambda a, b: a - b, np.subtract),
    "mul": (lambda a, b: a * b, np.multiply),
    "div": (lambda a, b: a / b, np.divide),
    "neg": (lambda a, b: -a, lambda a, b: -a),
    "fma": (lambda a, b: s.fma(a, b, a), lambda a, b: a * b + a),
    "max": (lambda a, b: s.binary("max", a, b), np.maximum),
    "min": (lambda a, b: s.binary("min", a, b), np.minimum),
    "scaled": (lambda a, b: a * s.cast(s.const(2.5, F32), a.dtype), lambda a, b: a * 2.5),
    "select": (lambda a, b: s.select(a < b, a, b), lambda a, b: np.where(a < b, a, b)),
    "equal": (lambda a, b: a.equal(b), np.equal),
    "unequal": (lambda a, b: s.binary("ne", a, b), np.not_equal),
    "less": (lambda a, b: a < b, np.less),
    "less or equal": (lambda a, b: a <= b, np.less_equal),
    "is NaN": (lambda a, b: s.unary("isnan", a), lambda a, b: np.isnan(a)),
    "is not zero": (lambda a, b: s.cast(a, BOOL), lambda a, b: a != 0),
}


def kernel_of(dtype: DType, element: Callable[[Scalar, Scalar], Scalar], in_place: bool = False) -> k.Kernel:
    """y[i] = element(a[i], b[i]); with `in_place` a[i] instead."""
    i = symbol("i", 0, COUNT - 1)
    a, b = Buffer("a", dtype, COUNT), Buffer("b", dtype, COUNT)
    value = element(load(a, i), load(b, i))
    y = a if in_place else Buffer("y", value.dtype, COUNT)
    body = (k.For("i", COUNT, (k.Store(y, i, value),)),)
    return k.Kernel(
        "complex", (a, b) if in_place else (a, b, y), (y.name,), (), body, aliases=(("a", "y"),) * (not in_place)
    )


def numbers(dtype: DType, zeros: bool = False) -> Array:
    """Small whole numbers, equal ones among them: all that is computed of them is exact."""
    real, imaginary = RNG.integers(-3, 3, (2, COUNT)) if zeros else RNG.integers(1, 4, (2, COUNT))
    return np.asarray(real + 1j * imaginary).astype(dtype.numpy)


def run(kernel: k.Kernel, arrays: dict[str, Array]) -> dict[str, Array]:
    lowered = without_narrow_types(without_complex_types(kernel))
    held = {
        p.name: arrays[p.name].view(p.dtype.numpy) if p.dtype != BOOL else arrays[p.name] for p in lowered.parameters
    }
    run_native(lowered, held)
    return arrays


@pytest.mark.parametrize("dtype", [C64, C128], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_arithmetic(name: str, dtype: DType) -> None:
    element, expected = OPERATIONS[name]
    a, b = numbers(dtype, zeros=True), numbers(dtype)
    if name == "is NaN":
        a[3], a[5] = complex(np.nan, 1), complex(1, np.nan)
    kernel = kernel_of(dtype, element)
    wanted = expected(a, b)
    found = run(kernel, {"a": a, "b": b, "y": np.zeros(COUNT, kernel.parameters[2].dtype.numpy)})["y"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert without_complex_types(kernel).aliases == (), "a part may not be overwritten while the other one waits"


def test_a_number_that_replaces_its_operand() -> None:
    """Both parts are computed before the first one is stored."""
    a, b = numbers(C64, zeros=True), numbers(C64)
    wanted = a * b
    found = run(kernel_of(C64, lambda a, b: a * b, in_place=True), {"a": a, "b": b})["a"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_what_only_moves_is_moved_whole() -> None:
    """Numbers of 64 bits: no part is looked at."""
    moved = without_narrow_types(without_complex_types(kernel_of(C64, lambda a, b: a)))
    assert {parameter.dtype for parameter in moved.parameters} == {U64} and moved.aliases == (("a", "y"),)
    split = without_narrow_types(without_complex_types(kernel_of(C128, lambda a, b: a)))
    assert {parameter.dtype for parameter in split.parameters} == {F64}


def test_bits_of_complex_numbers() -> None:
    a = numbers(C64)
    kernel = kernel_of(C64, lambda a, b: s.bitcast(s.bitcast(a, F64), C64) + b)
    found = run(kernel, {"a": a, "b": a * 0, "y": a * 0})["y"]
    np.testing.assert_array_equal(found, a)


def test_what_complex_numbers_do_not_have_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="exp of complex numbers"):
        without_complex_types(kernel_of(C64, lambda a, b: s.unary("exp", a)))


def chain(dtype: DType) -> tuple[Any, dict[str, Array]]:
    """Operators that move complex numbers, fused with each other as they come."""
    x = (RNG.normal(size=(4, 6)) + 1j * RNG.normal(size=(4, 6))).astype(dtype.numpy)
    inputs = {
        "x": x,
        "indices": np.array([3, 0, 2]),
        "pads": np.array([1, 0, 0, 2]),
        "fill": np.array(7 - 1j, dtype.numpy),
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("Gather", ["t", "indices"], ["g"], axis=0),
        helper.make_node("Pad", ["g", "pads", "fill"], ["p"]),
        helper.make_node("Concat", ["p", "p"], ["c"], axis=1),
        helper.make_node("ScatterElements", ["x", "rows", "x"], ["e"], axis=0, reduction="mul"),
        helper.make_node("Unique", ["x"], ["u", "first", "inverse", "counts"]),
    ]
    inputs["rows"] = RNG.integers(0, 4, (4, 6))
    constants = {name: inputs.pop(name) for name in ("pads",)}
    return model_of(nodes, inputs, constants, ["c", "e", "u", "inverse", "counts"], opset=28), inputs


@pytest.mark.parametrize("dtype", [C64, C128], ids=str)
def test_operators_on_both_targets(dtype: DType) -> None:
    model, inputs = chain(dtype)
    found, wanted = compiled(model, inputs), reference(model, inputs)
    assert_equal([found[0], *found[2:]], [wanted[0], *wanted[2:]])
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5)
    with emulated_gpu():
        on_gpu = list(onnxc.compile(model, target="cuda").run(inputs).values())
    assert_equal([on_gpu[0], *on_gpu[2:]], [wanted[0], *wanted[2:]])
    np.testing.assert_allclose(on_gpu[1], wanted[1], rtol=1e-5)
