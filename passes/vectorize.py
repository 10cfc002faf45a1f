"""Vector loops become explicit lanes.

A loop of kind "vector" over `v < n` is cut into steps of so many lanes: in a step `v` is a base plus the lane's number,
so every index that is linear in `v` is a base and a stride, and what does not depend on `v` stays scalar. What remains
of `n` is done by narrower steps, by one masked step, or by a scalar loop. A scalar that the loop only ever adds to (or
multiplies, minimises...) is accumulated in vectors and combined after the loop; a scalar that lives inside the loop
becomes a vector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..ir import loops
from ..ir import scalars as s
from ..ir.dims import Dim, bounds, ceildiv, floordiv, symbol
from ..ir.dtypes import BF16, BOOL, F16, F32, F64, I64, DType
from ..ir.loops import Alias, Alloc, Block, Define, For, If, Kernel, Let, Statement, Store
from ..ir.scalars import Buffer, Load, Rewriter, Scalar
from ..ir.target import Target
from .vector_step import Key, NotVectorizable, Step, as_update

_TINY_BODY = 8  # Nodes of an elementwise body below which the loop's own two instructions are worth halving.
_FUNCTION_NODES = 20  # What a function becomes later.
_FUNCTIONS = (*s.MATH, "pow")
# Nodes of a body with inner loops up to which a step has four registers: whole runs of cache lines are used at a time,
# three times as fast where rows are a multiple of 4 KiB apart.
_JAMMED_BODY = 40
_UNROLLED_BODY = 80  # Nodes of a reduction's body above which arithmetic hides the latency of one accumulator.


@dataclass(frozen=True)
class Vectors:
    """How to vectorise: the width of a register in bits, a limit on lanes, how many accumulators a long reduction has,
    whether a remainder is one step with masked loads and stores, and how many bytes lie in each of the vectors that a
    look-up in a table of 256 bytes takes (0: it is done byte by byte)."""

    bits: int
    max_lanes: int = 64
    unroll: int = 4
    masked: bool = False
    lookups: int = 0

    @staticmethod
    def of(target: Target) -> Vectors:
        """What suits a machine."""
        lookups = 64 if target.has("avx512vbmi") else 16 if target.has("ssse3") or target.has("neon") else 0
        return Vectors(target.vector_bits, masked=target.has("avx512vl"), lookups=lookups)


def vectorize(kernel: Kernel, vectors: Vectors) -> Kernel:
    """`kernel` without loops of kind "vector"."""
    names = {parameter.name for parameter in kernel.parameters} | set(kernel.sizes)
    for statement in loops.walk(kernel.body):
        names |= _declared(statement)
    return replace(kernel, body=_Vectorizer(vectors, names).block(kernel.body))


def _declared(statement: Statement) -> set[str]:
    """The name that a statement introduces."""
    if isinstance(statement, For):
        return {statement.index}
    if isinstance(statement, Let):
        return {statement.name}
    return {statement.buffer.name} if isinstance(statement, Define | Alloc | Alias) else set()


def _expressions(statement: Statement) -> list[Scalar]:
    """The expressions that a statement holds itself, those of its dims wrapped as indices."""
    found: list[Scalar | Dim | None] = []
    if isinstance(statement, For):
        found = [statement.extent]
    elif isinstance(statement, Let | Define):
        found = [statement.value]
    elif isinstance(statement, Alloc):
        found = [statement.buffer.size]
    elif isinstance(statement, Alias):
        found = [statement.offset, statement.condition]
    elif isinstance(statement, Store):
        found = [statement.offset, statement.stride, statement.value, statement.predicate]
    elif isinstance(statement, If | loops.While):
        found = [statement.condition]
    return [x if isinstance(x, Scalar) else s.Index(I64, 1, x) for x in found if x is not None]


def carried(body: Block, index: str) -> dict[Key, tuple[Buffer, str]]:
    """The scalars outside the loop that its body only ever combines values into: (buffer, offset) to the buffer and the
    combining operation. Raises NotVectorizable for any other use of a fixed element."""
    statements = list(loops.walk(body))
    inner = {index}.union(*map(_declared, statements))
    found: dict[Key, tuple[Buffer, str]] = {}
    allowed: set[str] = set()
    for statement in statements:
        if not isinstance(statement, Store) or statement.buffer.name in inner:
            continue
        key = statement.buffer.name, statement.offset
        if s.free_symbols(statement.offset) & inner:
            if any(name == statement.buffer.name for name, _ in found) or statement.buffer.space == "register":
                raise NotVectorizable
            continue
        update = as_update(statement)
        if update is None or (key in found and found[key][1] != update.op) or statement.value.lanes != 1:
            raise NotVectorizable
        found[key] = statement.buffer, update.op
        allowed.add(statement.buffer.name)
    for statement in statements:
        update = as_update(statement) if isinstance(statement, Store) and statement.buffer.name in allowed else None
        for expression in _expressions(statement) if update is None else update.operands:
            if any(isinstance(part, Load) and part.buffer.name in allowed for part in s.walk(expression)):
                raise NotVectorizable
    return found


def _lane_bits(body: Block, index: str) -> int:
    """Bits of the element that decides how many lanes fit: floats before integers, f32 before f64, else the widest."""
    types: set[DType] = set()
    computed: set[DType] = set()
    for statement in loops.walk(body):
        for expression in _expressions(statement):
            for part in s.walk(expression):
                if isinstance(part, Load):
                    types.add(part.buffer.dtype)
                elif isinstance(part, s.Unary | s.Fma | s.Binary | s.Cast) and part.dtype != BOOL:
                    computed.add(part.dtype)
        if isinstance(statement, Store):
            types.add(statement.buffer.dtype)
    if F32 in types | computed or computed & {F16, BF16}:
        return 32
    if F64 in types | computed:
        return 64
    return max((max(dtype.bits, 8) for dtype in types), default=32)


def _node_count(body: Block) -> int:
    """Distinct nodes of all expressions, functions counted as what they become."""
    seen: set[bytes] = set()
    parts = [
        part for statement in loops.walk(body) for whole in _expressions(statement) for part in s.walk(whole, seen)
    ]
    functions = sum(isinstance(part, s.Unary | s.Binary) and part.op in _FUNCTIONS for part in parts)
    return len(parts) + functions * _FUNCTION_NODES


def _indexes_registers(body: Block, index: str) -> bool:
    """Whether registers are chosen by a loop index, which must then be a constant in each iteration."""
    for statement in loops.walk(body):
        if isinstance(statement, Store) and statement.buffer.space == "register" and _names(statement.offset, index):
            return True
        for expression in _expressions(statement):
            for part in s.walk(expression):
                if isinstance(part, Load) and part.buffer.space == "register" and _names(part.offset, index):
                    return True
    return False


def _names(dim: Dim, index: str) -> bool:
    return index in s.free_symbols(dim)


def _sums_in_registers(body: Block) -> bool:
    """Whether inner loops only combine values into the body's own registers."""
    inner = [new for statement in body if isinstance(statement, For) for new in loops.walk(statement.body)]
    stores = [statement for statement in inner if isinstance(statement, Store)]
    own = all(
        not isinstance(statement, Alloc) or statement.buffer.space == "register" for statement in loops.walk(body)
    )
    return own and all(store.buffer.space == "register" for store in stores)


