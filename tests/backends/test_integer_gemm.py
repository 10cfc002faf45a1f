"""Products of bytes with sums in i32: every sign, zero point, shape and target, and the same bits on all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnxc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import run, spills
from native_kernel import HOST, RUNNABLE, kernel, run_native
from onnx.reference import ReferenceEvaluator
from onnxc.backends.cpu.build import scheduled
from onnxc.backends.cpu.kernels import integer_gemm
from onnxc.backends.cpu.llvm import render_kernel
from onnxc.backends.cpu.objects import assembly
from onnxc.ir import loops as k
from onnxc.ir import scalars as s
from onnxc.ir.dims import symbol
from onnxc.ir.dtypes import I32, U32
from onnxc.ir.functions import cast, maximum
from onnxc.ir.ops import REGISTRY
from onnxc.ir.scalars import Buffer, load
from onnxc.ir.target import Target
from onnxc.passes.regions import Region
from onnxc.tools.bench_kernels import make_region
from small_models import model_of_text

TARGETS = [target.name for target in RUNNABLE]
BYTES = (np.uint8, np.int8)
M, S, B = symbol("M"), symbol("S"), symbol("B")
DRAWN_BYTES = st.sampled_from(BYTES)


def whole(random: np.random.Generator, dtype: Any, *shape: int) -> np.ndarray:
    """Bytes of the whole range, the extremes often among them."""
    limits = np.iinfo(dtype)
    found = random.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    extreme = np.where(random.random(shape) < 0.5, limits.min, limits.max)
    return np.asarray(np.where(random.random(shape) < 0.3, extreme, found), dtype)


def check(
    region: Region, inputs: Sequence[np.ndarray], sizes: Mapping[str, int], expected: np.ndarray, target: str
) -> None:
    chosen = Target.parse(target)
    lowered = integer_gemm.schedule(region, chosen)
    assert lowered is not None and "_gemm_" in lowered.kernel_calls[-1].kernel.name
    (result,) = run(region, lowered, chosen, inputs, sizes)
    np.testing.assert_array_equal(result, expected)


def wide(array: np.ndarray, zero: Any = 0) -> np.ndarray:
    return array.astype(np.int64) - np.asarray(zero, np.int64)


# The instructions, and what stands in for them.


@pytest.mark.parametrize("name", ["dot4_u8_i8", "dot4_i8_i8", "dot4_u8_u8", "dot2_i16_i16"])
def test_dot_products_are_exact_on_every_target(name: str) -> None:
    """Also where pairs of products would saturate in 16 bits, as those of VPMADDUBSW do."""
    lanes, random = 16, np.random.default_rng(3)
    y, c = Buffer("y", I32, lanes), Buffer("c", I32, lanes)
    a, b = Buffer("a", U32, lanes), Buffer("b", U32, lanes)
    made = kernel([k.Store(y, 0, s.Call(I32, lanes, name, (load(c, 0, lanes), load(a, 0, lanes), load(b, 0, lanes))))],
                  y, c, a, b)  # fmt: skip
    types = [np.dtype(f"{part[0]}{int(part[1:]) // 8}") for part in name.split("_")[1:]]
    for _ in range(3):
        left, right = (whole(random, dtype, lanes, 4 // dtype.itemsize) for dtype in types)
        total = whole(random, np.int32, lanes)
        sums = total + (wide(left) * wide(right)).sum(axis=1)
        data = {"a": left.view(np.uint32)[:, 0], "b": right.view(np.uint32)[:, 0], "c": total}
        for target in RUNNABLE:
            found = {**data, "y": np.zeros(lanes, np.int32)}
            run_native(made, found, target=target)
            np.testing.assert_array_equal(found["y"], sums.astype(np.int32), err_msg=str(target))


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("znver4", r"vpdpbusd\s%zmm"),
        ("alderlake", r"\{vex\}\svpdpbusd\s%ymm"),
        ("skylake-avx512", r"vpmaddwd\s%zmm"),
        ("haswell", r"vpmaddwd\s%ymm"),
        ("sandybridge", r"vpmaddwd\s%xmm"),
        ("x86-64", r"pmaddwd\s%xmm"),
        ("neoverse-n1", r"\ssdot\s"),
        ("neoverse-v1", r"\susdot\s"),
    ],
)
@pytest.mark.parametrize("dtype", BYTES)
def test_the_loop_is_dot_products_in_registers(target: str, instruction: str, dtype: Any) -> None:
    chosen = Target.parse(target)
    region = make_region("MatMulInteger", [((64, 256), dtype), np.ones((256, 192), np.int8), np.array(3, dtype)])
    lowered = integer_gemm.schedule(region, chosen)
    assert lowered is not None
    *_, call = lowered.kernel_calls
    text = assembly(render_kernel(scheduled(call.kernel, chosen), chosen, threaded=False), chosen)
    loops = [block.split(":", 1)[-1] for block in re.split(r"\n(?=\.L\w+:)", text)]
    loops = [re.split(r"\n\s+(?:jne|b\.ne)\s[^\n]*\n", block)[0] for block in loops]
    instruction = instruction if target != "neoverse-v1" or dtype == np.uint8 else r"\ssdot\s"
    found = [block for block in loops if len(re.findall(instruction, block)) >= 8]
    assert found and not any(map(spills, found))


# Matrix products.


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_constant_right_operand(data: st.DataObject) -> None:
    """Zero points that leave weights in 8 bits and others, of all columns or of each; rows that only the run tells."""
    target = data.draw(st.sampled_from(TARGETS))
    m, n, depth = data.draw(st.integers(1, 20)), data.draw(st.integers(2, 70)), data.draw(st.integers(2, 70))
    left, right = data.draw(DRAWN_BYTES), data.draw(DRAWN_BYTES)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    a, w = whole(random, left, m, depth), whole(random, right, depth, n)
    zero = whole(random, left)
    zeros = whole(random, right, *data.draw(st.sampled_from([(), (n,)])))
    if data.draw(st.booleans()):
        zeros = np.full(zeros.shape, 0 if right == np.int8 else 128, right)
    residual = whole(random, np.int8, m, n)
    rows: Any = m if data.draw(st.booleans()) else M
    a_zero: Any = zero if data.draw(st.booleans()) else ((), left)
    region = make_region(
        "MatMulInteger",
        [((rows, depth), left), w, a_zero, zeros],
        extras=[((rows, n), np.int8)],
        epilogue=lambda y, r: maximum(y + cast(r, I32), 0),
    )
    expected = np.maximum(wide(a, zero) @ wide(w, zeros) + residual, 0)
    check(region, [a, w, zero, zeros, residual], {"M": m}, expected, target)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_epilogues_are_done_beside_the_next_tile(data: st.DataObject) -> None:
    """Many tiles of few steps: any number of rows, also in blocks of several threads, and any last vector."""
    chosen = replace(Target.parse(data.draw(st.sampled_from(TARGETS))), threads=data.draw(st.integers(1, 3)))
    m, n, depth = data.draw(st.integers(33, 90)), data.draw(st.integers(2, 70)), data.draw(st.integers(2, 70))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    a, w, zero = whole(random, np.uint8, m, depth), whole(random, np.int8, depth, n), whole(random, np.uint8)
    residual = whole(random, np.int8, m, n)
    region = make_region(
        "MatMulInteger",
        [((m, depth), np.uint8), w, zero],
        extras=[((m, n), np.int8)],
        epilogue=lambda y, r: maximum(y + cast(r, I32), 0),
    )
    lowered = integer_gemm.schedule(region, chosen)
    assert lowered is not None
    (result,) = run(region, lowered, chosen, [a, w, zero, residual], {})
    np.testing.assert_array_equal(result, np.maximum(wide(a, zero) @ wide(w) + residual, 0))


@pytest.mark.parametrize(("rows", "later"), [(64, True), (8, False), (15, False)])
def test_few_tiles_finish_at_once(rows: int, later: bool) -> None:
    chosen, random = Target.parse("znver4"), np.random.default_rng(1)
    region = make_region("MatMulInteger", [((rows, 64), np.uint8), whole(random, np.int8, 64, 64)])
    lowered = integer_gemm.schedule(region, chosen)
    assert lowered is not None
    assert ("waiting" in str(lowered.kernel_calls[-1].kernel)) == later


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_operands_of_the_run(data: st.DataObject) -> None:
    """Batches that either operand may lack, zero points of the run, for the left operand of each row too."""
    target = data.draw(st.sampled_from(TARGETS))
    batch = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    m, n, depth = data.draw(st.integers(2, 20)), data.draw(st.integers(2, 40)), data.draw(st.integers(2, 40))
    left, right = data.draw(DRAWN_BYTES), data.draw(DRAWN_BYTES)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    batches = data.draw(
        st.sampled_from([(batch, batch), (batch, ()), ((), batch), (batch[:-1] + (1,) * len(batch[-1:]), batch)])
    )
    a, b = whole(random, left, *batches[0], m, depth), whole(random, right, *batches[1], depth, n)
    a_zero, b_zero = whole(random, left, *data.draw(st.sampled_from([(), (m,)]))), whole(random, right)
    if data.draw(st.booleans()):
        b_zero = np.array(0 if right == np.int8 else 128, right)
    fixed = data.draw(st.booleans())
    zeros = [zero if fixed else (zero.shape, zero.dtype) for zero in (a_zero, b_zero)]
    region = make_region("MatMulInteger", [(a.shape, left), (b.shape, right), *zeros])
    expected = wide(a, a_zero[:, None] if a_zero.ndim else a_zero) @ wide(b, b_zero)
    check(region, [a, b, a_zero, b_zero], {}, expected, target)


@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[-1]])
@pytest.mark.parametrize(("batch", "length", "heads", "width"), [(2, 19, 3, 16), (1, 34, 2, 22)])
def test_products_of_attention(target: str, batch: int, length: int, heads: int, width: int) -> None:
    """Queries by keys, whose columns lie apart, and scores by values, whose heads do; of lengths that the run tells."""
    random = np.random.default_rng(length)
    q, keys = (whole(random, np.uint8, batch, length, heads, width) for _ in range(2))
    scores = whole(random, np.uint8, batch, heads, length, length)
    zeros = [np.array(117, np.uint8), np.array(131, np.uint8)]
    shape, square = (B, S, heads, width), (B, heads, S, S)

    def by_keys(a: Any, b: Any, *zeros: Any) -> Any:
        return integer_product(view(a, 0, 2, 1, 3), view(b, 0, 2, 3, 1), *zeros)

    def by_values(a: Any, b: Any, *zeros: Any) -> Any:
        return integer_product(a, view(b, 0, 2, 1, 3), *zeros)

    for define, first, arrays, equation in (
        (by_keys, shape, [q, keys], "bqhd,bkhd->bhqk"),
        (by_values, square, [scores, q], "bhqk,bkhd->bhqd"),
    ):
        operands = [(first, np.uint8), (shape, np.uint8), *zeros]
        region = make_region("MatMulInteger", operands, define=define)
        expected = np.einsum(equation, wide(arrays[0], 117), wide(arrays[1], 131))
        check(region, [*arrays, *zeros], {"B": batch, "S": length}, expected, target)


def view(x: Any, *axes: int) -> Any:
    """A permutation of axes."""
    return REGISTRY["Transpose"]([x], {"perm": list(axes)})[0]


def integer_product(*operands: Any) -> Any:
    return REGISTRY["MatMulInteger"](list(operands), {})[0]


@pytest.mark.parametrize("known", [True, False])
def test_accesses_stay_inside(known: bool) -> None:
    """By the interpreter, which checks each of them."""
    random = np.random.default_rng(0)
    for depth in (8, 9):
        a, w, zero = whole(random, np.int8, 5, depth), whole(random, np.uint8, depth, 19), np.array(9, np.uint8)
        second: Any = w if known else (w.shape, np.uint8)
        region = make_region("MatMulInteger", [(a.shape, np.int8), second, np.array(-3, np.int8), zero])
        lowered = integer_gemm.schedule(region, HOST)
        assert lowered is not None
        (result,) = run(region, lowered, HOST, [a, w, np.array(-3, np.int8), zero], interpret=True)
        np.testing.assert_array_equal(result, wide(a, -3) @ wide(w, 9))


# Whole models.

REQUANTIZED = """
requantized (uint8[17, 44] x, int8[2, 3, 9, 12] s, float[1, 24, 5, 6] image) => (uint8[17, 50] y, int8[2, 3, 9, 9] p,
  float[1, 30, 5, 6] z) {
  a = MatMulInteger (x, w, zx, zw)
  b = Add (a, bias)
  c = Cast <to = 1> (b)
  d = Mul (c, scales)
  e = Relu (d)
  y = QuantizeLinear (e, step, zy)
  t = Transpose <perm = [0, 1, 3, 2]> (s)
  u = MatMulInteger (s, t, zs, zs)
  v = Cast <to = 1> (u)
  g = Mul (v, scale)
  p = QuantizeLinear (g, step, zs)
  i, si, zi = DynamicQuantizeLinear (image)
  j = ConvInteger (i, f, zi)
  l = Cast <to = 1> (j)
  z = Mul (l, si)
}
"""


def test_models_have_the_same_bits_on_every_target() -> None:
    """Compiled for each x86 level: sums, their scales and what is rounded to bytes again."""
    random = np.random.default_rng(5)
    constants = {
        "w": whole(random, np.int8, 44, 50), "zx": np.array(121, np.uint8), "zw": whole(random, np.int8, 50),
        "bias": random.integers(-9000, 9000, 50).astype(np.int32), "zs": np.array(-7, np.int8),
        "scales": (random.random(50) * 1e-4).astype(np.float32), "scale": np.array(3.1e-4, np.float32),
        "step": np.array(0.0173, np.float32), "zy": np.array(3, np.uint8),
        "f": whole(random, np.int8, 30, 24, 1, 1),
    }  # fmt: skip
    inputs = {"x": whole(random, np.uint8, 17, 44), "s": whole(random, np.int8, 2, 3, 9, 12)}
    inputs["image"] = random.standard_normal((1, 24, 5, 6)).astype(np.float32)
    model = model_of_text(REQUANTIZED, **constants)
    found = {target: onnxc.compile(model, target=target, threads=1).run(inputs) for target in TARGETS}
    reference = ReferenceEvaluator(model).run(None, inputs)
    for (name, array), expected in zip(found[TARGETS[0]].items(), reference, strict=True):
        assert np.abs(array.astype(np.float64) - expected).max() <= (1e-3 if name == "z" else 0)
        for target, others in found.items():
            np.testing.assert_array_equal(others[name], array, err_msg=f"{name} on {target}")


def test_a_pointwise_convolution_is_a_product() -> None:
    """Channels last; with constant weights and the zero point of each filter."""
    random = np.random.default_rng(7)
    x, w = whole(random, np.uint8, 2, 5, 7, 12), whole(random, np.uint8, 21, 12, 1, 1)
    zero, zeros = np.array(200, np.uint8), whole(random, np.uint8, 21)
    region = make_region("ConvInteger", [(x.shape, np.uint8), w, zero, zeros], {"layout": "channels_last"})
    expected = wide(x, 200) @ wide(w[:, :, 0, 0], zeros[:, None]).T
    check(region, [x, w, zero, zeros], {}, expected, "host")
