"""Reductions over rows taken apart into stages.

Whatever the operators were called: outputs whose elements need reductions over the same row (softmax, normalisations,
sums, positions of maxima...) are a few passes over the columns of each row. A stage combines an expression over the
columns, in which the totals of earlier stages occur; then come outputs with an element per column, or one per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ....ir import scalars as s
from ....ir.dims import Dim, Quotient, atoms, linear, product, symbol
from ....ir.scalars import Buffer, Load, Scalar
from ....ir.tensors import Tensor, flat_offset
from ....passes.nests import Axis, Output, all_reductions, collapse, cost

WINDOW = 256
"""Columns up to which a few axes of them, or rows that share them, are a window: each output reads it by itself."""
SHORT = 32
"""Columns up to which a thread for each row does best where neighbouring rows lie side by side in memory."""


@dataclass(frozen=True)
class Stage:
    """`body` combined over the columns by `op`; the total is read as element 0 of `result`."""

    op: str
    body: Scalar
    result: Buffer
    level: int


@dataclass(frozen=True)
class Work:
    """`elements` have one element per row and column, `totals` one per row.

    Columns for which `inside` (of the first of some lanes) is false are none; `divides` is what lanes must divide then.
    """

    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    stages: tuple[Stage, ...]
    elements: tuple[Output, ...]
    totals: tuple[Output, ...]
    inside: Scalar | None = None
    divides: int = 0

    @property
    def outputs(self) -> tuple[Output, ...]:
        return (*self.elements, *self.totals)

    @property
    def count(self) -> Dim:
        """The number of rows."""
        return product(axis.extent for axis in self.rows)

    @property
    def length(self) -> Dim:
        """The number of columns."""
        return product(axis.extent for axis in self.columns)

    @property
    def levels(self) -> list[list[Stage]]:
        """The stages that can share a pass, in order."""
        last = max(stage.level for stage in self.stages)
        return [[stage for stage in self.stages if stage.level == level] for level in range(last + 1)]

    @property
    def indices(self) -> frozenset[str]:
        return frozenset(axis.name for axis in (*self.rows, *self.columns))

    def loads(self) -> list[Load]:
        """All that stages and elements read of memory, by columns."""
        names = {axis.name for axis in self.columns}
        values = [*(stage.body for stage in self.stages), *(output.value for output in self.elements)]
        found = {node.digest: node for value in values for node in s.walk(value) if isinstance(node, Load)}
        return [load for load in found.values() if load.buffer.space == "parameter" and names & load.free]


def work_of(outputs: Sequence[tuple[Buffer, Tensor]]) -> Work | None:
    """The stages of outputs; None where they are not passes over the rows of one shape."""
    shape = max((tensor.shape for _, tensor in outputs), key=lambda found: (sum(d != 1 for d in found), len(found)))
    axes = {a: Axis(f"a{a}", extent) for a, extent in enumerate(shape) if extent != 1}
    where: dict[int, Dim] = {a: axis.index for a, axis in axes.items()}
    main = [tensor for _, tensor in outputs if tensor.shape == shape]
    values = [tensor.at([where.get(a, 0) for a in range(len(shape))]) for tensor in main]
    parts = _runs([reduce for value in values for reduce in all_reductions(value)], axes)
    names: list[Axis] = []
    for a, axis in axes.items():
        run = parts.get(axis.name)
        if run is None:
            names.append(axis)
            continue
        assert isinstance(axis.extent, int)
        halves = Axis(f"a{a}_0", axis.extent // run), Axis(f"a{a}_1", run)
        names += halves
        where[a] = halves[0].index * run + halves[1].index
    if parts:
        values = [tensor.at([where.get(a, 0) for a in range(len(shape))]) for tensor in main]
    reduces = [reduce for value in values for reduce in all_reductions(value)]
    if not reduces or not reduces[0].ranges:
        return None
    extents = [extent for _, extent in reduces[0].ranges]
    ranges = {name for reduce in reduces for name, _ in reduce.ranges}
    if any([e for _, e in reduce.ranges] != extents or reduce.free & ranges for reduce in reduces):
        return None
    if any(s.free_symbols(extent) & {axis.name for axis in names} for extent in extents):
        return None  # rows of different lengths
    needed = set().union(*(reduce.free for reduce in reduces))
    rows, inner = [a for a in names if a.name in needed], [a for a in names if a.name not in needed]
    if 0 in extents or (inner and [axis.extent for axis in inner] != extents):
        return None
    columns = [Axis(f"c{i}", extent) for i, extent in enumerate(extents)]
    offset = flat_offset([where.get(a, 0) for a in range(len(shape))], shape)
    found: list[tuple[Buffer, Dim, Scalar, bool]] = []
    waiting = iter(values)
    for buffer, tensor in outputs:
        if tensor.shape == shape:
            found.append((buffer, offset, next(waiting), bool(inner)))
            continue
        own = [extent for extent in tensor.shape if extent != 1]
        if own != [axis.extent for axis in rows]:
            return None
        along = iter(rows)
        at = [0 if extent == 1 else next(along).index for extent in tensor.shape]
        found.append((buffer, flat_offset(at, tensor.shape), tensor.at(at), False))
    every = {r.digest: r for *_, value, _ in found for r in all_reductions(value)}
    if any([e for _, e in r.ranges] != extents or r.free & ranges for r in every.values()):
        return None
    to_column = {axis.name: column.index for axis, column in zip(inner, columns, strict=False)}
    return _renamed(_staged(rows, columns, list(every.values()), found, to_column))


def _runs(reduces: Iterable[s.Reduce], axes: Mapping[int, Axis]) -> dict[str, int]:
    """Axes of which reductions need only which run of so many elements it is: groups of channels."""
    extents = {axis.name: axis.extent for axis in axes.values()}
    found: dict[str, int] = {}
    dims = [dim for reduce in reduces for node in s.walk(reduce) for dim in node.dims]
    for atom in (atom for dim in dims for atom in atoms(dim)):
        if isinstance(atom, Quotient) and isinstance(atom.denominator, int):
            for name in s.free_symbols(atom.numerator) & extents.keys():
                extent = extents[name]
                if atom.numerator == symbol(name) and isinstance(extent, int) and extent % atom.denominator == 0:
                    found[name] = atom.denominator
    return found


def _staged(
    rows: list[Axis],
    columns: list[Axis],
    reduces: Sequence[s.Reduce],
    outputs: Sequence[tuple[Buffer, Dim, Scalar, bool]],
    inner: Mapping[str, Dim],
) -> Work:
    done: dict[bytes, Scalar] = {}
    level: dict[str, int] = {}
    stages: dict[tuple[str, bytes], Stage] = {}

    def finished(value: Scalar) -> Scalar:
        return s.Rewriter(lambda node: done.get(node.digest))(value)

    for reduce in reduces:
        renamed = {name: axis.index for (name, _), axis in zip(reduce.ranges, columns, strict=True)}
        body = s.Rewriter(dims=renamed)(finished(reduce.body))
        stage = stages.get((reduce.op, body.digest))
        if stage is None:
            result = Buffer(f"{reduce.op}{len(stages)}", reduce.dtype, 1, "register")
            used = {node.buffer.name for node in s.walk(body) if isinstance(node, Load)}
            level[result.name] = 1 + max((level[name] for name in used if name in level), default=-1)
            stage = stages[reduce.op, body.digest] = Stage(reduce.op, body, result, level[result.name])
        done[reduce.digest] = s.load(stage.result, 0)
    to_column = s.Rewriter(dims=dict(inner))
    elements: list[Output] = []
    totals: list[Output] = []
    for buffer, offset, value, by_column in outputs:
        own = Output(buffer, to_column.dim(offset) if by_column else offset, finished(value))
        (elements if by_column else totals).append(replace(own, value=to_column(own.value)) if by_column else own)
    return Work(tuple(rows), tuple(columns), tuple(stages.values()), tuple(elements), tuple(totals))


def _renamed(work: Work) -> Work:
    """With as few axes as can be, called by names."""
    bodies = [stage.body for stage in work.stages]
    values = [*bodies, *(output.value for output in work.outputs)]
    offsets = [output.offset for output in work.outputs]
    rows, values, offsets = collapse(work.rows, values, offsets, "")
    columns, values, offsets = collapse(work.columns, values, offsets, "")
    spelt = {}
    for axes, last in ((rows, "row"), (columns, "column")):
        for number, axis in enumerate(axes):
            behind = len(axes) - 1 - number
            spelt[axis.name] = Axis(f"{last}{behind}" if behind else last, axis.extent)
    rename = s.Rewriter(dims={name: axis.index for name, axis in spelt.items()})
    values, offsets = [rename(value) for value in values], [rename.dim(offset) for offset in offsets]
    stages = tuple(replace(stage, body=body) for stage, body in zip(work.stages, values, strict=False))
    made = [
        Output(output.buffer, offset, value)
        for output, offset, value in zip(work.outputs, offsets, values[len(stages) :], strict=True)
    ]
    count = len(work.elements)
    return Work(
        tuple(spelt[axis.name] for axis in rows),
        tuple(spelt[axis.name] for axis in columns),
        stages,
        tuple(made[:count]),
        tuple(made[count:]),
    )


def along_rows(work: Work) -> bool:
    """Whether memory is contiguous along the last axis of the rows, not along the columns; operands that many rows
    share count less."""
    score = 0
    names = {axis.name for axis in work.rows}
    for load in work.loads():
        weight = 1 + len(names & load.free)
        for axes, gain in ((work.rows, weight), (work.columns, -weight)):
            split = linear(load.offset, axes[-1].name) if axes else None
            score += gain if split is not None and split[0] == 1 else 0
    return score > 0


def is_window(work: Work) -> bool:
    """Whether rows overlap, or are so short or shared that each output is best computed by a thread of its own."""
    length = work.length
    if work.elements or len(work.levels) > 1 or not isinstance(length, int):
        return False
    if along_rows(work):
        return length <= SHORT or (length <= WINDOW and len(work.columns) > 1) or _is_product(work)
    if length <= WINDOW and len(work.columns) > 1:
        return True
    steps = [linear(load.offset, work.rows[-1].name) for load in work.loads()] if work.rows else []
    overlapping = any(split is not None and isinstance(split[0], int) and 0 < split[0] < length for split in steps)
    return (overlapping and length <= WINDOW) or _is_product(work)


def _is_product(work: Work) -> bool:
    """Whether operands are shared among many rows, as in products of matrices."""
    names = {axis.name for axis in work.rows}
    used = [load.free & names for load in work.loads()]
    count = work.count
    many = not isinstance(count, int) or count >= 4096
    return many and any(a - b for a in used for b in used) and any(b - a for a in used for b in used)


def common_parts(values: Sequence[Scalar], later: Sequence[Scalar], columns: Iterable[str]) -> list[Scalar]:
    """The largest parts of `values` that vary by column, are worth a register, and are needed again."""
    names = set(columns)
    again = {node.digest for value in later for node in s.walk(value)}
    found: dict[bytes, Scalar] = {}
    seen: set[bytes] = set()

    def visit(node: Scalar) -> None:
        if node.digest in seen or not node.free & names:
            return
        seen.add(node.digest)
        reads = any(isinstance(part, Load) and part.buffer.space == "parameter" for part in s.walk(node))
        if node.digest in again and (reads or cost(node) >= 4) and not isinstance(node, s.Index):
            found[node.digest] = node
            return
        for child in node.children:
            visit(child)

    for value in values:
        visit(value)
    return list(found.values())
