"""The generic schedule: tensors by definition become one loop nest.

A definition, inlined down to the buffers, is one expression per output element. Reductions in it are hoisted to the
outermost loop whose indices they need, so softmax and layer normalisation turn into a few passes over a row, pooling
into a window per element, and a whole chain of elementwise operators into one loop, whichever way they were spelt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir import loops as k
from ..ir import scalars as s
from ..ir.dims import (
    Dim,
    Opaque,
    Quotient,
    Sum,
    atoms,
    ceildiv,
    dim_max,
    dim_min,
    known_le,
    linear,
    product,
    symbol,
)
from ..ir.scalars import Buffer, Scalar
from ..ir.tensors import Indices, Tensor, flat_offset

# A row that is kept between passes lies on the stack up to this size (a fraction of any L1 cache); above it, it is
# recomputed.
ROW_BUFFER_BYTES = 16384
# Work in scalar operations below which sharing among threads costs more than it saves (some microseconds).
PARALLEL_WORK = 40_000
# Elements of a flat loop that one thread takes at a time.
CHUNK = 8192
# Parts of a reduction of everything to one element, which threads share.
PARTS = 64
# What an expression costs from which on it is kept for a later pass, if there is room.
KEPT_COST = 12
# Iterations up to which a loop is not worth vectors.
SHORT = 7

_COST: Mapping[str, int] = {"div": 6, "rem": 12, "pow": 30, "sqrt": 6}


@dataclass(frozen=True)
class Sharing:
    """When loops are shared among threads: from so much `work` on (scalar operations); flat ones in chunks of so many
    elements (None: each element on its own)."""

    work: int = PARALLEL_WORK
    chunk: int | None = CHUNK


ALWAYS = Sharing(0, None)
"""Every loop that can be shared is: for a GPU."""


@dataclass(frozen=True)
class Axis:
    """A loop: its index name and extent."""

    name: str
    extent: Dim

    @property
    def index(self) -> Dim:
        return k.index_symbol(self.name, self.extent)


@dataclass(frozen=True)
class Output:
    """One result: where it is stored, and its element, over the indices of the axes."""

    buffer: Buffer
    offset: Dim
    value: Scalar


def cost(value: Scalar) -> int:
    """Scalar operations that one evaluation takes, reductions inside counted once per iteration (64 if unknown)."""
    total = 0
    for node in s.walk(value):
        if isinstance(node, s.Unary):
            total += 16 if node.op in s.MATH else _COST.get(node.op, 1)
        elif isinstance(node, s.Reduce):
            trips = 1
            for _, extent in node.ranges:
                trips *= extent if isinstance(extent, int) else 64
            total += trips * max(1, cost(node.body))
        elif isinstance(node, s.Binary):
            total += _COST.get(node.op, 1)
        elif not isinstance(node, (*s.LITERALS, s.Index, s.Broadcast)):
            total += 1
    return total


def build_nests(outputs: Sequence[tuple[Buffer, Tensor]], sharing: Sharing | None = None) -> k.Block:
    """Statements that store every output; outputs of one shape share a nest."""
    by_shape: dict[tuple[Dim, ...], list[tuple[Buffer, Tensor]]] = {}
    for buffer, tensor in outputs:
        by_shape.setdefault(tensor.shape, []).append((buffer, tensor))
    nests: list[tuple[str, list[Axis], list[Output]]] = []
    for number, (shape, group) in enumerate(by_shape.items()):
        if 0 in shape:
            continue
        prefix = "i" if number == 0 else f"n{number}i"
        axes = [Axis(f"{prefix}{a}", extent) for a, extent in enumerate(shape) if extent != 1]
        names = {a: Axis(f"{prefix}{a}", extent).index for a, extent in enumerate(shape) if extent != 1}
        indices: Indices = tuple(names.get(a, 0) for a in range(len(shape)))
        stores = [Output(buffer, flat_offset(indices, shape), tensor.at(indices)) for buffer, tensor in group]
        nests.append((prefix, axes, stores))
    sharing = sharing or Sharing()
    block, done = _whole_reductions([[o.value for o in stores] for _, _, stores in nests], sharing)
    for prefix, axes, stores in nests:
        stores = [replace(o, value=_replace(o.value, done, {})) for o in stores]
        block += _Nest(axes, stores, prefix, sharing).build()
    return tuple(block)


def _whole_reductions(
    nests: Sequence[Sequence[Scalar]], sharing: Sharing
) -> tuple[list[k.Statement], dict[bytes, Scalar]]:
    """What is reduced to one element for a whole kernel, and is needed by several of its nests or worth sharing among
    threads: the loops that do it, and what stands for each in the nests' values."""
    uses: dict[bytes, list[int]] = {}
    found: dict[bytes, s.Reduce] = {}
    for number, values in enumerate(nests):
        for reduce in (r for value in values for r in all_reductions(value)):
            indices = [name for name in reduce.free if name.startswith(("i", "n", "r"))]
            if not indices and not _inside(reduce) - {reduce.digest}:
                found[reduce.digest] = reduce
                uses.setdefault(reduce.digest, []).append(number)
    builder = _Nest([], [], "a", sharing)
    chosen = [r for r in found.values() if len(set(uses[r.digest])) > 1 or builder.shares(r)]
    block: list[k.Statement] = []
    done: dict[bytes, Scalar] = {}
    while chosen:
        together = [r for r in chosen if r.ranges == chosen[0].ranges]
        chosen = [r for r in chosen if r not in together]
        if all(map(builder.shares, together)):
            block += builder.reduce_in_parts(together, done)
        else:
            block += builder.reduce_together(together, done, {}, [], [])
    return block, done


