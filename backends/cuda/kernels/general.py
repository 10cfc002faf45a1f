"""The schedule of a GPU for any region: what moves memory and computes little."""

from __future__ import annotations

from collections.abc import Sequence

from ....ir.scalars import Buffer
from ....ir.target import Target
from ....ir.tensors import Tensor
from ....passes.nests import ALWAYS, all_reductions, build_nests
from ....passes.regions import Call, Lowered, Region
from . import pointwise, rows, transpose
from .groups import Group, aliases_of, by_shape, call_of, group_of, moved_as_bits
from .split import calls as split_calls
from .stages import is_window, work_of

Outputs = Sequence[tuple[Buffer, Tensor]]


def schedule(region: Region, target: Target) -> Lowered | None:
    """A kernel for all outputs that are reductions over the same rows, else one for each shape. None where an output
    has no definition."""
    outputs = region.full_outputs()
    if any(tensor.kind == "opaque" for _, tensor in outputs):
        return None
    return lowered(region, outputs)


def lowered(region: Region, outputs: Outputs, scratch: Sequence[Buffer] = ()) -> Lowered:
    """Kernels for outputs, on the region's buffers and `scratch`."""
    groups = by_shape(outputs)
    together = [output for group in groups for output in group]
    found = _rows(region, together, scratch) if len(groups) > 1 else None
    if found is not None:
        return found
    calls: list[Call] = []
    workspaces: list[Buffer] = []
    for group in groups:
        reduced = _rows(region, group, (*scratch, *workspaces))
        if reduced is None:
            calls.append(_elements(region, group, scratch))
            continue
        # Workspaces of several groups would have one name: only one of them is split.
        assert not (workspaces and reduced.workspaces)
        calls += reduced.kernel_calls
        workspaces += reduced.workspaces
    return Lowered(tuple(calls), tuple(workspaces))


def _rows(region: Region, outputs: Outputs, scratch: Sequence[Buffer]) -> Lowered | None:
    """Reductions over rows; None for anything else."""
    work = work_of(outputs)
    if work is None or is_window(work):
        return None
    split = split_calls(region, work, scratch)
    if split is not None:
        return Lowered(tuple(split.calls), tuple(split.workspaces))
    return Lowered((call_of(region, rows.kernel(region, work), [buffer for buffer, _ in outputs], scratch),))


def _elements(region: Region, outputs: Outputs, scratch: Sequence[Buffer]) -> Call:
    """Elements each on its own, or loop nests by definition, mapped to threads."""
    group = moved_as_bits(group_of(outputs))
    buffers = [buffer for buffer, _ in outputs]
    if _hoists(group):
        return call_of(region, build_nests(outputs, ALWAYS), buffers, scratch)
    tiled = transpose.kernel(region, group)
    if tiled is not None:
        return call_of(region, tiled, buffers, scratch)
    aliases = aliases_of(region, group)
    return call_of(region, pointwise.kernel(region, group, bool(aliases)), buffers, scratch, aliases=aliases)


def _hoists(group: Group) -> bool:
    """Whether elements share reductions, or reductions use others."""
    names = {axis.name for axis in group.axes}
    found = [reduce for value in group.values for reduce in all_reductions(value)]
    return any(not names <= reduce.free or all_reductions(reduce.body) for reduce in found)
