"""Neighbouring elements by one thread: memory is moved 16 bytes at a time, arithmetic is done lane by lane.

The elements are `index`, `index + 1`, ... `index + count - 1` along one axis, `index` being a multiple of `count`. What
all of them read alike is read once; loads that are contiguous along the axis are one aligned access into an array of
registers; reductions inside have an accumulator per lane, so that their loads are vectors too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ....ir import scalars as s
from ....ir.dims import Dim, Sum, linear, symbol
from ....ir.dtypes import BOOL, I64
from ....ir.loops import Alloc, Define, For, Statement, Store
from ....ir.scalars import Buffer, Load, Scalar
from ....passes.guards import guard_loads
from ....passes.nests import Axis, collapse, combined, reductions

PIECE = 16
"""Bytes of the widest access."""
WIDEST = 64
"""Bytes of one operand's lanes up to which lanes pay: four accesses in flight."""
LANE = "lane"


def multiples(dims: Iterable[Dim], count: int) -> Scalar:
    """Whether every one of the sizes is a multiple of `count`."""
    result: Scalar = s.const(True, BOOL)
    for dim in dict.fromkeys(dims):
        result = s.binary("and", result, s.binary("eq", s.index(dim % count), s.const(0, I64)))
    return result


def divisible(offset: Dim, index: str, count: int, indices: Iterable[str]) -> tuple[Dim, ...] | None:
    """Sizes of which `count` must be a divisor for `offset` to be a multiple of it wherever `index` is one; None where
    no sizes make sure of it. `indices` are the symbols that are no sizes."""
    split = linear(offset, index)
    if split is None or split[0] != 1:
        return None
    names = set(indices)
    conditions: list[Dim] = []
    rest = split[1]
    for monomial, coefficient in rest.terms if not isinstance(rest, int) else [((), rest)]:
        if coefficient % count == 0:
            continue
        sizes = [atom for atom in monomial if not atom.has_opaque and not atom.free & names]
        if not sizes:
            return None
        conditions.append(Sum(((tuple(sizes), coefficient),)))
    return tuple(conditions)


def contiguous(value: Scalar, index: str) -> list[Load]:
    """The loads of memory in an expression, inside its reductions too, that are contiguous along an index."""
    found = []
    for node in s.walk(value):
        memory = isinstance(node, Load) and node.buffer.space in ("parameter", "shared")
        if memory and isinstance(node, Load) and index in s.free_symbols(node.offset):
            split = linear(node.offset, index)
            if split is not None and split[0] == 1:
                found.append(node)
    return found


