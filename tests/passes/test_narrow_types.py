"""Types narrower than a byte and floats of a byte: every value there is, converted by compiled kernels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnxc
import pytest
from gpu import emulated_gpu
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxc.compiler.driver import compiled_model
from onnxc.compiler.options import Options
from onnxc.ir.dtypes import ALL, BF16, BOOL, BY_NAME, F16, F32, F64, I8, I16, I32, I64, U8, U32, DType
from onnxc.passes.narrow_types import FORMATS

Array = np.ndarray[Any, np.dtype[Any]]
FLOATS = [BY_NAME[name] for name in FORMATS]
INTEGERS = [dtype for dtype in ALL if dtype.is_integer and dtype.bits < 8]
WIDE = (F32, F16, BF16, F64, I8, U8, I32, I64, BOOL)


def converting(conversions: Sequence[tuple[DType, DType, Mapping[str, Any]]]) -> Any:
    """A model of Casts: output k is input `x_<source>` converted; all inputs are vectors."""
    sources = dict.fromkeys(source for source, _, _ in conversions)
    nodes = [
        helper.make_node("Cast", [f"x_{source}"], [f"y{k}"], to=wanted.onnx, **attributes)
        for k, (source, wanted, attributes) in enumerate(conversions)
    ]
    inputs = [helper.make_tensor_value_info(f"x_{source}", source.onnx, [f"n_{source}"]) for source in sources]
    outputs = [helper.make_tensor_value_info(f"y{k}", w.onnx, None) for k, (_, w, _) in enumerate(conversions)]
    graph = helper.make_graph(nodes, "casts", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 28)], ir_version=14)


def bits(dtype: DType) -> Array:
    """Every value of a narrow type."""
    return np.arange(1 << dtype.bits, dtype=np.uint8).view(dtype.numpy)


def assert_same(found: Array, wanted: Array) -> None:
    """Equal in every bit, but for which NaN it is."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    same = found.reshape(-1).view(np.uint8).reshape(found.size, -1) == wanted.view(np.uint8).reshape(found.size, -1)
    equal = same.all(axis=1)
    if wanted.dtype.kind not in "biu":
        equal |= np.isnan(found.astype(np.float64)) & np.isnan(wanted.astype(np.float64))
    assert equal.all(), [(int(i), found[i], wanted[i]) for i in np.flatnonzero(~equal)[:5]]


def around_ties(dtype: DType, source: DType) -> Array:
    """Every number of a narrow float, the means of neighbours, what the source has beside them, and large ones."""
    values = np.unique(bits(dtype).astype(np.float64))
    values = values[np.isfinite(values)]
    last = values[-1] + (values[-1] - values[-2])  # what would come next, if there were room
    values = np.concatenate([values, [last, 1e5, 1e30, np.inf, np.nan]])
    ties = (values[1:-4] + values[:-5]) / 2
    both = np.concatenate([values, ties, -values, -ties]).astype(source.numpy)
    if source in (F32, F64):
        both = np.concatenate([both, np.nextafter(both, -np.inf), np.nextafter(both, np.inf)])
    return both


