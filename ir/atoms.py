"""What symbolic integers are made of: symbols, floor quotients, minima and maxima, and values that only the run tells.

The algebra over these is in `ir.dims`.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from .dims import Dim

LONGEST_VALUE = 1 << 14
_PLAIN_SYMBOL = re.compile(r"\$?[A-Za-z_][A-Za-z0-9_]*")


def quote(text: str) -> str:
    """`text` between double quotes, escaped as in Python: one line of printable characters."""
    # The quote in front makes repr choose single quotes outside, so that only double quotes are left to escape.
    return '"' + repr('"' + text)[2:-1].replace('"', '\\"') + '"'


Kept = TypeVar("Kept")


class lazy(Generic[Kept]):
    """An attribute computed when first asked for; `functools.cached_property` without the lock of Python 3.11."""

    def __init__(self, compute: Callable[[Any], Kept]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Kept:
        value = self.compute(instance)
        instance.__dict__[self.compute.__name__] = value  # found there before this descriptor from now on
        return value


Kind = TypeVar("Kind", bound=type)


def quick(kind: Kind) -> Kind:
    """A frozen dataclass without default factories whose constructor writes all fields, and their tuple `_contents`, at
    once: in a third of the time."""
    found = [field for field in fields(kind) if field.init]
    given = {f"_{field.name}": field.default for field in found if field.default is not MISSING}
    arguments = ", ".join(f"{f.name}=_{f.name}" if f"_{f.name}" in given else f.name for f in found)
    writes = "; ".join(f"its[{f.name!r}] = {f.name}" for f in found)
    everything = "".join(f"{f.name}, " for f in found)
    text = f"def __init__(self, {arguments}):\n its = self.__dict__; {writes}; its['_contents'] = ({everything})"
    exec(text, given)
    kind.__init__ = given["__init__"]  # type: ignore[misc]
    return kind


NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Symbol:
    """A named integer in [lower, upper]; two symbols are the same where their names are."""

    name: str
    lower: int | None = 0
    upper: Dim | None = None

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Symbol) and self.name == other.name)

    def __hash__(self) -> int:
        return hash(self.name)

    @lazy
    def free(self) -> frozenset[str]:
        return frozenset((self.name,))

    has_opaque = False

    @lazy
    def _text(self) -> str:
        # Models may call a dimension anything: what does not read back as one name is quoted.
        plain = _PLAIN_SYMBOL.fullmatch(self.name) and not keyword.iskeyword(self.name)
        return self.name if plain else quote(self.name)

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True)
class Quotient:
    """floor(numerator / denominator); the denominator is positive."""

    numerator: Dim
    denominator: Dim

    @lazy
    def free(self) -> frozenset[str]:
        return free_names(self.numerator) | free_names(self.denominator)

    @lazy
    def has_opaque(self) -> bool:
        return has_opaque(self.numerator) or has_opaque(self.denominator)

    @lazy
    def _text(self) -> str:
        return f"floordiv({self.numerator}, {self.denominator})"

    def __str__(self) -> str:
        return self._text

    @lazy
    def _hash(self) -> int:
        return hash((self.numerator, self.denominator))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True)
class Extremum:
    """min(...) or max(...) of two or more dims."""

    kind: str
    operands: tuple[Dim, ...]

    @lazy
    def free(self) -> frozenset[str]:
        return NOTHING.union(*map(free_names, self.operands))

    @lazy
    def has_opaque(self) -> bool:
        return any(map(has_opaque, self.operands))

    @lazy
    def _text(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.operands))})"

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True)
class Opaque:
    """An integer computed at run time by `value` (a scalar expression), known to lie in [lower, upper]."""

    value: object
    lower: int | None = field(default=None, compare=False)
    upper: Dim | None = field(default=None, compare=False)

    @property
    def free(self) -> frozenset[str]:
        return self.value.free  # type: ignore[attr-defined, no-any-return]

    has_opaque = True

    @lazy
    def _text(self) -> str:
        # A vector of gathered elements names the index of each: what gets long is named by its digest.
        text = f"[{self.value}]"
        return text if len(text) < LONGEST_VALUE else f"[#{self.value.digest.hex()}]"  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return self._text


def free_names(dim: Dim) -> frozenset[str]:
    """Names of the symbols that a dim depends on, those inside run-time values included."""
    return NOTHING if isinstance(dim, int) else dim.free


def has_opaque(dim: Dim) -> bool:
    """Whether a dim depends on a value that only the run tells."""
    return not isinstance(dim, int) and dim.has_opaque
