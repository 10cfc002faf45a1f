"""Symbolic integers: the algebra of shapes and of loop indices.

A `Dim` is a Python int or a `Sum`: a polynomial with integer coefficients over atoms (symbols, floor quotients,
minima and maxima, opaque run-time values). Sums are kept in one normal form, so equal polynomials compare equal, and a
constant is always a plain int. Remainders have no node of their own: `a mod n` is `a - n*floordiv(a, n)`, which makes
splitting and merging of axes cancel by arithmetic alone.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, Union

from .atoms import NOTHING, free_names, lazy
from .atoms import Extremum as Extremum
from .atoms import Opaque as Opaque
from .atoms import Quotient as Quotient
from .atoms import Symbol as Symbol
from .errors import LimitError

Dim: TypeAlias = Union[int, "Sum"]

Atom: TypeAlias = Symbol | Quotient | Extremum | Opaque
Monomial: TypeAlias = tuple[Atom, ...]

MOST_TERMS, LONGEST_TEXT = 4096, 1 << 20
"""Of a dim, before it is refused: shape arithmetic can double what it is given with every node."""


@dataclass(frozen=True)
class Sum:
    """A polynomial: (monomial, coefficient) pairs, sorted, no zero coefficient; never a mere constant."""

    terms: tuple[tuple[Monomial, int], ...]

    @lazy
    def _hash(self) -> int:
        return hash(self.terms)

    @lazy
    def free(self) -> frozenset[str]:
        """Names of the symbols in it, those inside run-time values included."""
        return NOTHING.union(*(atom.free for monomial, _ in self.terms for atom in monomial))

    @lazy
    def has_opaque(self) -> bool:
        """Whether a run-time value occurs in it."""
        return any(atom.has_opaque for monomial, _ in self.terms for atom in monomial)

    @lazy
    def _atoms(self) -> tuple[Atom, ...]:
        found: list[Atom] = []
        for atom in (atom for monomial, _ in self.terms for atom in monomial):
            found.append(atom)
            if isinstance(atom, Quotient):
                found += atoms(atom.numerator) + atoms(atom.denominator)
            elif isinstance(atom, Extremum):
                found += [inner for operand in atom.operands for inner in atoms(operand)]
        return tuple(found)

    @lazy
    def _bounds(self) -> dict[bool, tuple[int | None, int]]:
        """Bounds found so far, lower and upper, with the depth of the search that found them."""
        return {}

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Sum) and self._hash == other._hash and self.terms == other.terms)

    def __add__(self, other: Dim) -> Dim:
        if isinstance(other, int):
            # A constant is the first term.
            own = self.terms[0][1] if not self.terms[0][0] else 0
            rest = self.terms[1:] if not self.terms[0][0] else self.terms
            return Sum(((((), own + other),) if own + other else ()) + rest) if other else self
        result = dict(self.terms)
        for monomial, coefficient in other.terms:
            result[monomial] = result.get(monomial, 0) + coefficient
        return _normal(result)

    __radd__ = __add__

    def __neg__(self) -> Sum:
        return Sum(tuple((monomial, -coefficient) for monomial, coefficient in self.terms))

    def __sub__(self, other: Dim) -> Dim:
        return self + -other

    def __rsub__(self, other: Dim) -> Dim:
        return -self + other

    def __mul__(self, other: Dim) -> Dim:
        if isinstance(other, int):
            if other == 0:
                return 0
            return Sum(tuple((monomial, coefficient * other) for monomial, coefficient in self.terms))
        result: dict[Monomial, int] = {}
        if len(self.terms) * len(other.terms) > MOST_TERMS or len(self.terms[-1][0]) + len(other.terms[-1][0]) > 64:
            raise LimitError("a size is a product of too many sizes")
        for left, a in self.terms:
            for right, b in other.terms:
                monomial = tuple(sorted(left + right, key=_text)) if left and right else left or right
                result[monomial] = result.get(monomial, 0) + a * b
        return _normal(result)

    __rmul__ = __mul__

    def __floordiv__(self, other: Dim) -> Dim:
        return floordiv(self, other)

    def __rfloordiv__(self, other: Dim) -> Dim:
        return floordiv(other, self)

    def __mod__(self, other: Dim) -> Dim:
        return modulo(self, other)

    def __rmod__(self, other: Dim) -> Dim:
        return modulo(other, self)

    def __str__(self) -> str:
        return self._text

    @lazy
    def _text(self) -> str:
        parts: list[str] = []
        for monomial, coefficient in sorted(self.terms, key=lambda term: (not term[0], term[1] < 0)):
            factors = [atom._text for atom in monomial]
            if abs(coefficient) != 1 or not factors:
                factors.insert(0, str(abs(coefficient)))
            sign = "-" if coefficient < 0 else "+" if parts else ""
            parts.append(sign + "*".join(factors))
        if sum(map(len, parts)) > LONGEST_TEXT:
            raise LimitError("a size is computed from other sizes in too many steps")
        return "".join(parts)

    __repr__ = __str__


def _terms(dim: Dim) -> tuple[tuple[Monomial, int], ...]:
    if isinstance(dim, Sum):
        return dim.terms
    return (((), int(dim)),) if dim else ()


def _text(atom: Atom) -> str:
    return atom._text


def _key(term: tuple[Monomial, int]) -> tuple[str, ...]:
    return tuple([atom._text for atom in term[0]])


def _normal(terms: dict[Monomial, int]) -> Dim:
    kept = [term for term in terms.items() if term[1]]
    if not kept:
        return 0
    if len(kept) == 1:
        return kept[0][1] if not kept[0][0] else Sum((kept[0],))
    kept.sort(key=_key)
    return Sum(tuple(kept))


def _atom(atom: Atom) -> Sum:
    return Sum((((atom,), 1),))


def symbol(name: str, lower: int | None = 0, upper: Dim | None = None) -> Sum:
    """The dim that is just the symbol `name`, an integer in [lower, upper]."""
    return _atom(Symbol(name, lower, upper))


def opaque(value: object, lower: int | None = None, upper: Dim | None = None) -> Sum:
    """The dim that a scalar expression has at run time."""
    return _atom(Opaque(value, lower, upper))


def _as_atom(dim: Dim) -> Atom | None:
    if isinstance(dim, Sum) and len(dim.terms) == 1:
        monomial, coefficient = dim.terms[0]
        if coefficient == 1 and len(monomial) == 1:
            return monomial[0]
    return None


def as_symbol(dim: Dim) -> Symbol | None:
    """The symbol that `dim` consists of, or None."""
    atom = _as_atom(dim)
    return atom if isinstance(atom, Symbol) else None


def _divide_monomial(monomial: Monomial, divisor: Monomial) -> Monomial | None:
    rest = list(monomial)
    for atom in divisor:
        if atom not in rest:
            return None
        rest.remove(atom)
    return tuple(rest)


def divide_exactly(dim: Dim, divisor: Dim) -> Dim | None:
    """dim / divisor where that is a sum again, else None."""
    quotient, rest = _split_multiples(dim, divisor)
    if rest != 0 and len(_terms(divisor)) > 1:
        from .long_division import long_division  # which needs this module

        quotient, rest = long_division(dim, divisor)
    return quotient if rest == 0 else None


def _split_multiples(dim: Dim, divisor: Dim) -> tuple[Dim, Dim]:
    """(q, r) with dim = divisor*q + r, q holding the terms that the divisor (one term) divides."""
    if dim == divisor:
        return 1, 0
    divisor_terms = _terms(divisor)
    if len(divisor_terms) != 1:
        # A divisor of several terms still divides its own multiples: compare leading terms once.
        for monomial, coefficient in _terms(dim):
            lead = _divide_monomial(monomial, divisor_terms[0][0])
            if lead is not None and coefficient % divisor_terms[0][1] == 0:
                factor = _normal({lead: coefficient // divisor_terms[0][1]})
                rest = dim - factor * divisor
                if len(_terms(rest)) < len(_terms(dim)):
                    quotient, rest = _split_multiples(rest, divisor)
                    return quotient + factor, rest
        return 0, dim
    base, scale = divisor_terms[0]
    multiples: dict[Monomial, int] = {}
    rest_terms: dict[Monomial, int] = {}
    for monomial, coefficient in _terms(dim):
        reduced = _divide_monomial(monomial, base)
        if reduced is None:
            rest_terms[monomial] = coefficient
            continue
        whole, left = divmod(coefficient, scale) if scale > 0 else (0, coefficient)
        if reduced or coefficient % scale == 0 or not base:
            multiples[reduced] = whole
            if left:
                rest_terms[monomial] = left
        else:
            rest_terms[monomial] = coefficient
    return _normal(multiples), _normal(rest_terms)


def floordiv(numerator: Dim, denominator: Dim) -> Dim:
    """floor(numerator / denominator) for a positive denominator, simplified.

    A quotient by a dim that is zero at run time has no meaning; such a dim only occurs in empty tensors.
    ZeroDivisionError for the number 0.
    """
    if isinstance(numerator, int) and isinstance(denominator, int):
        return numerator // denominator
    if denominator == 0:
        raise ZeroDivisionError(f"{numerator} divided by 0")
    numerator, denominator = _cancelled(numerator, denominator)
    if denominator == 1:
        return numerator
    if isinstance(numerator, int) and isinstance(denominator, int):
        return numerator // denominator
    quotient, rest = _split_multiples(numerator, denominator)
    if rest == 0 or (known_le(0, rest) and known_le(rest + 1, denominator)):
        return quotient
    if isinstance(denominator, int) and isinstance(rest, Sum):
        constant = dict(rest.terms).get((), 0)
        common = math.gcd(denominator, *(c for monomial, c in rest.terms if monomial))
        if common > 1:
            reduced = _normal({m: c // common for m, c in rest.terms if m}) + constant // common
            return quotient + floordiv(reduced, denominator // common)
        # What is small beside multiples of a divisor changes nothing: (16*i + j) // 64 is i // 4 for 0 <= j < 16.
        for step in sorted({math.gcd(denominator, c) for monomial, c in rest.terms if monomial} - {1}, reverse=True):
            coarse = _normal({m: c // step for m, c in rest.terms if m and c % step == 0}) + constant // step
            fine = rest - step * coarse
            if known_le(0, fine) and known_le(fine + 1, step):
                return quotient + floordiv(coarse, denominator // step)
        inner = _as_atom(rest)
        if isinstance(inner, Quotient) and isinstance(inner.denominator, int):
            return quotient + floordiv(inner.numerator, inner.denominator * denominator)
    return quotient + _atom(Quotient(rest, denominator))


def _cancelled(numerator: Dim, denominator: Dim) -> tuple[Dim, Dim]:
    """Both without the positive factors that the denominator (one term) shares with every term of the numerator."""
    if isinstance(numerator, Sum) and isinstance(denominator, Sum) and len(denominator.terms) == 1:
        for atom in denominator.terms[0][0]:
            if all(atom in monomial for monomial, _ in numerator.terms) and known_le(0, _atom(atom)):
                upper, lower = divide_exactly(numerator, _atom(atom)), divide_exactly(denominator, _atom(atom))
                assert upper is not None and lower is not None
                return _cancelled(upper, lower)
    return numerator, denominator


def modulo(numerator: Dim, denominator: Dim) -> Dim:
    """numerator - denominator*floor(numerator / denominator)."""
    return numerator - denominator * floordiv(numerator, denominator)


def remainder_in(dim: Dim) -> tuple[Dim, Dim, Dim, Dim] | None:
    """(rest, factor, a, n) with dim = rest + factor * (a mod n) and no more terms in that than in dim, or None."""
    for monomial, coefficient in _terms(dim):
        for atom in monomial:
            if not isinstance(atom, Quotient):
                continue
            others = _divide_monomial(monomial, (atom,)) or ()
            size = atom.denominator
            choices: list[tuple[Dim, Dim]] = [(atom.numerator, size)]
            if isinstance(size, int):
                # a // 64 may stand for (a // 8) // 8.
                quotients = dict.fromkeys(x for m, _ in _terms(dim) for x in m if isinstance(x, Quotient) and x != atom)
                choices += [
                    (_atom(x), size // x.denominator)
                    for x in quotients
                    if x.numerator == atom.numerator and isinstance(x.denominator, int) and size % x.denominator == 0
                ]
            for numerator, divisor in choices:
                lead, scale = _terms(divisor)[0] if isinstance(divisor, Sum) else ((), divisor)
                left = _divide_monomial(others, lead)
                if left is None or coefficient % scale:
                    continue
                factor = _normal({left: -coefficient // scale})
                rest = dim - factor * (numerator - divisor * _atom(atom))
                # A remainder that is taken away must stand for two terms at least.
                if len(_terms(rest)) + (coefficient > 0) < len(_terms(dim)):
                    return rest, factor, numerator, divisor
    return None


def ceildiv(numerator: Dim, denominator: Dim) -> Dim:
    """ceil(numerator / denominator) for a positive denominator."""
    return floordiv(numerator + (denominator - 1), denominator)


def _extremum(kind: str, operands: Iterable[Dim]) -> Dim:
    flat: list[Dim] = []
    for operand in operands:
        inner = _as_atom(operand)
        flat += inner.operands if isinstance(inner, Extremum) and inner.kind == kind else (operand,)
    kept: list[Dim] = []
    for operand in flat:
        if any(_covers(kind, other, operand) for other in kept):
            continue
        kept = [other for other in kept if not _covers(kind, operand, other)] + [operand]
    if len(kept) == 1:
        return kept[0]
    return _atom(Extremum(kind, tuple(sorted(kept, key=str))))


def _covers(kind: str, winner: Dim, loser: Dim) -> bool:
    return known_le(winner, loser) if kind == "min" else known_le(loser, winner)


def dim_min(*operands: Dim) -> Dim:
    """The least of the operands."""
    return _extremum("min", operands)


def dim_max(*operands: Dim) -> Dim:
    """The greatest of the operands."""
    return _extremum("max", operands)


def dim_factor(dim: Dim) -> int:
    """The largest known integer that divides a dim; 0 for 0."""
    return abs(dim) if isinstance(dim, int) else math.gcd(*(coefficient for _, coefficient in dim.terms))


def product(dims: Iterable[Dim]) -> Dim:
    """The product of all dims, 1 if there are none."""
    result: Dim = 1
    for dim in dims:
        result = result * dim
    return result


def _add(result: dict[Monomial, int], dim: Dim) -> None:
    for monomial, coefficient in _terms(dim):
        result[monomial] = result.get(monomial, 0) + coefficient


def substitute(dim: Dim, values: Mapping[str, Dim], value: Callable[[Opaque], Dim] | None = None) -> Dim:
    """`dim` with symbols replaced by name, and run-time values by `value` where that is given."""
    if isinstance(dim, int):
        return dim
    names = values.keys()

    def untouched(part: Atom | Sum) -> bool:
        return part.free.isdisjoint(names) and (value is None or not part.has_opaque)

    def change(atom: Atom) -> Dim:
        if isinstance(atom, Symbol):
            return values[atom.name]
        if isinstance(atom, Quotient):
            return floordiv(substitute(atom.numerator, values, value), substitute(atom.denominator, values, value))
        if isinstance(atom, Extremum):
            return _extremum(atom.kind, [substitute(operand, values, value) for operand in atom.operands])
        return value(atom) if value is not None else _atom(atom)

    if untouched(dim):
        return dim
    result: dict[Monomial, int] = {}
    for monomial, coefficient in dim.terms:
        kept = tuple([atom for atom in monomial if untouched(atom)])
        if len(kept) == len(monomial):
            _add(result, Sum(((monomial, coefficient),)))
            continue
        term: Dim = Sum(((kept, coefficient),)) if kept else coefficient
        for atom in monomial:
            if atom not in kept:
                term = term * change(atom)
        _add(result, term)
    return _normal(result)


def evaluate(dim: Dim, bindings: Mapping[str, int]) -> int:
    """The integer that `dim` is under `bindings`; KeyError names a symbol that has none."""
    if isinstance(dim, int):
        return dim
    total = 0
    for monomial, coefficient in dim.terms:
        term = coefficient
        for atom in monomial:
            if isinstance(atom, Symbol):
                term *= bindings[atom.name]
            elif isinstance(atom, Quotient):
                term *= evaluate(atom.numerator, bindings) // evaluate(atom.denominator, bindings)
            elif isinstance(atom, Extremum):
                pick = min if atom.kind == "min" else max
                term *= pick(evaluate(operand, bindings) for operand in atom.operands)
            else:
                raise KeyError(str(atom))
        total += term
    return total


def atoms(dim: Dim) -> tuple[Atom, ...]:
    """Every atom in `dim`, those nested in quotients and extrema included, outermost first."""
    return dim._atoms if isinstance(dim, Sum) else ()


def symbols(dim: Dim) -> list[Symbol]:
    """The distinct symbols of `dim`, in order of appearance."""
    return list(dict.fromkeys(atom for atom in atoms(dim) if isinstance(atom, Symbol)))


def linear(dim: Dim, name: str) -> tuple[Dim, Dim] | None:
    """(coefficient, rest) with dim = coefficient*symbol + rest, both free of it; None where it is not linear."""
    coefficient: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for monomial, factor in _terms(dim):
        direct = [atom for atom in monomial if isinstance(atom, Symbol) and atom.name == name]
        others = tuple(atom for atom in monomial if not (isinstance(atom, Symbol) and atom.name == name))
        if len(direct) > 1 or any(name in atom.free for atom in others):
            return None
        (coefficient if direct else rest)[others] = factor
    return _normal(coefficient), _normal(rest)


def mentions(dim: Dim, name: str) -> bool:
    """Whether the symbol `name` occurs in `dim`, run-time values included (they tell by `free`)."""
    return name in free_names(dim)


def bounds(dim: Dim) -> tuple[int | None, int | None]:
    """An interval [lower, upper] that surely holds `dim`; None where a side is unbounded."""
    return _bound(dim, False), _bound(dim, True)


def known_le(left: Dim, right: Dim) -> bool:
    """Whether left <= right for every value of the symbols, as far as interval arithmetic can tell."""
    if isinstance(left, int) and isinstance(right, int):
        return left <= right
    upper = _bound(left - right, True)
    return upper is not None and upper <= 0


def _bound(dim: Dim, want_upper: bool, depth: int = 0) -> int | None:
    if isinstance(dim, int):
        return dim
    if depth > 12:
        return None
    # A failure is final for this depth and below: the search gives up by depth alone.
    known = dim._bounds.get(want_upper)
    if known is not None and (known[0] is not None or depth >= known[1]):
        return known[0]
    found = _find_bound(dim, want_upper, depth)
    dim._bounds[want_upper] = (found, depth)
    return found


def _find_bound(dim: Sum, want_upper: bool, depth: int) -> int | None:
    # A remainder c*(a - n*floordiv(a, n)) lies in c*[0, n-1]: bound it as one.
    for monomial, coefficient in dim.terms:
        if len(monomial) == 1 and isinstance(monomial[0], Quotient) and isinstance(monomial[0].denominator, int):
            quotient = monomial[0]
            size = monomial[0].denominator
            if coefficient % size == 0:
                scale = -coefficient // size
                rest = dim - scale * (quotient.numerator - size * _atom(quotient))
                if len(_terms(rest)) < len(dim.terms):
                    base = _bound(rest, want_upper, depth + 1)
                    reach = scale * (size - 1)
                    return None if base is None else base + (max(reach, 0) if want_upper else min(reach, 0))
    # Loop indices have symbolic limits: replace one that occurs linearly by its limit, so that it cancels.
    for monomial, coefficient in dim.terms:
        atom = monomial[0] if len(monomial) == 1 else None
        if isinstance(atom, Symbol | Opaque) and isinstance(atom.upper, Sum):
            others = dim - coefficient * _atom(atom)
            if any(atom in other for other, _ in _terms(others)):
                continue
            limit: Dim | None = atom.upper if (coefficient > 0) == want_upper else atom.lower
            return None if limit is None else _bound(others + coefficient * limit, want_upper, depth + 1)
    total = 0
    for monomial, coefficient in dim.terms:
        low: int | None = 1
        high: int | None = 1
        for atom in monomial:
            low, high = _times((low, high), _atom_bounds(atom, depth + 1))
        side = high if (coefficient > 0) == want_upper else low
        if side is None:
            return None
        total += coefficient * side
    return total


def _times(a: tuple[int | None, int | None], b: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    if a == (1, 1):
        return b
    if a[0] is None or b[0] is None or a[0] < 0 or b[0] < 0:
        if None in a or None in b:
            return None, None
        corners = [x * y for x in a for y in b if x is not None and y is not None]
        return min(corners), max(corners)
    return a[0] * b[0], None if a[1] is None or b[1] is None else a[1] * b[1]


def _atom_bounds(atom: Atom, depth: int) -> tuple[int | None, int | None]:
    if isinstance(atom, Symbol | Opaque):
        return atom.lower, None if atom.upper is None else _bound(atom.upper, True, depth)
    if isinstance(atom, Quotient):
        low, high = _bound(atom.numerator, False, depth), _bound(atom.numerator, True, depth)
        if isinstance(atom.denominator, int):
            size = atom.denominator
            return None if low is None else low // size, None if high is None else high // size
        return (0 if low is not None and low >= 0 else None), (high if high is not None and high >= 0 else None)
    lows = [_bound(operand, False, depth) for operand in atom.operands]
    highs = [_bound(operand, True, depth) for operand in atom.operands]
    if atom.kind == "min":
        known = [high for high in highs if high is not None]
        return (None if None in lows else min(x for x in lows if x is not None)), min(known) if known else None
    floor = [low for low in lows if low is not None]
    return max(floor) if floor else None, (None if None in highs else max(x for x in highs if x is not None))


def parse_dim(text: str, known: Mapping[str, Dim] | None = None) -> Dim:
    """The dim that `str` printed as `text`; ValueError where it is no dim.

    `known` gives symbols by name, with their bounds; a symbol that is not there gets the bounds of a size, [0, None].
    """
    known = {} if known is None else known
    operations: dict[type, Callable[[Dim, Dim], Dim]] = {
        ast.Add: lambda a, b: a + b,
        ast.Sub: lambda a, b: a - b,
        ast.Mult: lambda a, b: a * b,
        ast.FloorDiv: floordiv,
        ast.Mod: modulo,
    }
    functions: dict[str, Callable[..., Dim]] = {
        "floordiv": floordiv,
        "ceildiv": ceildiv,
        "mod": modulo,
        "min": dim_min,
        "max": dim_max,
    }

    def walk(tree: ast.expr) -> Dim:
        match tree:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                return number
            case ast.Name(id=name) | ast.Constant(value=str(name)):
                return known[name] if name in known else symbol(name)
            case ast.UnaryOp(op=ast.USub()):
                return -walk(tree.operand)
            case ast.BinOp() if type(tree.op) in operations:
                return operations[type(tree.op)](walk(tree.left), walk(tree.right))
            case ast.Call(func=ast.Name(id=name), args=[_, *_], keywords=[]) if name in functions:
                return functions[name](*map(walk, tree.args))
        raise ValueError("neither a number, a name nor arithmetic")

    try:
        return walk(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a dimension: {text!r}") from error
