"""Sigmoid and tanh as quotients of polynomials: what a recurrent cell takes of them, at half of their usual cost.

tanh(x) is x P(x^2) / Q(x^2) for |x| <= 9, where it rounds to 1; P and Q are a minimax fit of the relative error, 2e-8
(by `tools.fit_rational`), to which rounding adds up to five units of 2^-24. All coefficients are positive: nothing
cancels. sigmoid(x) is (1 + tanh(x/2)) / 2, right to 2e-7 of one. Quotients that are multiplied or added take one
division together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...ir import functions as f
from ...ir import scalars as s
from ...ir.scalars import Scalar, const

LIMIT = 9.0
"""From here on tanh is constant."""
ABOVE = (1.0, 0.1338106095790863, 0.0034956287126988173, 2.0609701095963828e-05, 1.335542965108516e-08)
BELOW = (1.0, 0.4671437740325928, 0.02587714046239853, 0.00032856990583240986, 7.776891379762674e-07)


@dataclass(frozen=True)
class Quotient:
    """above / below; `below` is at least 1."""

    above: Scalar
    below: Scalar

    def value(self) -> Scalar:
        return self.above / self.below

    def __mul__(self, other: Quotient | Scalar) -> Quotient:
        if isinstance(other, Scalar):
            return Quotient(self.above * other, self.below)
        return Quotient(self.above * other.above, self.below * other.below)

    def __add__(self, other: Quotient) -> Quotient:
        return Quotient(s.fma(self.above, other.below, other.above * self.below), self.below * other.below)


def tanh(x: Scalar) -> Quotient:
    x = f.minimum(f.maximum(x, -LIMIT), LIMIT)
    return Quotient(x * _polynomial(x * x, ABOVE), _polynomial(x * x, BELOW))


def sigmoid(x: Scalar) -> Quotient:
    """(Q + x P) / 2Q at x / 2."""
    x = f.minimum(f.maximum(x, -2 * LIMIT), 2 * LIMIT)
    below = _polynomial(x * x, [2 * c / 4**i for i, c in enumerate(BELOW)])
    above = _polynomial(x * x, [c / 2 / 4**i for i, c in enumerate(ABOVE)])
    return Quotient(s.fma(x, above, below * 0.5), below)


def _polynomial(x: Scalar, coefficients: Sequence[float]) -> Scalar:
    """By Horner's rule."""
    total: Scalar = const(coefficients[-1], x.dtype)
    for coefficient in reversed(coefficients[:-1]):
        total = s.fma(total, x, const(coefficient, x.dtype))
    return total
