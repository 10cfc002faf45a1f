"""What definitions ask of integers that only the run tells and that address memory: guards, checked by the program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from .dims import Dim, dim_max, known_le
from .errors import ShapeError
from .tensors import Tensor, assume_equal


@dataclass(frozen=True, eq=False)
class Guard:
    """Every element of the integer tensor `indices` must be in [least, end), `what` for messages says of what.

    With a `column` it is every element at that position of the last axis: index tuples have an axis for each position.
    """

    indices: Tensor
    least: Dim
    end: Dim
    what: str
    column: int | None = None

    @property
    def holds(self) -> bool:
        """Whether what is known of the elements proves it."""
        low, high = self.indices.lower, self.indices.upper
        return low is not None and high is not None and known_le(self.least, low) and known_le(high + 1, self.end)


_guards: ContextVar[list[Guard] | None] = ContextVar("guards", default=None)


@contextmanager
def collecting_guards() -> Iterator[list[Guard]]:
    """Within this context, guards of definitions that nothing proves are recorded."""
    found: list[Guard] = []
    token = _guards.set(found)
    try:
        yield found
    finally:
        _guards.reset(token)


def guard(
    indices: Tensor, end: Dim, least: Dim | None = None, what: str = "an axis", column: int | None = None
) -> None:
    """States that elements of a tensor must be in [least, end), by default [-end, end): negative from the end."""
    stated = Guard(indices, -end if least is None else least, end, what, column)
    recorded = _guards.get()
    if recorded is not None and not stated.holds:
        recorded.append(stated)


def assume_at_most(size: Dim, limit: Dim, what: str) -> None:
    """States that a size does not exceed another; ShapeError where it surely does."""
    if isinstance(size, int) and isinstance(limit, int) and size > limit:
        raise ShapeError(f"{what}: {size} exceeds {limit}")
    assume_equal(dim_max(size, limit), limit, what)
