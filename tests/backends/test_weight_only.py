"""Products by weights of a few bits: every shape, epilogue and target against numpy."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import multiplying_loops, run, summing_loops
from onnxc.backends.cpu.kernels import weight_only
from onnxc.ir.dims import symbol
from onnxc.ir.functions import maximum
from onnxc.ir.target import Target
from onnxc.ir.tensors import Tensor, reduce_axes, reshaped, view
from onnxc.tools.bench_kernels import make_region

RANDOM = np.random.default_rng(0)
HOST = Target.host()
X86 = HOST.architecture == "x86_64"
TARGETS = [name for name in ("host", "x86-64-v3", "x86-64") if name == "host" or X86]
STORED = re.compile(r"[xyz]mm\d+, -?\d*\(%rsp\)|st[rp]\s+[qdsv].*\[sp")
M, B = symbol("M"), symbol("B")


class Weights:
    """Random weights [columns, depth] in blocks, as the operator has them and as numbers."""

    def __init__(
        self, columns: int, depth: int, bits: int, block: int, zeros: str = "", scale: Any = np.float32
    ) -> None:
        blocks = -(-depth // block)
        numbers = RANDOM.integers(0, 1 << bits, (columns, blocks * block)).astype(np.uint8)
        # Powers of two, so that sums are exact in any order.
        self.scales = 2.0 ** RANDOM.integers(-2, 2, (columns, blocks)).astype(scale)
        self.scales = self.scales.astype(scale)
        self.zeros: np.ndarray | None = None
        if zeros:
            self.zeros = RANDOM.integers(0, 1 << bits, (columns, blocks)).astype(zeros)
        middle = np.full((columns, blocks), 1 << (bits - 1)) if self.zeros is None else self.zeros
        each = 8 // bits
        parts = np.stack([numbers[:, place::each] << (place * bits) for place in range(each)])
        self.codes = np.bitwise_or.reduce(parts, axis=0).astype(np.uint8)
        spread = (np.repeat(x.astype(np.float64), block, 1)[:, :depth] for x in (middle, self.scales))
        middle, scales = spread
        self.numbers = (numbers[:, :depth] - middle) * scales
        self.attributes = {"depth": depth, "bits": bits, "block_size": block}

    @property
    def operands(self) -> list[np.ndarray]:
        return [self.codes, self.scales, *([] if self.zeros is None else [self.zeros])]

    def times(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) @ self.numbers.T


def whole(*shape: int) -> np.ndarray:
    return RANDOM.integers(-4, 5, shape).astype(np.float32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("known", [True, False])
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_shapes(target: str, known: bool, data: st.DataObject) -> None:
    rows = data.draw(st.sampled_from([1, 2, 3, 5, 8, 9, 20, 131]))
    columns, depth = data.draw(st.integers(2, 150)), data.draw(st.integers(1, 200))
    bits = data.draw(st.sampled_from([2, 4, 8]))
    block = data.draw(st.sampled_from([16, 32, 64, depth]))
    zeros = data.draw(st.sampled_from(["", "u1", "f4"]))
    weights = Weights(columns, depth, bits, block if block != depth else -(-depth // 16) * 16, zeros)
    x, bias = whole(rows, depth), whole(columns)
    region = make_region(
        "onnxc.PackedMatMul",
        [((rows if known else M, depth), "f4"), *weights.operands],
        weights.attributes,
        extras=[bias],
        epilogue=lambda y, b: maximum(y + b, 0.0),
    )
    chosen = Target.parse(target)
    lowered = weight_only.schedule(region, chosen)
    assert lowered is not None
    (result,) = run(region, lowered, chosen, [x, *weights.operands, bias], {} if known else {"M": rows})
    np.testing.assert_array_equal(result, np.maximum(weights.times(x) + bias, 0))


@pytest.mark.parametrize("rows", [1, 3, 12])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bits(rows: int, dtype: Any) -> None:
    weights = Weights(40, 64, 4, 32, "u1", dtype)
    x = whole(rows, 64).astype(dtype)
    region = make_region("onnxc.PackedMatMul", [(x.shape, dtype), *weights.operands], weights.attributes)
    host = Target.host()
    lowered = weight_only.schedule(region, host)
    assert lowered is not None
    (result,) = run(region, lowered, host, [x, *weights.operands])
    np.testing.assert_array_equal(result, weights.times(x).astype(dtype))


@pytest.mark.parametrize("length", [2, 9])
def test_batches_heads_and_several_outputs(length: int) -> None:
    """The result is split into heads, and is an output as it is; elements that are odd come through memory."""
    weights = Weights(48, 70, 4, 16)
    x = whole(2, length, 70)

    def heads(y: Tensor) -> tuple[Tensor, ...]:
        split = reshaped(y, (*y.shape[:2], 3, 16))
        return view(split, (y.shape[0], 3, y.shape[1], 16), lambda b, h, s, d: (b, s, h, d)), y

    host = Target.host()
    product = weights.times(x)
    for sizes in ({}, {"B": 2, "M": length}):
        shape: Any = (B, M, 70) if sizes else x.shape
        region = make_region(
            "onnxc.PackedMatMul", [(shape, "f4"), *weights.operands], weights.attributes, epilogue=heads
        )
        lowered = weight_only.schedule(region, host)
        assert lowered is not None
        split, plain = run(region, lowered, host, [x, *weights.operands], sizes)
        np.testing.assert_array_equal(plain, product)
        np.testing.assert_array_equal(split, product.reshape(2, length, 3, 16).transpose(0, 2, 1, 3))
    region = make_region(
        "onnxc.PackedMatMul",
        [(x.shape, "f4"), *weights.operands],
        weights.attributes,
        epilogue=lambda y: y - reduce_axes("max", y, (2,)),
    )
    lowered = weight_only.schedule(region, host)
    assert lowered is not None
    (result,) = run(region, lowered, host, [x, *weights.operands])
    np.testing.assert_array_equal(result, product - product.max(2, keepdims=True))


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_long_depth_in_one_block(rows: int, bits: int) -> None:
    """Parts of a panel that are less than a block; and no precision lost to zero points."""
    weights = Weights(70, 6000, bits, 6000)
    x = RANDOM.standard_normal((rows, 6000)).astype(np.float32)
    region = make_region("onnxc.PackedMatMul", [(x.shape, "f4"), *weights.operands], weights.attributes)
    host = Target.host()
    lowered = weight_only.schedule(region, host)
    assert lowered is not None
    (result,) = run(region, lowered, host, [x, *weights.operands])
    expected = weights.times(x)
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_weights_stay_packed() -> None:
    """Constants of a product are the codes, a scale and a zero point for each block: no more than the model has."""
    weights = Weights(512, 1024, 4, 32, "u1", np.float16)
    for target in (*TARGETS, "aarch64"):
        for rows in (1, 64, M):
            chosen = Target.parse(target)
            region = make_region("onnxc.PackedMatMul", [((rows, 1024), "f2"), *weights.operands], weights.attributes)
            lowered = weight_only.schedule(region, chosen)
            assert lowered is not None
            used = {name for call in lowered.kernel_calls for name in call.arguments}
            assert not used & {"x1", "x2", "x3"}
            size = sum(make().nbytes for make in lowered.packed.values())
            wide = weights.scales.nbytes if target == "x86-64" else 0  # no instruction converts f16 there
            assert size <= sum(array.nbytes for array in weights.operands) + wide + 64


def test_weights_that_are_no_constants_have_no_schedule() -> None:
    weights = Weights(40, 64, 4, 32)
    inputs = [((3, 64), "f4"), (weights.codes.shape, "u1"), weights.scales]
    assert weight_only.schedule(make_region("onnxc.PackedMatMul", inputs, weights.attributes), Target.host()) is None


@pytest.mark.parametrize("target", ["x86-64-v4", "x86-64-v3", "x86-64", "aarch64"])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_summing_loops_do_not_spill(target: str, rows: int) -> None:
    weights = Weights(256, 512, 4, 32, "u1")
    chosen = Target.parse(target)
    region = make_region("onnxc.PackedMatMul", [((rows, 512), "f4"), *weights.operands], weights.attributes)
    lowered = weight_only.schedule(region, chosen)
    assert lowered is not None
    loops = summing_loops(lowered, chosen)
    assert loops
    # Masks, of which there may be more than registers, are read from the stack: sums are never stored there.
    assert not [loop for loop in loops if STORED.search(loop)]


DOTS = ["host", *(["x86-64-v4", "x86-64-v3"] if X86 and HOST.has("avx512bw") else [])]
"""Where products of bytes are instructions, or where they are not: other widths than this machine's do not run here."""


