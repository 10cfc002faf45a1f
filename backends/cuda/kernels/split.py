"""Long reductions of few rows, in two steps: blocks reduce stretches of the columns, then a kernel their results.

The order of operations is fixed by the sizes alone, so results are the same each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ....ir import scalars as s
from ....ir.dims import Dim, linear, symbol
from ....ir.program import ALIGNMENTS
from ....ir.scalars import Buffer, Load, Scalar
from ....passes.nests import Axis, Output
from ....passes.regions import Call, Region
from . import pointwise, rows
from .groups import Group, call_of
from .stages import Stage, Work, along_rows

BLOCKS = 256
"""Blocks that keep a large GPU busy: about two for each multiprocessor."""
FEW = 64
"""Blocks below which reductions are split, if they are long."""
LONG = 1 << 16
"""Elements that a block reduces in less time than another launch takes."""
UNIT, SHORT_UNIT = 1024, 32
"""Stretches are a multiple of this, so that every one of them begins aligned; of the latter where lanes lie along the
rows."""


@dataclass
class Split:
    """The calls made so far, and the memory between them."""

    region: Region
    scratch: Sequence[Buffer] = ()
    calls: list[Call] = field(default_factory=list)
    workspaces: list[Buffer] = field(default_factory=list)

    def workspace(self, stem: str, like: Buffer, size: Dim) -> Buffer:
        """New memory between two launches."""
        buffer = Buffer(f"{stem}{len(self.workspaces)}", like.dtype, size)
        self.workspaces.append(buffer)
        self.region = replace(self.region, alignments={**self.region.alignments, buffer.name: ALIGNMENTS["cuda"]})
        return buffer

    def launch(self, name: str, body: Callable[[Region], tuple[object, ...]], outputs: Sequence[Buffer]) -> None:
        block = body(self.region)
        own = (*self.scratch, *self.workspaces)
        self.calls.append(call_of(self.region, block, outputs, own, f"{self.region.name}_{name}"))  # type: ignore[arg-type]


def stretches(work: Work) -> int:
    """Into how many parts the columns of every row are split; 1 where that would not pay."""
    count, length = work.count, work.length
    if len(work.columns) != 1 or not isinstance(count, int) or not isinstance(length, int):
        return 1
    blocks = count // 128 if along_rows(work) else count
    # Elements of one block: all of its columns, of as many rows as lie side by side. Each level is two launches more.
    own = length * (min(count, 128) if along_rows(work) else 1)
    if blocks >= FEW or own < LONG * (2 * len(work.levels) if work.elements else 1):
        return 1
    parts = min(BLOCKS // max(1, blocks), length // _unit(work))
    return -(-length // _size(work, length, parts)) if parts > 1 else 1


def _unit(work: Work) -> int:
    return SHORT_UNIT if along_rows(work) else UNIT


def _size(work: Work, length: int, parts: int) -> int:
    """Columns of a stretch."""
    return -(-length // parts // _unit(work)) * _unit(work)


def calls(region: Region, work: Work, scratch: Sequence[Buffer] = ()) -> Split | None:
    """The kernels of long reductions of few rows; None where these are no such."""
    if stretches(work) == 1 or _strides(work) is None:
        return None
    split = Split(region, scratch)
    _stages(split, work)
    return split


def _stages(split: Split, work: Work) -> None:
    """The first stages by stretches, then what is left with their totals in memory."""
    first = [stage for stage in work.stages if stage.level == 0]
    left = [stage for stage in work.stages if stage.level > 0]
    partials = _reduced_stretches(split, work, first)
    if not left and not work.elements:
        split.launch("total", lambda region: rows.kernel(region, replace(partials, totals=work.totals)), _buffers(work))
        return
    number = _number(work)
    totals = [split.workspace("total", stage.result, work.count) for stage in first]
    outputs = tuple(Output(b, number, s.load(stage.result, 0)) for b, stage in zip(totals, first, strict=True))
    split.launch("total", lambda region: rows.kernel(region, replace(partials, totals=outputs)), totals)
    known = {stage.result.name: s.load(buffer, number) for stage, buffer in zip(first, totals, strict=True)}

    def leaf(node: Scalar) -> Scalar | None:
        return known.get(node.buffer.name) if isinstance(node, Load) else None

    read = s.Rewriter(leaf)
    rest = replace(
        work,
        stages=tuple(replace(stage, body=read(stage.body), level=stage.level - 1) for stage in left),
        elements=tuple(replace(output, value=read(output.value)) for output in work.elements),
        totals=tuple(replace(output, value=read(output.value)) for output in work.totals),
    )
    if left:
        _stages(split, rest)
        return
    for axes, outputs in (((*rest.rows, *rest.columns), rest.elements), (rest.rows, rest.totals)):
        if outputs:
            group = Group(tuple(_in_order(axes, outputs[0].offset)), outputs)
            own = [output.buffer for output in outputs]
            split.launch("apply", lambda region, group=group: pointwise.kernel(region, group, False), own)  # type: ignore[misc]


def _reduced_stretches(split: Split, work: Work, stages: Sequence[Stage]) -> Work:
    """Launches what reduces the stretches; the work that reduces their results to what `stages` are called by."""
    (column,) = work.columns
    assert isinstance(column.extent, int)
    parts = stretches(work)
    size = _size(work, column.extent, parts)
    stretch, within = Axis("stretch", parts), Axis(column.name, size)
    moved = s.Rewriter(dims={column.name: stretch.index * size + within.index})
    number = stretch.index * work.count + _number(work)
    buffers = [split.workspace("partial", stage.result, work.count * parts) for stage in stages]
    inside = s.binary("lt", s.index(stretch.index * size + within.index), s.index(column.extent))
    first = Work(
        (*work.rows[:-1], stretch, *work.rows[-1:]),
        (within,),
        tuple(replace(stage, body=moved(stage.body)) for stage in stages),
        (),
        tuple(Output(b, number, s.load(stage.result, 0)) for b, stage in zip(buffers, stages, strict=True)),
        inside if parts * size != column.extent else None,
        column.extent,
    )
    split.launch("partial", lambda region: rows.kernel(region, first), buffers)
    again = tuple(
        replace(stage, body=s.load(b, symbol("stretch", 0, parts - 1) * work.count + _number(work)))
        for b, stage in zip(buffers, stages, strict=True)
    )
    return Work(work.rows, (stretch,), again, (), ())


def _buffers(work: Work) -> list[Buffer]:
    return [output.buffer for output in work.outputs]


def _number(work: Work) -> Dim:
    """The number of a row."""
    number: Dim = 0
    for axis in work.rows:
        number = number * axis.extent + axis.index
    return number


def _strides(work: Work) -> list[list[int]] | None:
    """How far apart elements of the outputs are along each axis; None where that is not known."""
    found: list[list[int]] = []
    for axes, outputs in (((*work.rows, *work.columns), work.elements), (work.rows, work.totals)):
        for output in outputs:
            own = [linear(output.offset, axis.name) for axis in axes]
            if any(split is None or not isinstance(split[0], int) for split in own):
                return None
            found.append([split[0] for split in own if split is not None and isinstance(split[0], int)])
    return found


def _in_order(axes: Sequence[Axis], offset: Dim) -> list[Axis]:
    """Axes from the largest stride to the smallest: as the elements lie in memory."""

    def stride(axis: Axis) -> int:
        split = linear(offset, axis.name)
        return split[0] if split is not None and isinstance(split[0], int) else 0

    return sorted(axes, key=stride, reverse=True)
