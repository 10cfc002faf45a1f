"""Branches and loops: what types their outputs have, from the typed graphs that are their bodies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..dims import Dim, Sum, dim_max, symbols
from ..errors import ShapeError, ValueNeeded
from ..graph import Graph, TensorType, Type
from ..tensors import normalize_axis
from .declare import Context, Registry

declare = Registry()


class _Sizes:
    """Chooses the sizes of results: those that hold whatever runs, else new symbols that the run binds."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._count = 0
        regions = context.regions.values()
        captured = [value.type for region in regions for value in region.captures()]
        known = [*captured, *(type for type in context.types if type is not None)]
        self._outside = {name for type in known for name in _symbol_names(type)}

    def fresh(self) -> Dim:
        self._count += 1
        return self._context.fresh(f"size{self._count}")

    def common(self, *dims: Dim) -> Dim:
        """The dim that all are, where its symbols mean something outside of the bodies."""
        same = all(dim == dims[0] for dim in dims)
        return dims[0] if same and all(s.name in self._outside for s in symbols(dims[0])) else self.fresh()

    def merge(self, what: str, *types: Type) -> Type:
        """The type that holds values of all the given ones."""
        first = types[0]
        if all(isinstance(type, TensorType) for type in types):
            tensors = [type for type in types if isinstance(type, TensorType)]
            if any(type.rank != tensors[0].rank for type in tensors):
                raise ValueNeeded(f"the rank of {what} is known only at run time: {' or '.join(map(str, types))}")
            if any(type.dtype != tensors[0].dtype for type in tensors):
                raise ShapeError(f"{what} is {' in one case and '.join(map(str, types))} in the other")
            axes = zip(*(type.shape for type in tensors), strict=True)
            return TensorType(tensors[0].dtype, tuple(self.common(*dims) for dims in axes))
        if any(type != first for type in types):
            raise ShapeError(f"{what} is {' in one case and '.join(map(str, types))} in the other")
        return first


def _symbol_names(type: Type) -> Iterator[str]:
    shape = type.shape if isinstance(type, TensorType) else ()
    yield from (s.name for dim in shape for s in symbols(dim))


@declare.op("If")
def if_(condition: object, *, context: Context) -> tuple[Type, ...]:
    """The outputs of one of two bodies."""
    branches: list[Graph] = [context.regions["then_branch"], context.regions["else_branch"]]
    if len(branches[0].outputs) != len(branches[1].outputs):
        raise ShapeError(f"the branches have {len(branches[0].outputs)} and {len(branches[1].outputs)} outputs")
    sizes = _Sizes(context)
    pairs = zip(*(branch.outputs for branch in branches), strict=True)
    return tuple(sizes.merge(f"output {k}", *(v.type for v in pair)) for k, pair in enumerate(pairs))


def _always_true(region: Graph, context: Context) -> bool:
    """Whether neither the operand nor the body ever ends the loop before its number of iterations."""
    operand = context.types[1] if len(context.types) > 1 else None
    start = context.values[1] if len(context.values) > 1 else None
    if operand is not None and (start is None or not start[0]):
        return False
    result = region.outputs[0]
    while (node := region.producers.get(result)) is not None and node.op == "Identity" and node.inputs[0] is not None:
        result = node.inputs[0]
    known = region.constant(result)
    return result == region.inputs[1] or (known is not None and bool(np.all(known)))


@declare.op("Loop")
def loop(*operands: object, context: Context) -> tuple[Type, ...]:
    """Operands are the number of iterations, the condition and the initial states; outputs the final states, then
    what the iterations gave, stacked along a new first axis."""
    region: Graph = context.regions["body"]
    states = len(operands) - 2
    sizes = _Sizes(context)
    types: list[Type] = []
    for k in range(states):
        start = context.types[2 + k]
        assert start is not None, f"initial state {k} is absent"
        types.append(sizes.merge(f"state {k}", start, region.inputs[2 + k].type, region.outputs[1 + k].type))
    count = context.values[0] if context.values else None
    trips: Dim | None = None
    if count is not None and isinstance(count[0], int | Sum) and _always_true(region, context):
        trips = dim_max(0, count[0])
    for value in region.outputs[1 + states :]:
        shape = tuple(sizes.common(dim) for dim in value.shape)
        types.append(TensorType(value.dtype, (sizes.fresh() if trips is None else trips, *shape)))
    return tuple(types)


@declare.op("Scan")
def scan(
    *operands: object,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
    context: Context,
) -> tuple[Type, ...]:
    """Operands are the initial states and the sequences; outputs the final states and the stacked results."""
    region: Graph = context.regions["body"]
    states = len(operands) - num_scan_inputs
    sizes = _Sizes(context)
    types: list[Type] = []
    for k in range(states):
        start = context.types[k]
        assert start is not None, f"initial state {k} is absent"
        types.append(sizes.merge(f"state {k}", start, region.inputs[k].type, region.outputs[k].type))
    length: Dim | None = None
    for k in range(num_scan_inputs):
        sequence = context.types[states + k]
        assert isinstance(sequence, TensorType), f"sequence {k} is no tensor"
        axis = normalize_axis(scan_input_axes[k] if scan_input_axes else 0, sequence.rank)
        length = sequence.shape[axis] if length is None else length
    for k, value in enumerate(region.outputs[states:]):
        shape = [sizes.common(dim) for dim in value.shape]
        axis = normalize_axis(scan_output_axes[k] if scan_output_axes else 0, len(shape) + 1)
        assert length is not None, "a scan without a sequence"
        shape.insert(axis, length)
        types.append(TensorType(value.dtype, tuple(shape)))
    return tuple(types)
