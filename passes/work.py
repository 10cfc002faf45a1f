"""What a kernel does: floating-point operations and bytes, for its place under the roofline (Williams et al. 2009).

Counted on the kernel as it was scheduled: loops multiply what is inside, a multiply-add is two operations, a
mathematical function one. Bytes are those that must move at least once: of each buffer as much as is touched, but no
more than the whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..ir import loops as k
from ..ir import scalars as s
from ..ir.dims import Dim, evaluate
from ..ir.loops import Kernel
from ..ir.scalars import Scalar, free_symbols

ONE_BY_ONE = 256
"""Turns of a loop counted one by one where what is inside depends on the index; of more, some evenly spread ones."""
_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "min", "max", "pow", "rem"})
_FREE = frozenset({"not", "neg", "abs"})
_DOT = re.compile(r"dot(\d+)_")
"""Intrinsics that add the products of so many pairs to each number."""


@dataclass
class Work:
    """Operations on floats, on integers, and of dot products by their names; bytes touched by buffer."""

    flops: float = 0.0
    integer_ops: float = 0.0
    dots: dict[str, float] = field(default_factory=dict)
    touched: dict[str, float] = field(default_factory=dict)

    def add(self, other: Work, times: float) -> None:
        self.flops += other.flops * times
        self.integer_ops += other.integer_ops * times
        for name, count in other.dots.items():
            self.dots[name] = self.dots.get(name, 0.0) + count * times
        for name, count in other.touched.items():
            self.touched[name] = self.touched.get(name, 0.0) + count * times


@dataclass(frozen=True)
class Load:
    """What one run of a kernel asks of the machine: operations, and bytes of the buffers that are its parameters.

    `dots` are the operations of dot products by their names, two for each product; they are in no other number.
    """

    flops: float
    integer_ops: float
    bytes: float
    dots: Mapping[str, float]

    def __add__(self, other: Load) -> Load:
        names = self.dots.keys() | other.dots.keys()
        dots = {name: self.dots.get(name, 0.0) + other.dots.get(name, 0.0) for name in sorted(names)}
        operations = self.flops + other.flops, self.integer_ops + other.integer_ops
        return Load(*operations, self.bytes + other.bytes, dots)

    @property
    def operations(self) -> float:
        """On floats, and of dot products of whatever they are."""
        return self.flops + sum(self.dots.values())


NOTHING = Load(0.0, 0.0, 0.0, {})


def load_of(kernel: Kernel, sizes: Sequence[int]) -> Load:
    """The load of one run of a kernel whose size symbols have the given values."""
    bindings = dict(zip(kernel.sizes, sizes, strict=True))
    work = _block(kernel.body, bindings)
    moved = 0.0
    for parameter in kernel.parameters:
        whole = max(0, _number(parameter.size, bindings))
        touched = sum(n for name, n in work.touched.items() if _root(kernel, name) == parameter.name)
        moved += min(whole * parameter.dtype.bytes, touched)
    return Load(work.flops, work.integer_ops, moved, work.dots)


def _root(kernel: Kernel, name: str) -> str:
    """The parameter behind a pointer."""
    sources = {st.buffer.name: st.source.name for st in k.walk(kernel.body) if isinstance(st, k.Alias)}
    while name in sources:
        name = sources[name]
    return name


def _block(block: k.Block, bindings: Mapping[str, int]) -> Work:
    total = Work()
    known = dict(bindings)
    seen: set[bytes] = set()  # what a block computes twice is computed once
    for statement in block:
        if isinstance(statement, k.Let) and not isinstance(statement.value, Scalar):
            known[statement.name] = _number(statement.value, known)
        elif isinstance(statement, k.For):
            total.add(_loop(statement, known), 1)
        elif isinstance(statement, k.If):
            branches = [_block(body, known) for body in (statement.then, statement.otherwise)]
            total.add(max(branches, key=_size), 1)
        elif isinstance(statement, k.While):
            total.add(_block(statement.body, known), 1)
        elif isinstance(statement, k.Store):
            _scalar(statement.value, total, seen)
            _touch(total, statement.buffer, statement.value.lanes)
        elif isinstance(statement, k.Define):
            _scalar(statement.value, total, seen)
    return total


def _size(work: Work) -> float:
    return work.flops + work.integer_ops + sum(work.dots.values()) + sum(work.touched.values())


def _loop(loop: k.For, bindings: Mapping[str, int]) -> Work:
    extent = max(0, _number(loop.extent, bindings))
    turns = range(0, extent, loop.step)
    total = Work()
    if not turns:
        return total
    if not _depends(loop.body, loop.index):
        total.add(_block(loop.body, {**bindings, loop.index: 0}), len(turns))
        return total
    sample = turns[:: -(-len(turns) // ONE_BY_ONE)]
    for index in sample:
        total.add(_block(loop.body, {**bindings, loop.index: index}), len(turns) / len(sample))
    return total


def _depends(block: k.Block, index: str) -> bool:
    """Whether the extents of loops inside hang on an index, by way of what is named too."""
    names = {index}
    for statement in k.walk(block):
        if isinstance(statement, k.Let):
            value = statement.value
            free = value.free if isinstance(value, Scalar) else free_symbols(value)
            names |= {statement.name} if free & names else set()
        elif isinstance(statement, k.For) and free_symbols(statement.extent) & names:
            return True
    return False


def _scalar(scalar: Scalar, work: Work, seen: set[bytes], times: float = 1) -> None:
    if scalar.digest in seen:
        return
    seen.add(scalar.digest)
    if isinstance(scalar, s.Load):
        _touch(work, scalar.buffer, scalar.lanes * times)
    operations = scalar.lanes * times * _operations(scalar)
    if isinstance(scalar, s.Call):
        if operations:
            work.dots[scalar.name] = work.dots.get(scalar.name, 0.0) + operations
    elif scalar.dtype.is_float:
        work.flops += operations
    else:
        work.integer_ops += operations
    for child in scalar.children:
        _scalar(child, work, seen, times)


def _operations(scalar: Scalar) -> int:
    if isinstance(scalar, s.Fma):
        return 2
    if isinstance(scalar, s.Binary):
        return int(scalar.op in _ARITHMETIC)
    if isinstance(scalar, s.Unary):
        return int(scalar.op not in _FREE)
    if isinstance(scalar, s.Call):
        group = _DOT.match(scalar.name)
        return 2 * int(group[1]) if group else 0
    return int(isinstance(scalar, s.Horizontal))


def _touch(work: Work, buffer: s.Buffer, count: float) -> None:
    if buffer.space == "parameter":
        work.touched[buffer.name] = work.touched.get(buffer.name, 0.0) + count * buffer.dtype.bytes


def _number(dim: Dim, bindings: Mapping[str, int]) -> int:
    """A dim's value; what only a run can tell counts as 1."""
    try:
        return evaluate(dim, bindings)
    except (KeyError, ZeroDivisionError):
        return 1