def _unroll(body: Block) -> Block:
    """`body` with its unrolled loops that choose registers written out, so that every register has a fixed number."""
    result: list[Statement] = []
    for statement in body:
        if isinstance(statement, For):
            statement = replace(statement, body=_unroll(statement.body))
            extent = statement.extent
            names = any(map(_declared, loops.walk(statement.body)))
            if isinstance(extent, int) and not names and _indexes_registers(statement.body, statement.index):
                for position in range(0, extent, statement.step):
                    result += loops.rebuild(statement.body, Rewriter(dims={statement.index: position}))
                continue
        result.append(statement)
    return tuple(result)


class _Vectorizer:
    def __init__(self, vectors: Vectors, names: set[str]):
        self.vectors = vectors
        self.names = names

    def fresh(self, name: str) -> str:
        """A name not used before, after `name`."""
        number = 2
        while f"{name}_{number}" in self.names:
            number += 1
        self.names.add(f"{name}_{number}")
        return f"{name}_{number}"

    def block(self, block: Block) -> Block:
        result: list[Statement] = []
        for statement in block:
            if isinstance(statement, For) and statement.kind == "vector":
                result += self.vector_loop(statement)
            elif isinstance(statement, For | loops.While):
                result.append(replace(statement, body=self.block(statement.body)))
            elif isinstance(statement, If):
                then, otherwise = self.block(statement.then), self.block(statement.otherwise)
                result.append(replace(statement, then=then, otherwise=otherwise))
            else:
                result.append(statement)
        return tuple(result)

    def vector_loop(self, loop: For) -> list[Statement]:
        """What replaces a vector loop."""
        index, extent, body = loop.index, loop.extent, loop.body
        if loop.step != 1:
            scaled = Rewriter(dims={index: symbol(index) * loop.step})
            extent, body = ceildiv(extent, loop.step), loops.rebuild(body, scaled)
        limit = bounds(extent)[1]
        if limit is not None and limit <= 0:
            return []
        straight = not any(isinstance(inner, For | loops.While) for inner in loops.walk(body))
        short = straight and isinstance(extent, int) and extent < 4
        serial = For(
            index, extent, self.block(body), "unrolled" if short or _indexes_registers(body, index) else "serial"
        )
        if any(isinstance(inner, For) and inner.kind == "vector" for inner in loops.walk(body)):
            return [serial]
        lanes = min(self.vectors.bits // _lane_bits(body, index), self.vectors.max_lanes)
        if limit is not None and limit < lanes and not (self.vectors.masked and limit >= 4 and limit & (limit - 1)):
            lanes = 1 << (limit.bit_length() - 1)
        if lanes < 2 or (limit is not None and limit < 4):
            return [serial]
        try:
            return self.stages(index, extent, _unroll(body), lanes, straight)
        except NotVectorizable:
            return [serial]

    def stages(self, index: str, extent: Dim, body: Block, lanes: int, straight: bool) -> list[Statement]:
        """The vector steps, from the widest to the scalar remainder."""
        reductions = carried(body, index)
        nodes = _node_count(body)
        unroll = 1
        if straight and reductions and nodes < _UNROLLED_BODY:
            unroll = self.vectors.unroll
        elif straight and nodes < _TINY_BODY:
            unroll = 2
        while unroll > 1 and isinstance(extent, int) and extent < 2 * lanes * unroll:
            unroll //= 2
        steps = [(lanes, unroll)] if unroll == 1 else [(lanes, unroll), (lanes, 1)]
        if not straight and not reductions and nodes < _JAMMED_BODY and lanes >= 4 and _sums_in_registers(body):
            steps.insert(0, (4 * lanes, 1))
        narrow = lanes // 2
        if isinstance(extent, int) and not reductions:
            odd = extent % lanes
            while narrow >= 4 and not (self.vectors.masked and odd & (odd - 1)):
                steps, narrow, odd = [*steps, (narrow, 1)], narrow // 2, odd % narrow
        elif lanes >= 16 and not reductions and not self.vectors.masked:
            steps.append((lanes // 4, 1))

        before: list[Statement] = []
        result: list[Statement] = []
        accumulators: list[dict[Key, Buffer]] = [{} for _ in range(unroll)]
        for key, (buffer, op) in reductions.items():
            for copy in accumulators:
                copy[key] = Buffer(self.fresh(f"{buffer.name}_lanes"), buffer.dtype, 1, "register", lanes)
                before.append(Define(copy[key], s.const(s.IDENTITY[op](buffer.dtype), buffer.dtype, lanes)))
        start: Dim = 0
        for width, copies in steps:
            count = floordiv(extent - start, width * copies)
            if count == 0:
                continue
            at = symbol(index, 0, count - 1) if count != 1 else 0
            inner: list[Statement] = []
            for number in range(copies):
                base = start + (at * copies + number) * width
                rename = count == 1 or number > 0
                step = Step(self.fresh, width, index, base, accumulators[number], None, rename, self.vectors.lookups)
                inner += step.block(body)
                step.check_cost()
            result += inner if count == 1 else [For(index, count, tuple(inner))]
            start = start + count * width * copies
        left: Dim = extent - start
        if self.vectors.masked and left != 0 and left != 1:
            condition = s.binary("lt", s.const(0, I64), s.index(left))
            step = Step(self.fresh, lanes, index, start, accumulators[0], left, True, self.vectors.lookups)
            masked = step.block(body)
            step.check_cost()
            result += masked if isinstance(condition, s.Const) else [If(condition, tuple(masked))]
            left = 0
        for key, (buffer, op) in reductions.items():
            parts = [s.load(copy[key], 0, lanes) for copy in accumulators]
            while len(parts) > 1:
                parts = [s.binary(op, a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
            total = s.Horizontal(buffer.dtype, 1, op, parts[0])
            result.append(Store(buffer, key[1], s.binary(op, s.load(buffer, key[1]), total)))
        if left != 0:
            few = isinstance(left, int) and left < 4 and straight
            rest = Rewriter(dims={index: start + (symbol(index, 0, left - 1) if left != 1 else 0)})
            result.append(For(index, left, loops.rebuild(body, rest), "unrolled" if few else "serial"))
        return before + result
