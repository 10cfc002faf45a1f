"""Bounds of integer expressions hold for every value that the operands can have."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from onnxc.ir import functions as f
from onnxc.ir import scalars as s
from onnxc.ir.dims import symbol
from onnxc.ir.dtypes import F32, I32, I64, U8
from onnxc.ir.intervals import interval
from onnxc.ir.scalars import Buffer, Scalar

OPS = ("add", "sub", "mul", "min", "max", "rem")


def evaluate(value: Scalar, at: dict[str, int]) -> int:
    """An expression with i64 arithmetic as numpy does it; remainders have the sign of the dividend."""
    if isinstance(value, s.Const):
        return int(value.value)
    if isinstance(value, s.Load):
        return at[value.buffer.name]
    if isinstance(value, s.Select):
        return evaluate(value.yes if evaluate(value.condition, at) else value.no, at)
    assert isinstance(value, s.Binary)
    a, b = evaluate(value.left, at), evaluate(value.right, at)
    table = {"add": a + b, "sub": a - b, "mul": a * b, "min": min(a, b), "max": max(a, b), "lt": int(a < b)}
    table |= {"rem": int(np.fmod(a, b)) if b else 0, "eq": int(a == b), "xor": a ^ b, "and": a & b}
    return table[value.op]


expressions = st.recursive(
    st.sampled_from(["a", "b"]).map(lambda name: s.load(Buffer(name, I64), 0))
    | st.integers(-4, 6).map(lambda number: s.const(number, I64)),
    lambda inner: (
        st.builds(s.binary, st.sampled_from(OPS), inner, inner)
        | st.builds(lambda a, b, c: f.where(a < b, c, a), inner, inner, inner)
    ),
    max_leaves=6,
)
ranges = st.tuples(st.integers(-4, 4), st.integers(0, 4)).map(lambda pair: (pair[0], sum(pair)))


@given(expressions, ranges, ranges)
def test_every_value_lies_within(value: Scalar, a: tuple[int, int], b: tuple[int, int]) -> None:
    low, high = interval(value, {"a": a, "b": b}.__getitem__)
    for x, y in itertools.product(range(a[0], a[1] + 1), range(b[0], b[1] + 1)):
        found = evaluate(value, {"a": x, "b": y})
        assert (low is None or low <= found) and (high is None or (isinstance(high, int) and found <= high))


def test_what_bounds_an_index() -> None:
    x, n = s.load(Buffer("x", I64), 0), symbol("n", 1)

    def bounds(value: Scalar, known: tuple[int | None, object] = (None, None)) -> tuple[object, object]:
        return interval(value, lambda name: known)  # type: ignore[arg-type, return-value]

    assert bounds(f.minimum(f.maximum(x, 0), 9)) == (0, 9)
    assert bounds(x + 1, (0, n - 2)) == (1, n - 1)
    assert bounds(s.index(symbol("n", 1))) == (1, n)
    assert bounds(s.cast(s.load(Buffer("u", U8), 0), I64)) == (0, 255)
    assert bounds(s.cast(s.load(Buffer("u", F32), 0), I64)) == (None, None)
    # What may wrap round has no bounds but the type's.
    i32 = s.load(Buffer("i", I32), 0)
    assert bounds(i32 + 1, (0, (1 << 31) - 1)) == (-(1 << 31), (1 << 31) - 1)
    assert bounds(i32 * i32, (0, 1 << 20)) == (-(1 << 31), (1 << 31) - 1)