@pytest.mark.parametrize("target", DOTS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_rows_that_may_be_rounded(target: str, data: st.DataObject) -> None:
    """Accuracy level 4: rows in blocks, rounded to 8 bits by their greatest magnitude; sums are exact."""
    rows, known = data.draw(st.sampled_from([1, 2, 3, 7, 8, 20])), data.draw(st.booleans())
    columns, depth = data.draw(st.integers(2, 100)), data.draw(st.integers(1, 150))
    bits, block = data.draw(st.sampled_from([2, 4, 8])), data.draw(st.sampled_from([16, 32, 64]))
    weights = Weights(columns, depth, bits, block, data.draw(st.sampled_from(["", "u1"])))
    x = RANDOM.standard_normal((rows, depth)).astype(np.float32)
    x[:, -depth // 3 :] = 0
    region = make_region(
        "onnxc.PackedMatMul",
        [((rows if known else M, depth), "f4"), *weights.operands],
        {**weights.attributes, "accuracy_level": 4},
    )
    chosen = Target.parse(target)
    lowered = weight_only.schedule(region, chosen)
    assert lowered is not None
    names = [call.kernel.name for call in lowered.kernel_calls]
    assert any("a8" in name for name in names) == (weight_only.instruction(bits, chosen) is not None)
    (result,) = run(region, lowered, chosen, [x, *weights.operands], {} if known else {"M": rows})
    if weights.scales.shape[1] == 1:
        block = depth
    padded = np.pad(x, ((0, 0), (0, -depth % block))).reshape(rows, -1, block)
    scale = np.abs(padded).max(2, keepdims=True) / np.float32(127)
    rounded = (np.rint(padded / np.where(scale > 0, scale, 1)) * scale).reshape(rows, -1)[:, :depth]
    expected = weights.times(x if weight_only.instruction(bits, chosen) is None else rounded)
    # A quotient in the middle of two integers may be rounded to either.
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-3 * np.abs(weights.times(np.abs(x))).max() + 1e-6)


@pytest.mark.parametrize("target", DOTS)
@pytest.mark.parametrize("zeros", ["", "u1"])
def test_digits_have_the_precision_of_reals(target: str, zeros: str) -> None:
    for rows, depth, bits, block in ((1, 640, 4, 32), (2, 300, 4, 64), (1, 500, 8, 512), (2, 70, 2, 16)):
        weights = Weights(80, depth, bits, block, zeros)
        x = RANDOM.standard_normal((rows, depth)).astype(np.float32)
        x[0, :3] = 0, 100, 1e-30
        region = make_region("onnxc.PackedMatMul", [(x.shape, "f4"), *weights.operands], weights.attributes)
        chosen = replace(Target.parse(target), strassen=1)
        lowered = weight_only.schedule(region, chosen)
        assert lowered is not None
        name = weight_only.instruction(bits, chosen)
        known = name not in (None, weight_only.BY_PAIRS)
        assert ("a24" in lowered.kernel_calls[-1].kernel.name) == known
        expected = weights.times(x)
        (result,) = run(region, lowered, chosen, [x, *weights.operands])
        np.testing.assert_allclose(result, expected, rtol=0, atol=5e-7 * (np.abs(x) @ np.abs(weights.numbers).T).max())
        x[-1, 5] = np.nan
        (result,) = run(region, lowered, chosen, [x, *weights.operands])
        assert np.isnan(result[-1]).all() and not np.isnan(result[:-1]).any()


def test_digits_where_the_run_tells_that_rows_are_few() -> None:
    weights = Weights(100, 200, 4, 32, "u1")
    chosen = replace(HOST, strassen=1)
    region = make_region("onnxc.PackedMatMul", [((M, 200), "f4"), *weights.operands], weights.attributes)
    lowered = weight_only.schedule(region, chosen)
    assert lowered is not None
    for rows in (1, 4, 8, 9, 30):
        x = RANDOM.standard_normal((rows, 200)).astype(np.float32)
        (result,) = run(region, lowered, chosen, [x, *weights.operands], {"M": rows})
        atol = 5e-7 * (np.abs(x) @ np.abs(weights.numbers).T).max()
        np.testing.assert_allclose(result, weights.times(x), rtol=0, atol=atol)


@pytest.mark.parametrize("zeros", ["", "u1"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_many_rows_by_digits(bits: int, zeros: str) -> None:
    """Weights that were taken apart once: several parts of the depth, blocks of rows and widths of panels, a stretch of
    runs that the depth does not fill."""
    for rows, columns, depth, block, known in (
        (9, 80, 300, 32, True),
        (150, 70, 200, 16, False),
        (20, 40, 5000, 128, True),
        (13, 33, 270, 272, True),
    ):
        weights = Weights(columns, depth, bits, block, zeros)
        x = RANDOM.standard_normal((rows, depth)).astype(np.float32)
        region = make_region(
            "onnxc.PackedMatMul", [((rows if known else M, depth), "f4"), *weights.operands], weights.attributes
        )
        chosen = replace(HOST, strassen=1)
        lowered = weight_only.schedule(region, chosen)
        assert lowered is not None
        (result,) = run(region, lowered, chosen, [x, *weights.operands], {} if known else {"M": rows})
        atol = 5e-7 * (np.abs(x) @ np.abs(weights.numbers).T).max()
        np.testing.assert_allclose(result, weights.times(x), rtol=0, atol=atol)


@pytest.mark.parametrize("target", ["aarch64+dotprod", "cpu:haswell+avxvnni"])
@pytest.mark.parametrize("bits", [4, 8])
def test_digits_on_other_targets(target: str, bits: int) -> None:
    """Interpreted: with signed codes, and with vectors of 8 lanes."""
    chosen = replace(Target.parse(target), strassen=1)
    for rows, level, zeros in ((2, 0, "u1"), (9, 0, "u1"), (10, 4, "")):
        weights = Weights(20, 32, bits, 16, zeros)
        x = whole(rows, 32)
        region = make_region(
            "onnxc.PackedMatMul", [(x.shape, "f4"), *weights.operands], {**weights.attributes, "accuracy_level": level}
        )
        lowered = weight_only.schedule(region, chosen)
        assert lowered is not None
        (result,) = run(region, lowered, chosen, [x, *weights.operands], interpret=True)
        atol = (np.abs(x) @ np.abs(weights.numbers).T).max() * (5e-7 if level == 0 else 1e-2)
        np.testing.assert_allclose(result, weights.times(x), rtol=0, atol=atol)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("level", [0, 4])
def test_loops_of_digits_do_not_spill(rows: int, level: int) -> None:
    weights = Weights(256, 512, 4, 128, "u1")
    chosen = replace(Target.parse("cpu:icelake-server"), strassen=1)
    region = make_region(
        "onnxc.PackedMatMul", [((rows, 512), "f4"), *weights.operands], {**weights.attributes, "accuracy_level": level}
    )
    lowered = weight_only.schedule(region, chosen)
    assert lowered is not None
    loops = multiplying_loops(lowered.kernel_calls[-1].kernel, chosen, re.compile(r"\svpdpbusd\s"))
    assert loops
    assert not [loop for loop in loops if STORED.search(loop)]


@pytest.mark.parametrize("strassen", [0, 1])
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("level", [0, 4])
def test_infinities_are_multiplied_as_defined(strassen: int, rows: int, level: int) -> None:
    """What subtracts zero points by sums of rows, or rounds rows, would make them NaN."""
    for bits, zeros in ((4, "u1"), (4, ""), (8, "u1")):
        weights = Weights(40, 96, bits, 32, zeros)
        x = whole(rows, 96)
        x[0, 5], x[-1, 40], x[-1, 41] = np.inf, -np.inf, np.inf
        region = make_region(
            "onnxc.PackedMatMul",
            [(x.shape, "f4"), *weights.operands],
            {**weights.attributes, "accuracy_level": level},
            epilogue=lambda y: y + 1.0,
        )
        chosen = replace(HOST, strassen=strassen)
        lowered = weight_only.schedule(region, chosen)
        assert lowered is not None
        (result,) = run(region, lowered, chosen, [x, *weights.operands])
        with np.errstate(invalid="ignore"):
            expected = (x[:, None, :] * weights.numbers[None].astype(np.float32)).sum(2) + 1
        assert np.isinf(expected).any()
        np.testing.assert_array_equal(result[[0, -1]], expected[[0, -1]])
        np.testing.assert_allclose(result, expected, rtol=2e-2, atol=1)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_rows_of_16_bits_need_two_digits(rows: int, dtype: Any) -> None:
    """No further from the exact product than rounding it to the type, and the rows to it, may be."""
    for bits, block, zeros in ((4, 32, "u1"), (8, 64, ""), (4, 16, "")):
        weights = Weights(80, 256, bits, block, zeros, dtype)
        x = RANDOM.standard_normal((rows, 256)).astype(dtype)
        region = make_region("onnxc.PackedMatMul", [(x.shape, dtype), *weights.operands], weights.attributes)
        chosen = replace(HOST, strassen=1)
        lowered = weight_only.schedule(region, chosen)
        assert lowered is not None
        name = lowered.kernel_calls[-1].kernel.name
        assert ("a16" in name) == bool({"dot4_u8_i8", "dot4_i8_i8"} & chosen.dot_products)
        (result,) = run(region, lowered, chosen, [x, *weights.operands])
        expected = weights.times(x)
        step = float(ml_dtypes.finfo(dtype).eps)
        norm = np.sqrt((np.square(x.astype(np.float64)).sum(1))[:, None] * np.square(weights.numbers).sum(1)[None])
        assert (np.abs(result - expected) <= 0.5 * step * np.abs(expected) + 0.1 * step * norm).all()