def odd_singles(array: Array) -> Array:
    """f64 as f32, rounded to odd where it is not one: what is rounded again then is rounded once. (ml_dtypes rounds f64
    to f32, half to even, and then again.)"""
    nearest = array.astype(np.float32)
    if array.dtype == np.float32:
        return nearest
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(array)
    odd = (nearest.view(np.uint32) - beyond) | 1
    exact = np.isnan(array) | (nearest == array)
    return np.where(exact, nearest, odd.astype(np.uint32).view(np.float32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_half_converted_to_floats_of_few_bits(dtype: DType) -> None:
    halves = {F16: np.arange(1 << 16, dtype=np.uint16).view(np.float16)}
    halves[BF16] = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    cases = [(source, dtype, {"saturate": saturate}) for source in halves for saturate in (0, 1)]
    found = onnxc.compile(converting(cases)).run({f"x_{source}": array for source, array in halves.items()})
    for result, (source, _, attributes) in zip(found.values(), cases, strict=True):
        wide = halves[source].astype(np.float32)
        with np.errstate(invalid="ignore"):
            saturates = attributes["saturate"] and dtype.bits == 8
            wanted = numpy_helper.saturate_cast(wide, dtype.numpy) if saturates else wide.astype(dtype.numpy)
        assert_same(result, wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ties_and_their_neighbours_in_wide_floats(dtype: DType) -> None:
    given = {source: around_ties(dtype, source) for source in (F32, F64)}
    cases = [(source, dtype, {"saturate": saturate}) for source in given for saturate in (0, 1)]
    found = onnxc.compile(converting(cases)).run({f"x_{source}": array for source, array in given.items()})
    for result, (source, _, attributes) in zip(found.values(), cases, strict=True):
        with np.errstate(all="ignore"):
            saturates = attributes["saturate"] and dtype.bits == 8
            wanted = (numpy_helper.saturate_cast if saturates else np.ndarray.astype)(
                odd_singles(given[source]), dtype.numpy
            )
        assert_same(result, wanted)


@pytest.mark.parametrize("dtype", [*FLOATS, BY_NAME["f8e8m0"]], ids=str)
def test_every_float_of_few_bits_converted_to_wide_types(dtype: DType) -> None:
    cases = [(dtype, wanted, {}) for wanted in WIDE]
    found = onnxc.compile(converting(cases)).run({f"x_{dtype}": bits(dtype)})
    exact = bits(dtype).astype(np.float64)
    for result, (_, wanted, _) in zip(found.values(), cases, strict=True):
        low, high = wanted.limits
        with np.errstate(all="ignore"):
            inside = (exact > low - 1) & (exact < high + 1) if wanted.is_integer else np.ones(exact.shape, bool)
            assert_same(result[inside], exact.astype(wanted.numpy)[inside])


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_of_few_bits(dtype: DType) -> None:
    """Every value to wide types; wide integers lose their high bits."""
    given = {I8: np.arange(-128, 128).astype(np.int8), I16: np.arange(-(1 << 15), 1 << 15).astype(np.int16)}
    given |= {
        U32: np.arange(300).astype(np.uint32) * 14316557,
        F32: np.arange(*map(int, dtype.limits)).astype(np.float32),
    }
    given |= {dtype: bits(dtype), BOOL: np.array([False, True])}
    cases = [(source, dtype, {}) for source in given if source != dtype] + [(dtype, wanted, {}) for wanted in WIDE]
    found = onnxc.compile(converting(cases)).run({f"x_{source}": array for source, array in given.items()})
    for result, (source, wanted, _) in zip(found.values(), cases, strict=True):
        assert_same(result, given[source].astype(wanted.numpy))


def test_what_else_the_bytes_of_narrow_integers_hold_does_not_matter() -> None:
    """ml_dtypes keeps an int4 in four bits of its byte; who fills all eight means the same."""
    cases = [(dtype, F32, {}) for dtype in INTEGERS]
    given = {f"x_{dtype}": np.arange(256, dtype=np.uint8) for dtype in INTEGERS}
    found = onnxc.compile(converting(cases)).run(
        {name: array.view(BY_NAME[name[2:]].numpy) for name, array in given.items()}
    )
    for dtype, result in zip(INTEGERS, found.values(), strict=True):
        low = np.arange(256) % (1 << dtype.bits)
        sign = (low >> (dtype.bits - 1)) * (dtype.kind == "int")
        np.testing.assert_array_equal(result, low - (sign << dtype.bits))


@pytest.mark.parametrize("round_mode", ["up", "down", "nearest"])
@pytest.mark.parametrize("saturate", [0, 1])
def test_exponents_alone(round_mode: str, saturate: int) -> None:
    dtype = BY_NAME["f8e8m0"]
    patterns = np.arange(0, 1 << 31, (1 << 31) // 65521, dtype=np.uint32)
    powers = np.concatenate([(np.arange(255, dtype=np.uint32) << 23) + d for d in (0, 1, 0x3FFFFF, 0x400000, 0x400001)])
    given = np.concatenate([patterns, powers]).view(np.float32)
    found = onnxc.compile(converting([(F32, dtype, {"round_mode": round_mode, "saturate": saturate})]))(given)
    assert_same(found, numpy_helper.to_float8e8m0(given, bool(saturate), round_mode).astype(dtype.numpy))


def test_between_narrow_types() -> None:
    """Through f32, which holds every value of both; what has no sign or no NaN is left out."""
    cases = [(a, b, {"saturate": 0}) for a in FLOATS[:4] for b in FLOATS[:4] if a != b]
    found = onnxc.compile(converting(cases)).run({f"x_{dtype}": bits(dtype) for dtype in FLOATS[:4]})
    for result, (a, b, _) in zip(found.values(), cases, strict=True):
        with np.errstate(all="ignore"):
            assert_same(result, bits(a).astype(np.float32).astype(b.numpy))


def test_the_same_on_a_gpu() -> None:
    cases: list[tuple[DType, DType, Mapping[str, Any]]] = [(F32, d, {"saturate": k % 2}) for k, d in enumerate(FLOATS)]
    cases += [(d, F32, {}) for d in (*FLOATS, *INTEGERS, BY_NAME["f8e8m0"])] + [(F32, d, {}) for d in INTEGERS]
    model = converting(cases)
    inputs = {f"x_{d}": bits(d) for d in (*FLOATS, *INTEGERS, BY_NAME["f8e8m0"])}
    inputs["x_f32"] = np.concatenate([around_ties(FLOATS[0], F32), around_ties(FLOATS[2], F32)])
    inputs["x_f32"] = inputs["x_f32"][np.abs(inputs["x_f32"]) < 1e9]
    wanted = onnxc.compile(model).run(inputs)
    with emulated_gpu():
        found = onnxc.compile(model, target="cuda").run(inputs)
    for name, array in wanted.items():
        assert_same(found[name], array)


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4", "aarch64"])
def test_conversions_are_vectors(target: str) -> None:
    """The loop over whole vectors converts no element by itself, and looks nothing up."""
    for source, wanted in ((F32, BY_NAME["f8e4m3fn"]), (BY_NAME["f8e5m2"], F32), (BY_NAME["i4"], F32)):
        text = compiled_model(converting([(source, wanted, {})]), Options(target=target)).dump("llvm")
        loop = max(
            re.findall(r"\n[\w.]+:\n(?:  .*\n)+", text), key=lambda block: len(re.findall(r"<\d+ x \w+>", block))
        )
        arithmetic = re.findall(
            r"= (?:and|or|xor|lshr|shl|fadd|fsub|select|trunc|zext|sitofp|uitofp) (?!i64)(\S+)", loop
        )
        assert len(arithmetic) > 2 and all(kind.startswith("<") for kind in arithmetic), (source, wanted, arithmetic)


def test_the_reference_agrees_where_it_has_an_opinion() -> None:
    """A cast of ONNX's own, with what is beyond the range."""
    x = np.array([0, -0.0, 1e9, -1e9, np.inf, -np.inf, np.nan, 448, 464, 465, 57344, 61440, 61441], np.float32)
    cases = [(F32, dtype, {"saturate": saturate}) for dtype in FLOATS[:4] for saturate in (0, 1)]
    model = converting(cases)
    with np.errstate(all="ignore"):
        wanted = ReferenceEvaluator(model).run(None, {"x_f32": x})
    for found, array in zip(onnxc.compile(model).run({"x_f32": x}).values(), wanted, strict=True):
        assert_same(found, array)
