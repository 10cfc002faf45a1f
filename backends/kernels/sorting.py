"""Order: comparisons in which NaN is the greatest, a bounded heap and a stable merge sort as statements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...ir import functions as f
from ...ir import scalars as s
from ...ir.dims import Dim, dim_min, symbol
from ...ir.dtypes import BOOL, I64
from ...ir.loops import For, If, Let, Statement, Store, While
from ...ir.scalars import Buffer, Scalar, load
from .calls import Variable


def less(a: Scalar, b: Scalar) -> Scalar:
    """a < b; NaN is greater than any number, as numpy sorts."""
    found = a < b
    return found | (f.isnan(b) & ~f.isnan(a)) if a.dtype.is_float else found


def swap(a: Variable, b: Variable) -> list[Statement]:
    """Exchanges two variables; leaves the old content of `a` in one of that name."""
    old = Variable(f"{a.name}_old", a.dtype)
    return [old.define(a.value), a.set(b.value), b.set(old.value)]


@dataclass(frozen=True)
class Heap:
    """The best elements seen so far, the worst of them first, in memory: element p lies at `start + p*stride`.

    An element is a value and its number; `before(a, b)` compares values; of equal ones that with the lower number is
    better. The memory is that of the results, which `sorted` leaves in order, the best first.
    """

    values: Buffer
    numbers: Buffer
    start: Dim
    stride: Dim
    size: Dim
    before: Callable[[Scalar, Scalar], Scalar]

    def _at(self, position: Dim) -> Dim:
        return self.start + position * self.stride

    def _put(self, position: Dim, value: Scalar, number: Scalar) -> list[Statement]:
        return [Store(self.values, self._at(position), value), Store(self.numbers, self._at(position), number)]

    def worst(self) -> Scalar:
        return load(self.values, self._at(0))

    def _is_worse(self, a: Dim, value: Scalar, number: Scalar) -> Scalar:
        """Whether the element at position a is worse than another."""
        mine = load(self.values, self._at(a))
        later = number < load(self.numbers, self._at(a))
        return self.before(value, mine) | (~self.before(mine, value) & later)

    def sift(self, position: Dim, end: Dim, value: Scalar, number: Scalar) -> list[Statement]:
        """Puts an element at a position of the heap of `end` elements, moving worse ones up until it fits."""
        held, held_number = Variable("held", self.values.dtype), Variable("held_number")
        at, child, going = Variable("hole"), Variable("child"), Variable("going", BOOL)
        here, there = symbol("hole_at"), symbol("child_at")
        right = there + 1
        step: list[Statement] = [
            Let("hole_at", at.value),
            child.define(at.value * 2 + 1),
            If(
                child.value + 1 < s.index(end),
                (
                    Let("child_at", child.value),
                    If(
                        self._is_worse(right, load(self.values, self._at(there)), load(self.numbers, self._at(there))),
                        (child.set(s.index(right)),),
                    ),
                ),
            ),
            going.set(child.value < s.index(end)),
            If(
                going.value,
                (
                    Let("child_at", child.value),
                    going.set(self._is_worse(there, held.value, held_number.value)),
                    If(
                        going.value,
                        (
                            *self._put(here, load(self.values, self._at(there)), load(self.numbers, self._at(there))),
                            at.set(s.index(there)),
                        ),
                    ),
                ),
            ),
        ]
        return [
            held.define(value),
            held_number.define(number),
            at.define(s.index(position)),
            going.define(True),
            While(going.value, tuple(step)),
            Let("hole_at", at.value),
            *self._put(here, held.value, held_number.value),
        ]

    def fill(self, element: Callable[[Dim], Scalar]) -> Iterator[Statement]:
        """Makes the heap of the elements numbered below its size."""
        first = symbol("first", 0, self.size - 1)
        yield For("first", self.size, tuple(self._put(first, element(first), s.index(first))))
        parent = self.size // 2 - 1 - symbol("parent", 0, self.size // 2 - 1)
        where = self._at(parent)
        body = self.sift(parent, self.size, load(self.values, where), load(self.numbers, where))
        yield For("parent", self.size // 2, tuple(body))

    def offer(self, value: Scalar, number: Dim) -> Statement:
        """Takes in an element, later than all before, if it is better than the worst."""
        return If(self.before(value, self.worst()), tuple(self.sift(0, self.size, value, s.index(number))))

    def sorted(self) -> Iterator[Statement]:
        """Leaves the elements in order: the worst goes to the end of a heap that shrinks by one."""
        end = self.size - 1 - symbol("done", 0, self.size - 2)
        last = Variable("last", self.values.dtype), Variable("last_number")
        body: Sequence[Statement] = [
            Let("end", end),
            last[0].define(load(self.values, self._at(symbol("end", 1)))),
            last[1].define(load(self.numbers, self._at(symbol("end", 1)))),
            *self._put(symbol("end", 1), self.worst(), load(self.numbers, self._at(0))),
            *self.sift(0, symbol("end", 1), last[0].value, last[1].value),
        ]
        yield For("done", self.size - 1, tuple(body))


Comparison = Callable[[Dim, Dim, Variable], Sequence[Statement]]
"""Statements that set a bool variable: whether one element (by its number) comes strictly before another."""


def merge_sort(
    order: Buffer, start: Dim, room: Dim, count: Dim, before: Comparison
) -> tuple[list[Statement], Variable]:
    """Sorts the numbers at order[start : start + count], stably, by merging runs of doubling length.

    `order` has `room` elements there and as many behind them. The variable returned tells where the result begins.
    """
    source, target, width = Variable("source"), Variable("target"), Variable("width")
    low, left, right = Variable("low"), Variable("left"), Variable("right")
    later = Variable("later", BOOL)
    size, begin = s.index(count), symbol("run", 0)
    middle, high = symbol("middle", 0), symbol("high", 0)
    first, second = symbol("first_number", 0), symbol("second_number", 0)

    def clamped(position: Variable, end: Dim) -> Dim:
        return s.as_dim(source.value + f.minimum(position.value, s.index(end - 1)), 0)

    take = (s.index(middle) <= left.value) | ((right.value < s.index(high)) & later.value)
    merge: list[Statement] = [
        Let("first_number", load(order, clamped(left, middle))),
        Let("second_number", load(order, clamped(right, high))),
        later.define(False),
        *before(second, first, later),
        later.set(take),
        Store(
            order,
            target.index() + begin + symbol("merged", 0),
            s.select(later.value, s.index(second), s.index(first)),
        ),
        right.add(s.cast(later.value, I64)),
        left.add(s.cast(~later.value, I64)),
    ]
    runs: list[Statement] = [
        Let("run", low.value),
        Let("middle", s.index(dim_min(begin + width.index(), count))),
        Let("high", s.index(dim_min(begin + width.index() * 2, count))),
        left.define(s.index(begin)),
        right.define(s.index(middle)),
        For("merged", high - begin, tuple(merge)),
        low.set(s.index(high)),
    ]
    statements: list[Statement] = [
        source.define(s.index(start)),
        target.define(s.index(start + room)),
        width.define(1),
        While(
            width.value < size,
            (
                low.define(0),
                While(low.value < size, tuple(runs)),
                *swap(source, target),
                width.set(width.value * 2),
            ),
        ),
    ]
    return statements, source


def compared(element: Callable[[Dim], Scalar], before: Callable[[Scalar, Scalar], Scalar]) -> Comparison:
    """Elements that are single values, compared by `before`."""
    return lambda a, b, result: [result.set(before(element(a), element(b)))]