def lanes_of(buffers: Iterable[Buffer], most: int = PIECE) -> int:
    """Lanes by which the narrowest of the buffers moves 16 bytes, no more than make 64 of the widest."""
    sizes = [buffer.dtype.bytes for buffer in buffers]
    return max(1, min(PIECE // min(sizes), WIDEST // max(sizes), most)) if sizes else 1


@dataclass
class Lanes:
    """Statements for `count` elements along `index`; `alignment` tells of a buffer's element 0, in bytes.

    `conditions` gathers what must hold of the sizes for the accesses made so far.
    """

    index: str
    count: int
    indices: frozenset[str]
    alignment: Callable[[str], int]
    conditions: list[Dim] = field(default_factory=list)
    prefix: str = "v"
    _made: int = 0

    @property
    def lane(self) -> Dim:
        return symbol(LANE, 0, self.count - 1)

    def named(self, stem: str) -> str:
        self._made += 1
        return f"{stem}_{self.prefix}{self._made}"

    def array(self, stem: str, like: Buffer | Scalar, size: int | None = None) -> Buffer:
        """A name for as many registers as there are lanes."""
        return Buffer(self.named(stem), like.dtype, self.count if size is None else size, "register")

    def each(self, body: Sequence[Statement]) -> Statement:
        """The body for every lane."""
        return For(LANE, self.count, tuple(body), "unrolled")

    def is_aligned(self, buffer: Buffer, offset: Dim) -> bool:
        """Whether the lanes at an offset are one aligned access; then what that takes is one of the conditions."""
        if self.alignment(buffer.name) < min(PIECE, self.count * buffer.dtype.bytes):
            return False
        conditions = divisible(offset, self.index, self.count, self.indices)
        self.conditions += conditions or ()
        return conditions is not None

    def values(self, values: Sequence[Scalar]) -> tuple[list[Statement], list[Scalar]]:
        """Statements that read what the values need, and each value in the lane `lane`."""
        return self._values([guard_loads(value) for value in values])

    def _values(self, values: Sequence[Scalar]) -> tuple[list[Statement], list[Scalar]]:
        statements: list[Statement] = []
        done: dict[bytes, Scalar] = {}
        for reduce in {r.digest: r for value in values for r in reductions(value)}.values():
            done[reduce.digest] = self._reduced(reduce, statements)
        if done:
            values = [s.Rewriter(lambda node: done.get(node.digest))(value) for value in values]
        loads: dict[bytes, Scalar] = {}
        for value in values:
            for load in contiguous(value, self.index) if self.count > 1 else ():
                varies = load.predicate is not None and not self._is_uniform(load.predicate)
                if load.digest in loads or varies or not self.is_aligned(load.buffer, load.offset):
                    continue
                array = self.array(load.buffer.name, load)
                predicate = None if load.predicate is None else s.widen(load.predicate, self.count)
                whole = s.load(load.buffer, load.offset, self.count, predicate, 1, True)
                statements += [Alloc(array), Store(array, 0, whole)]
                loads[load.digest] = s.load(array, self.lane)
        in_lane = s.Rewriter(
            lambda node: loads.get(node.digest), {self.index: symbol(self.index) + self.lane} if self.count > 1 else {}
        )
        return statements, [in_lane(value) for value in values]

    def _is_uniform(self, condition: Scalar) -> bool:
        """Whether a condition is the same in all lanes as in the first."""
        if not condition.mentions(self.index):
            return True
        if isinstance(condition, s.Binary) and condition.op in ("lt", "le") and condition.left.dtype == I64:
            # index + rest < 0, or its opposite: lanes begin at a multiple of their number.
            split = linear(s.as_dim(condition.left) - s.as_dim(condition.right), self.index)
            if split is None or split[0] not in (1, -1):
                return False
            rest = split[1] - (condition.op == "le")
            rest = rest if split[0] == 1 else -(rest + 1)
            return divisible(symbol(self.index) + rest, self.index, self.count, self.indices) == ()
        return bool(condition.children) and all(self._is_uniform(child) for child in condition.children)

    def _reduced(self, reduce: s.Reduce, statements: list[Statement]) -> Scalar:
        """What a reduction is in the lane `lane`, by loops added to the statements."""
        number = self._made = self._made + 1
        axes = [Axis(f"r{number}_{i}", extent) for i, (_, extent) in enumerate(reduce.ranges)]
        renamed = {old: axis.index for (old, _), axis in zip(reduce.ranges, axes, strict=True)}
        axes, (body,), _ = collapse(axes, [s.Rewriter(dims=renamed)(reduce.body)], [], "")
        self.indices |= {axis.name for axis in axes}
        varies = reduce.mentions(self.index) and self.count > 1
        total = self.array(reduce.op, reduce, None if varies else 1)
        where: Dim = self.lane if varies else 0
        identity = s.const(s.IDENTITY[reduce.op](reduce.dtype), reduce.dtype)
        inner, (value,) = self._values([body])
        update: Statement = Store(total, where, combined(reduce.op, s.load(total, where), value))
        inner.append(self.each([update]) if varies else update)
        for axis in reversed(axes):
            inner = [For(axis.name, axis.extent, tuple(inner))]
        statements += (
            [Alloc(total), self.each([Store(total, where, identity)])] if varies else [Define(total, identity)]
        )
        statements += inner
        return s.load(total, where)

    def outputs(
        self, places: Sequence[tuple[Buffer, Dim]], values: Sequence[Scalar], wanted: Scalar | None = None
    ) -> list[Statement]:
        """Stores values, given in the lane `lane`, at aligned offsets, if `wanted`."""
        if self.count == 1:
            return [Store(b, offset, value, wanted) for (b, offset), value in zip(places, values, strict=True)]
        arrays: list[Buffer] = []
        new: list[Statement] = []
        each: list[Statement] = []
        for (buffer, _), value in zip(places, values, strict=True):
            if isinstance(value, Load) and value.buffer.space == "register" and value.offset == self.lane:
                arrays.append(value.buffer)  # As it was read.
                continue
            arrays.append(self.array(buffer.name, buffer))
            new.append(Alloc(arrays[-1]))
            each.append(Store(arrays[-1], self.lane, value))
        stores = [
            Store(buffer, offset, s.load(array, 0, self.count), wanted, aligned=True)
            for (buffer, offset), array in zip(places, arrays, strict=True)
        ]
        return [*new, *([self.each(each)] if each else []), *stores]
