"""Keys and values that are stored in 8 bits: kernels read the integers, scales go to the queries and to the result.

sum q * (k - z) * s = sum (q * s) * (k - z) where scales do not differ from key to key, and sum w * (v - z) * s =
s * sum w * (v - z). So a cache of 8 bits costs a quarter of the memory and of its bandwidth, and a conversion in
registers.
"""

from __future__ import annotations

from dataclasses import replace

from ....ir import scalars as s
from ....ir.dtypes import F32, I8, U8
from ....ir.scalars import Binary, Cast, Load, Scalar
from ...kernels.attention_problem import CHANNEL, ROW, Matrix, Problem


def unscaled(problem: Problem) -> Problem:
    """The attention over the integers of keys and values, where they are dequantized; as it is where they are not."""
    keys, values = _stored(problem.keys), _stored(problem.values)
    if keys is not None:
        matrix, scale = keys
        queries = problem.queries
        if scale is not None:
            queries = replace(queries, value=s.cast(queries.value, F32) * scale, buffer=None, copied=0, by_rows=False)
        problem = replace(problem, keys=matrix, queries=queries)
    if values is not None:
        matrix, scale = values
        problem = replace(problem, values=matrix, result=replace(problem.result, scale=scale))
    return problem


def _stored(matrix: Matrix) -> tuple[Matrix, Scalar | None] | None:
    """The integers of (integer - zero point) * scale, and the scale; None where a matrix is nothing of that."""
    value: Scalar = matrix.value
    scale: Scalar | None = None
    zero: Scalar | None = None
    if value.dtype != F32:
        return None
    if isinstance(value, Binary) and value.op == "mul":
        first, second = value.left, value.right
        value, scale = (second, first) if second.mentions(ROW) else (first, second)
        if scale.mentions(ROW):
            return None
    while isinstance(value, Cast):
        value = value.operand
    if isinstance(value, Binary) and value.op == "sub" and value.dtype.is_integer:
        zero = value.right
        value = value.left
        if zero.mentions(ROW) or zero.mentions(CHANNEL):
            return None
    while isinstance(value, Cast) and value.operand.dtype.is_integer:
        value = value.operand
    if not isinstance(value, Load) or value.predicate is not None or value.dtype not in (I8, U8):
        return None
    return replace(matrix, value=value, zero=zero), scale
