"""Dims divided by sums, as polynomials are."""

from __future__ import annotations

from .dims import Dim, Monomial
from .dims import _divide_monomial as divide_monomial
from .dims import _normal as normal
from .dims import _terms as terms_of
from .dims import _text as text_of

_STEPS = 32
"""Terms of a quotient that is looked for."""


def long_division(dim: Dim, divisor: Dim) -> tuple[Dim, Dim]:
    """(q, r) with dim = divisor*q + r, term by term by the leading ones in lexical order, until one does not divide."""
    names = sorted({text_of(atom) for part in (dim, divisor) for monomial, _ in terms_of(part) for atom in monomial})

    def leading(part: Dim) -> tuple[Monomial, int]:
        return max(terms_of(part), key=lambda term: [sum(text_of(atom) == name for atom in term[0]) for name in names])

    base, scale = leading(divisor)
    quotient: Dim = 0
    for _ in range(_STEPS):
        if dim == 0:
            break
        monomial, coefficient = leading(dim)
        lead = divide_monomial(monomial, base)
        if lead is None or coefficient % scale:
            break
        factor = normal({lead: coefficient // scale})
        quotient, dim = quotient + factor, dim - factor * divisor
    return quotient, dim