def unit_stride(value: Scalar, name: str) -> int:
    """How well loads of `value` suit vectors along an index: +1 for each contiguous one, -3 for each scattered one."""
    score = 0
    for node in s.walk(value):
        if isinstance(node, s.Load | s.Element):
            offset = node.offset if isinstance(node, s.Load) else node.indices[-1] if node.indices else 0
            if name not in s.free_symbols(offset):
                continue
            split = linear(offset, name)
            score += 1 if split is not None and split[0] == 1 else -3
    return score


def collapse(
    axes: Sequence[Axis], values: Sequence[Scalar], offsets: Sequence[Dim], stem: str
) -> tuple[list[Axis], list[Scalar], list[Dim]]:
    """Merges neighbouring axes where every address stays free of divisions: [N, C, H, W] to one loop where nothing
    is broadcast."""
    axes, values, offsets = list(axes), list(values), list(offsets)
    position = len(axes) - 1
    while position > 0:
        outer, inner = axes[position - 1], axes[position]
        if inner.extent == 0 or outer.extent == 0:
            break
        merged = Axis(f"{stem}{outer.name}{inner.name}", outer.extent * inner.extent)
        values_for = {outer.name: merged.index // inner.extent, inner.name: merged.index % inner.extent}
        rewriter = s.Rewriter(dims=values_for)
        try_values = [rewriter(value) for value in values]
        try_offsets = [rewriter.dim(offset) for offset in offsets]
        if not any(_divides(v, merged.name) for v in try_values) and not any(
            _dim_divides(o, merged.name) for o in try_offsets
        ):
            axes[position - 1 : position + 1] = [merged]
            values, offsets = try_values, try_offsets
        position -= 1
    return axes, values, offsets


def _divides(value: Scalar, name: str) -> bool:
    return any(_dim_divides(dim, name) for node in s.walk(value) if node.dims for dim in node.dims)


def _dim_divides(dim: Dim, name: str) -> bool:
    if not isinstance(dim, Sum):
        return False
    for atom in atoms(dim):
        if isinstance(atom, Quotient) and name in s.free_symbols(atom.numerator):
            return True
        if isinstance(atom, Opaque) and isinstance(atom.value, Scalar) and _divides(atom.value, name):
            return True
    return False


def reductions(value: Scalar) -> list[s.Reduce]:
    """The reductions of an expression that are not inside another's body, in index expressions too."""
    found: dict[bytes, s.Reduce] = {}
    seen: set[bytes] = set()

    def visit(node: Scalar) -> None:
        if node.digest in seen:
            return
        seen.add(node.digest)
        if isinstance(node, s.Reduce):
            found[node.digest] = node
            return
        for dim in node.dims:
            if isinstance(dim, Sum):
                for atom in atoms(dim):
                    if isinstance(atom, Opaque) and isinstance(atom.value, Scalar):
                        visit(atom.value)
        for child in node.children:
            visit(child)

    visit(value)
    return list(found.values())


def all_reductions(value: Scalar) -> list[s.Reduce]:
    """All reductions of an expression, inner ones before those around them."""
    return [node for node in s.walk(value) if isinstance(node, s.Reduce)]


class _Nest:
    """Builds the loops of the outputs of one shape."""

    def __init__(self, axes: list[Axis], outputs: list[Output], prefix: str, sharing: Sharing) -> None:
        self.sharing = sharing
        values, offsets = [o.value for o in outputs], [o.offset for o in outputs]
        axes, values, offsets = collapse(axes, values, offsets, "")
        self.outputs = [Output(o.buffer, f, v) for o, f, v in zip(outputs, offsets, values, strict=True)]
        self.prefix = prefix
        self.registers = 0
        needed = [set(r.free) for v in values for r in all_reductions(v)]
        rows = set().union(*needed) if needed else set()
        self.row_axes = [axis for axis in axes if axis.name in rows]
        self.inner_axes = [axis for axis in axes if axis.name not in rows]
        self.vector = self._choose_vector(axes)
        if self.vector is not None and self.vector in self.row_axes:
            self.row_axes.remove(self.vector)
            self.row_axes.append(self.vector)

    def _choose_vector(self, axes: list[Axis]) -> Axis | None:
        """The output axis to vectorise over; None leaves the vectors to the loops inside."""
        if not axes:
            return None
        last = axes[-1]
        scores: dict[Axis, int] = {}
        for axis in {last, *self.row_axes[-1:], *self.inner_axes[-1:]}:
            scores[axis] = sum(
                unit_stride(o.value, axis.name) + (2 if linear(o.offset, axis.name) == _unit(o.offset, axis) else -2)
                for o in self.outputs
            )
        best = max(scores, key=lambda axis: (scores[axis], axis is last))
        inside = 0
        for output in self.outputs:
            for reduce in all_reductions(output.value):
                # Windows are shorter than vectors: what they would gain does not count.
                if reduce.ranges and not known_le(reduce.ranges[-1][1], SHORT):
                    inside += unit_stride(reduce.body, reduce.ranges[-1][0])
        if self.inner_axes and best in self.inner_axes:
            return best
        small = known_le(best.extent, 3)
        if scores[best] < 0 or small or (inside > 0 and inside >= scores[best] and best in self.row_axes):
            return None if inside > 0 or scores[best] < -3 or small else best
        return best

    def build(self) -> k.Block:
        values = [o.value for o in self.outputs]
        inner: list[k.Statement] = list(self._rows(values))
        outer_rows = [axis for axis in self.row_axes if axis is not self.vector]
        if self.vector is not None and self.vector in self.row_axes:
            inner = [k.loop(self.vector.name, self.vector.extent, inner, "vector")]
        return tuple(self._threads(outer_rows, inner, values))

    def _threads(self, rows: list[Axis], inner: list[k.Statement], values: list[Scalar]) -> list[k.Statement]:
        """The outer loops; shared among threads where that pays."""
        work = sum(cost(value) for value in values)
        every = rows + ([self.vector] if self.vector in self.row_axes and self.vector else []) + self.inner_axes
        total = product(axis.extent for axis in every)
        small = isinstance(total, int) and total * work < self.sharing.work
        if small or not rows:
            for axis in reversed(rows):
                inner = [k.loop(axis.name, axis.extent, inner)]
            return inner
        if len(rows) == 1:
            return [k.loop(rows[0].name, rows[0].extent, inner, "parallel")]
        # One parallel loop over all outer axes: a batch of 1 in front must not leave threads without work.
        flat = Axis(f"{self.prefix}p", product(axis.extent for axis in rows))
        rest: Dim = flat.index
        lets: list[k.Statement] = []
        for axis in reversed(rows[1:]):
            lets.append(k.Let(axis.name, rest % axis.extent))
            rest = rest // axis.extent
        lets.append(k.Let(rows[0].name, rest))
        return [k.loop(flat.name, flat.extent, lets + inner, "parallel")]

    def _register(self, stem: str, dtype: object) -> Buffer:
        self.registers += 1
        return Buffer(f"{self.prefix}_{stem}{self.registers}", dtype, 1, "register")  # type: ignore[arg-type]

    def _rows(self, values: list[Scalar]) -> k.Block:
        """What happens for one setting of the row axes: reductions in order, then the inner loops that store."""
        block: list[k.Statement] = []
        row_names = {axis.name for axis in self.row_axes}
        available = set(row_names)
        pending = [r for value in values for r in all_reductions(value)]
        pending = list(dict.fromkeys(r for r in pending if self._hoistable(r, available)))
        done: dict[bytes, Scalar] = {}
        kept: dict[bytes, tuple[Buffer, Dim]] = {}
        while pending:
            ready = [r for r in pending if not any(p.digest in _inside(r) for p in pending if p is not r)]
            first = ready[0]
            together = [r for r in ready if r.ranges == first.ranges]
            pending = [r for r in pending if r not in together]
            block += self.reduce_together(together, done, kept, values, pending)
        values = [_replace(value, done, kept) for value in values]
        body: list[k.Statement] = []
        for output, value in zip(self.outputs, values, strict=True):
            lowered = self.lower_value(value, body)
            body.append(k.Store(output.buffer, output.offset, lowered))
        block += self._inner_loops(body, values)
        return tuple(block)

    @staticmethod
    def _hoistable(reduce: s.Reduce, available: set[str]) -> bool:
        return reduce.free <= available | {n for n in reduce.free if not n.startswith(("i", "n", "r"))} and not any(
            name.startswith("r") and "_" in name for name in reduce.free
        )

    def _inner_loops(self, body: list[k.Statement], values: list[Scalar]) -> list[k.Statement]:
        axes = list(self.inner_axes)
        if self.vector in axes and self.vector is not None:
            axes.remove(self.vector)
            axes.append(self.vector)
        for position, axis in enumerate(reversed(axes)):
            vectorised = axis is self.vector and position == 0
            whole = len(axes) == 1 and not self.row_axes and position == 0
            work = sum(cost(value) for value in values)
            large = not isinstance(axis.extent, int) or axis.extent * work >= self.sharing.work
            chunk = self.sharing.chunk
            chunked = chunk is not None and not (isinstance(axis.extent, int) and axis.extent < 2 * chunk)
            if whole and large and vectorised and chunk is not None and chunked:
                body = self._chunks(axis, body, chunk)
            else:
                outermost = position == len(axes) - 1 and not self.row_axes and position > 0
                total = product(a.extent for a in axes)
                big = not isinstance(total, int) or total * work >= self.sharing.work
                outermost = outermost or self.sharing.chunk is None
                kind = "vector" if vectorised else "parallel" if outermost and big else "serial"
                body = [k.loop(axis.name, axis.extent, body, kind)]
        return body

    def _chunks(self, axis: Axis, body: list[k.Statement], size: int) -> list[k.Statement]:
        """A flat loop shared among threads in chunks."""
        chunk = Axis(f"{axis.name}c", ceildiv(axis.extent, size))
        within = f"{axis.name}v"
        length = f"{axis.name}n"
        limit = dim_min(size, axis.extent - chunk.index * size)
        inner = symbol(within, 0, size - 1)
        moved = [rename(statement, {axis.name: chunk.index * size + inner}) for statement in body]
        extent = symbol(length, 0, size)
        return [
            k.loop(
                chunk.name,
                chunk.extent,
                [k.Let(length, limit), k.loop(within, extent, moved, "vector")],
                "parallel",
            )
        ]

    def reduce_together(
        self,
        group: list[s.Reduce],
        done: dict[bytes, Scalar],
        kept: dict[bytes, tuple[Buffer, Dim]],
        values: list[Scalar],
        pending: list[s.Reduce],
    ) -> list[k.Statement]:
        """Loops that compute reductions over the same ranges in one pass; results are registered in `done`."""
        block: list[k.Statement] = []
        self.registers += 1
        names = {old: f"{self.prefix}r{self.registers}_{a}" for a, (old, _) in enumerate(group[0].ranges)}
        axes = [Axis(names[old], extent) for old, extent in group[0].ranges]
        renamed = {old: axis.index for (old, _), axis in zip(group[0].ranges, axes, strict=True)}
        bodies = [s.Rewriter(dims=renamed)(_replace(r.body, done, kept)) for r in group]
        body: list[k.Statement] = []
        keep = self._row_to_keep(group, bodies, axes, done, values, pending)
        if keep is not None:
            expression, buffer, offset, statements, entries = keep
            block += statements
            body.append(k.Store(buffer, offset, self.lower_value(expression, body)))
            bodies = [_replace_exactly(b, expression, s.load(buffer, offset)) for b in bodies]
            kept.update(entries)
        else:
            axes, bodies, _ = collapse(axes, bodies, [], "")
        for reduce, value in zip(group, bodies, strict=True):
            register = self._register(reduce.op, reduce.dtype)
            block.append(k.Define(register, s.const(s.IDENTITY[reduce.op](reduce.dtype), reduce.dtype)))
            value = self.lower_value(value, body)
            body.append(k.Store(register, 0, combined(reduce.op, s.load(register, 0), value)))
            done[reduce.digest] = s.load(register, 0)
        outside = self.vector is not None and self.vector in self.row_axes
        vector_here = not outside and bool(axes) and all(unit_stride(value, axes[-1].name) >= 0 for value in bodies)
        for position, axis in enumerate(reversed(axes)):
            kind = "vector" if position == 0 and vector_here else "serial"
            body = [k.loop(axis.name, axis.extent, body, kind)]
        return block + body

    def shares(self, reduce: s.Reduce) -> bool:
        """Whether threads share a reduction: where it is long, and nothing of it is worth keeping."""
        size, work = product(extent for _, extent in reduce.ranges), max(1, cost(reduce.body))
        long = not isinstance(size, int) or (size >= 2 * CHUNK and size * work >= self.sharing.work)
        return self.sharing.chunk is not None and long and work < KEPT_COST

    def reduce_in_parts(self, group: list[s.Reduce], done: dict[bytes, Scalar]) -> list[k.Statement]:
        """As `reduce_together`, in `PARTS` parts that are combined in the end, however many threads there are."""
        self.registers += 1
        stem = f"{self.prefix}{self.registers}"
        axes = [Axis(f"{stem}_{a}", extent) for a, (_, extent) in enumerate(group[0].ranges)]
        renamed = {old: axis.index for (old, _), axis in zip(group[0].ranges, axes, strict=True)}
        axes, bodies, _ = collapse(axes, [s.Rewriter(dims=renamed)(r.body) for r in group], [], "")
        outer, length = axes[0], ceildiv(axes[0].extent, PARTS)
        part, count = Axis(f"{stem}c", PARTS).index, symbol(f"{stem}n", 0, length)
        within = Axis(f"{stem}v", length) if len(axes) == 1 else Axis(f"{stem}o", length)
        moved = s.Rewriter(dims={outer.name: part * length + symbol(within.name, 0, length - 1)})
        before: list[k.Statement] = []
        body: list[k.Statement] = []
        first: list[k.Statement] = [k.Let(f"{stem}n", dim_max(0, dim_min(length, outer.extent - part * length)))]
        last: list[k.Statement] = []
        after: list[k.Statement] = []
        turn = Axis(f"{stem}t", PARTS).index
        for reduce, value in zip(group, bodies, strict=True):
            identity = s.const(s.IDENTITY[reduce.op](reduce.dtype), reduce.dtype)
            one, total = self._register(reduce.op, reduce.dtype), self._register(reduce.op, reduce.dtype)
            partial = Buffer(f"{one.name}_parts", reduce.dtype, PARTS, "stack")
            before += [k.Alloc(partial), k.Define(total, identity)]
            first.append(k.Define(one, identity))
            body.append(k.Store(one, 0, combined(reduce.op, s.load(one, 0), moved(value))))
            last.append(k.Store(partial, part, s.load(one, 0)))
            after.append(k.Store(total, 0, combined(reduce.op, s.load(total, 0), s.load(partial, turn))))
            done[reduce.digest] = s.load(total, 0)
        inner = axes[-1] if len(axes) > 1 else within
        kind = "vector" if all(unit_stride(value, inner.name) >= 0 for value in bodies) else "serial"
        for axis in reversed(axes[1:]):
            body = [k.loop(axis.name, axis.extent, body, kind if axis is inner else "serial")]
        body = [k.loop(within.name, count, body, kind if len(axes) == 1 else "serial")]
        parts = k.loop(f"{stem}c", PARTS, [*first, *body, *last], "parallel")
        return [*before, parts, k.loop(f"{stem}t", PARTS, after, "vector")]

    def _row_to_keep(
        self,
        group: list[s.Reduce],
        bodies: list[Scalar],
        axes: list[Axis],
        done: dict[bytes, Scalar],
        values: list[Scalar],
        pending: list[s.Reduce],
    ) -> tuple[Scalar, Buffer, Dim, list[k.Statement], dict[bytes, tuple[Buffer, Dim]]] | None:
        """A costly part of the pass over a row that a later pass needs again, with where to keep it."""
        if len(axes) != len(self.inner_axes) or any(
            a.extent != b.extent for a, b in zip(axes, self.inner_axes, strict=True)
        ):
            return None
        to_inner = {axis.name: inner.index for axis, inner in zip(axes, self.inner_axes, strict=True)}
        rewriter = s.Rewriter(dims=to_inner)
        later = {node.digest: node for value in values for node in s.walk(_replace(value, done, {}))}
        candidates: list[tuple[int, Scalar, Scalar]] = []
        for body in bodies:
            for node in s.walk(body):
                if not isinstance(node, (*s.LITERALS, s.Load, s.Index)) and node.free & to_inner.keys():
                    moved = rewriter(node)
                    if moved.digest in later and cost(node) >= KEPT_COST and not all_reductions(node):
                        candidates.append((cost(node), node, moved))
        if not candidates:
            return None
        _, expression, moved = max(candidates, key=lambda item: item[0])
        row = flat_offset([axis.index for axis in axes], [axis.extent for axis in axes])
        inner_row = flat_offset([axis.index for axis in self.inner_axes], [axis.extent for axis in self.inner_axes])
        entries: dict[bytes, tuple[Buffer, Dim]] = {}
        for output in self.outputs:
            # The output row itself can hold it: the last pass reads each element just before it overwrites it.
            if output.buffer.dtype == expression.dtype and len(self.outputs) == 1 and not pending_reads(pending, moved):
                offset = s.Rewriter(dims={i.name: a.index for i, a in zip(self.inner_axes, axes, strict=True)}).dim(
                    output.offset
                )
                entries[moved.digest] = (output.buffer, output.offset)
                return expression, output.buffer, offset, [], entries
        size = product(axis.extent for axis in axes)
        outside = self.vector is not None and self.vector in self.row_axes
        if isinstance(size, int) and size * expression.dtype.bytes <= ROW_BUFFER_BYTES and not outside:
            self.registers += 1
            buffer = Buffer(f"{self.prefix}_row{self.registers}", expression.dtype, size, "stack")
            entries[moved.digest] = (buffer, inner_row)
            return expression, buffer, row, [k.Alloc(buffer)], entries
        return None

    def lower_value(self, value: Scalar, block: list[k.Statement]) -> Scalar:
        """`value` with the reductions left in it computed by statements added to `block`."""
        found = reductions(value)
        if not found:
            return value
        done: dict[bytes, Scalar] = {}
        for reduce in found:
            self.registers += 1
            register = self._register(reduce.op, reduce.dtype)
            names = {old: f"{self.prefix}r{self.registers}_{a}" for a, (old, _) in enumerate(reduce.ranges)}
            axes = [Axis(names[old], extent) for old, extent in reduce.ranges]
            inner_value = s.Rewriter(
                dims={old: axis.index for (old, _), axis in zip(reduce.ranges, axes, strict=True)}
            )(reduce.body)
            axes, (inner_value,), _ = collapse(axes, [inner_value], [], "")
            inner: list[k.Statement] = []
            lowered = self.lower_value(inner_value, inner)
            inner.append(k.Store(register, 0, combined(reduce.op, s.load(register, 0), lowered)))
            vector_here = self.vector is None and bool(axes) and unit_stride(inner_value, axes[-1].name) > 0
            for position, axis in enumerate(reversed(axes)):
                kind = "vector" if position == 0 and vector_here else "serial"
                inner = [k.loop(axis.name, axis.extent, inner, kind)]
            block.append(k.Define(register, s.const(s.IDENTITY[reduce.op](reduce.dtype), reduce.dtype)))
            block += inner
            done[reduce.digest] = s.load(register, 0)
        return _replace(value, done, {})


def pending_reads(pending: Sequence[s.Reduce], moved: Scalar) -> bool:
    """Whether a reduction that is still to come is over other elements than its own row of the kept expression."""
    return bool(pending)


def _unit(offset: Dim, axis: Axis) -> tuple[Dim, Dim] | None:
    split = linear(offset, axis.name)
    return split if split is not None and split[0] == 1 else (-1, -1)


def _inside(reduce: s.Reduce) -> set[bytes]:
    return {node.digest for node in s.walk(reduce.body) if isinstance(node, s.Reduce)}


def combined(op: str, accumulator: Scalar, value: Scalar) -> Scalar:
    """An accumulator with one more value; a product is added by one multiply-add, but by a constant: what scales
    quantized elements gives the same on targets that have none."""
    product = op == "add" and isinstance(value, s.Binary) and value.op == "mul" and value.dtype.is_float
    if product and isinstance(value, s.Binary) and not isinstance(value.right, s.LITERALS):
        return s.fma(value.left, value.right, accumulator)
    return s.Binary(value.dtype, 1, op, accumulator, value)


def _replace(value: Scalar, done: Mapping[bytes, Scalar], kept: Mapping[bytes, tuple[Buffer, Dim]]) -> Scalar:
    """`value` with computed reductions and kept rows read instead of made again."""
    if not done and not kept:
        return value

    def leaf(node: Scalar) -> Scalar | None:
        return done.get(node.digest) if isinstance(node, s.Reduce) else None

    result = s.Rewriter(leaf)(value)
    if not kept:
        return result

    def row(node: Scalar) -> Scalar | None:
        place = kept.get(node.digest)
        return s.load(place[0], place[1]) if place is not None else None

    return s.Rewriter(row)(result)


def _replace_exactly(value: Scalar, part: Scalar, by: Scalar) -> Scalar:
    return s.Rewriter(lambda node: by if node.digest == part.digest else None)(value)


def rename(statement: k.Statement, dims: Mapping[str, Dim]) -> k.Statement:
    """A statement with index symbols replaced everywhere inside."""
    return k.rebuild((statement,), s.Rewriter(dims=dims))[0]
