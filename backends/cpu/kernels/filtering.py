"""Minimal filtering along one axis: some outputs of a convolution from fewer products than the definition makes.

An algorithm is three matrices (Winograd 1980; Lavin & Gray 2016): outputs = results ((weights w) . (data d)). Those
of stride 1 are Toom and Cook's, interpolation at rational points and at infinity, transposed (Barabasz et al. 2020). A
stride cuts inputs and taps into phases, each an algorithm of stride 1; their products stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from typing import TypeAlias

import numpy as np

from ....ir import scalars as s
from ....ir.dtypes import F32
from ....ir.scalars import Buffer, Scalar

Matrix: TypeAlias = tuple[tuple[Fraction, ...], ...]
Define: TypeAlias = Callable[[Scalar], Scalar]
"""Makes a value a register variable."""

POINTS: dict[int, tuple[Fraction, ...]] = {
    products: tuple(Fraction(point) for point in points.split())
    for products, points in {
        2: "0", 3: "0 -1", 4: "0 1 -1", 5: "0 1 -1 2", 6: "0 5/8 -5/8 3/2 -3/2", 8: "0 1/2 -1/2 1 -1 2 -2",
    }.items()
}  # fmt: skip
"""Where to interpolate, beside infinity, by the number of products: of the pairs +-p with p in eighths (so that no
coefficient of data and results is rounded) those of the least mean error in f32."""


WHOLE_POINTS: dict[int, tuple[Fraction, ...]] = {
    products: tuple(map(Fraction, points)) for products, points in {
        2: (0,), 3: (0, -1), 4: (0, 1, -1), 5: (0, 1, -1, 2), 6: (0, 1, -1, 2, -2),
    }.items()
}  # fmt: skip
"""The same for integers: coefficients of data are whole numbers, and small."""


@dataclass(frozen=True)
class Filtering:
    """`data` is [products, inputs], `weights` [products, taps], `results` [outputs, products]; results are `factor`
    times the outputs."""

    stride: int
    data: Matrix
    weights: Matrix
    results: Matrix
    factor: int = 1

    @property
    def outputs(self) -> int:
        return len(self.results)

    @property
    def products(self) -> int:
        return len(self.data)

    @property
    def inputs(self) -> int:
        return len(self.data[0])

    @cached_property
    def data_operations(self) -> int:
        return operations(self.data)

    @cached_property
    def results_operations(self) -> int:
        return operations(self.results)

    def __str__(self) -> str:
        return f"{self.outputs}s{self.stride}" if self.stride != 1 else str(self.outputs)

    @cached_property
    def whole(self) -> Filtering:
        """The algorithm in whole numbers, weights and results multiplied by what they were divided by."""
        scales = [math.lcm(*(entry.denominator for entry in row)) for row in self.weights]
        factor = math.lcm(*scales)
        weights = [[entry * scale for entry in row] for row, scale in zip(self.weights, scales, strict=True)]
        results = [[entry * factor / scale for entry, scale in zip(row, scales, strict=True)] for row in self.results]
        assert all(entry.denominator == 1 for row in (*self.data, *weights, *results) for entry in row)
        return Filtering(self.stride, self.data, _frozen(weights), _frozen(results), factor)


def exists(outputs: int, taps: int, stride: int, whole: bool = False) -> bool:
    """Whether there are points for so many products in every phase of the stride."""
    points = WHOLE_POINTS if whole else POINTS
    return all(count == 1 or outputs == 1 or outputs + count - 1 in points for count in map(len, _phases(taps, stride)))


@cache
def filtering(outputs: int, taps: int, stride: int = 1, whole: bool = False) -> Filtering:
    """The algorithm for so many outputs, `taps` weights and inputs `stride` apart; in `whole` numbers."""
    points = WHOLE_POINTS if whole else POINTS
    inputs = (outputs - 1) * stride + taps
    data: list[list[Fraction]] = []
    weights: list[list[Fraction]] = []
    results: list[list[Fraction]] = [[] for _ in range(outputs)]
    for phase, own in enumerate(_phases(taps, stride)):
        part = _toom_cook(outputs, len(own), points)
        data += [_spread(row, phase, stride, inputs) for row in part.data]
        weights += [_spread(row, phase, stride, taps) for row in part.weights]
        for row, more in zip(results, part.results, strict=True):
            row.extend(more)
    found = Filtering(stride, _frozen(data), _frozen(weights), _frozen(results))
    return found.whole if whole else found


def _phases(taps: int, stride: int) -> list[range]:
    return [range(phase, taps, stride) for phase in range(min(stride, taps))]


def _spread(row: Sequence[Fraction], first: int, step: int, extent: int) -> list[Fraction]:
    result = [Fraction(0)] * extent
    result[first : first + step * len(row) : step] = row
    return result


def _frozen(rows: Sequence[Sequence[Fraction]]) -> Matrix:
    return tuple(map(tuple, rows))


def _toom_cook(outputs: int, taps: int, choice: dict[int, tuple[Fraction, ...]]) -> Filtering:
    """The algorithm of stride 1. One tap or output: the definition, with a product for each input."""
    count = outputs + taps - 1
    unit = [_spread([Fraction(1)], i, 1, count) for i in range(count)]
    if taps == 1:
        return Filtering(1, _frozen(unit), ((Fraction(1),),) * count, _frozen(unit))
    if outputs == 1:
        return Filtering(1, _frozen(unit), _frozen(unit), ((Fraction(1),) * count,))
    points = choice[count]
    data, weights = [], []
    for point in points:
        others = [other for other in points if other != point]
        scale = _product([point - other for other in others])
        data.append([*_polynomial(others), Fraction(0)])
        weights.append([point**k / scale for k in range(taps)])
    data.append(_polynomial(points))
    weights.append(_spread([Fraction(1)], taps - 1, 1, taps))
    results = [[*(point**i for point in points), Fraction(i == outputs - 1)] for i in range(outputs)]
    return Filtering(1, _frozen(data), _frozen(weights), _frozen(results))


def _product(factors: Sequence[Fraction]) -> Fraction:
    result = Fraction(1)
    for factor in factors:
        result *= factor
    return result


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """The coefficients of the product of (x - root), from the constant on."""
    result = [Fraction(1)]
    for root in roots:
        raised, scaled = [Fraction(0), *result], [-root * c for c in result]
        result = [a + b for a, b in zip(raised, [*scaled, Fraction(0)], strict=True)]
    return result


def as_array(matrix: Matrix) -> np.ndarray:
    """The matrix in f64."""
    return np.array([[float(entry) for entry in row] for row in matrix])


def times(matrix: Matrix, values: Sequence[Scalar], define: Define) -> list[Scalar]:
    """The matrix times a vector of values in few operations.

    Columns that are equal but for signs (those of points p and -p in `results`) are added and subtracted once; rows
    that are equal but for signs (the same in `data`) are sums and differences of what they share.
    """
    pairs, rows, partners = _shared(matrix)
    terms = list(values)
    for a, b in pairs:
        terms[a], terms[b] = define(terms[a] + terms[b]), define(terms[a] - terms[b])
    results: dict[int, Scalar] = {}
    for i, row in enumerate(rows):
        if i in results:
            continue
        partner = partners[i]
        if partner is None:
            results[i] = _sum(row, terms)
            continue
        other = rows[partner]
        even = define(_sum([a if a == b else Fraction(0) for a, b in zip(row, other, strict=True)], terms))
        odd_part = [a if a != b else Fraction(0) for a, b in zip(row, other, strict=True)]
        scale = [a for a in odd_part if a][-1]
        odd = define(_sum([a / scale for a in odd_part], terms))
        results[i], results[partner] = _plus(even, scale, odd), _plus(even, -scale, odd)
    return [results[i] for i in range(len(rows))]


@cache
def _shared(matrix: Matrix) -> tuple[list[tuple[int, int]], list[list[Fraction]], dict[int, int | None]]:
    """What operations can be shared: pairs of columns to add and subtract, the rows over the columns that are then
    there, and for each row that comes first in a pair of rows the other one."""
    rows = [list(row) for row in matrix]
    pairs: list[tuple[int, int]] = []
    for a in range(len(rows[0])):
        for b in range(a + 1, len(rows[0])):
            same = [row[a] == row[b] for row in rows if row[a] or row[b]]
            if all(abs(row[a]) == abs(row[b]) for row in rows) and True in same and False in same:
                pairs.append((a, b))
                for row in rows:
                    row[a], row[b] = (row[a], Fraction(0)) if row[a] == row[b] else (Fraction(0), row[a])
    partners: dict[int, int | None] = {}
    for i, row in enumerate(rows):
        if i not in partners.values():
            others = [j for j in range(i + 1, len(rows)) if j not in partners.values() and _mirrored(row, rows[j])]
            partners[i] = others[0] if others else None
    return pairs, rows, partners


def _mirrored(row: Sequence[Fraction], other: Sequence[Fraction]) -> bool:
    """Whether rows are equal but for signs, with terms of either kind."""
    equal = [a == b for a, b in zip(row, other, strict=True) if a or b]
    return all(abs(a) == abs(b) for a, b in zip(row, other, strict=True)) and True in equal and False in equal


def _sum(row: Sequence[Fraction], terms: Sequence[Scalar]) -> Scalar:
    """The sum of row * terms, which begins with a term that needs no product."""
    order = sorted((k for k, c in enumerate(row) if c), key=lambda k: (row[k] != 1, k))
    first, *rest = order
    total = terms[first]
    if row[first] != 1:
        total = total * _constant(row[first], total)
    for k in rest:
        total = _plus(total, row[k], terms[k])
    return total


def _plus(total: Scalar, factor: Fraction, term: Scalar) -> Scalar:
    if abs(factor) == 1:
        return total + term if factor == 1 else total - term
    return s.fma(_constant(factor, term), term, total)


def _constant(value: Fraction, like: Scalar) -> Scalar:
    return s.const(float(value), like.dtype, like.lanes)


def operations(matrix: Matrix) -> int:
    """Sums and products of `times`."""
    values = [s.load(Buffer("value", F32), k) for k in range(len(matrix[0]))]
    seen: set[bytes] = set()
    found = [node for result in times(matrix, values, lambda value: value) for node in s.walk(result, seen, False)]
    return sum(isinstance(node, s.Binary | s.Fma) for node in found)
