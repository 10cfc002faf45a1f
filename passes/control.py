"""Lowering of loops: the bodies of Loop and Scan become steps that the program repeats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..ir.dims import Dim, as_symbol, product, symbol
from ..ir.dtypes import BOOL, I64
from ..ir.errors import HostNeeded
from ..ir.graph import Graph, Node, Value
from ..ir.program import Place, Repeat, Step
from .draws import advance

if TYPE_CHECKING:
    from .lower import Lowering

# A trip count of this or more is how exporters write "until the condition fails".
UNLIMITED = 1 << 40


def lower_loop(lowering: Lowering, node: Node) -> list[Step]:
    """Steps of a Loop. State stays where the node's outputs will be; scan outputs are written in place.

    Raises HostNeeded where a state changes its shape, or a scan output has no known limit.
    """
    body = node.regions["body"]
    trip_value, condition_value = node.inputs[0], node.inputs[1]
    initial = node.inputs[2:]
    count = len(initial)
    states, scans = node.outputs[:count], node.outputs[count:]
    index = _index_name(lowering, node)
    steps: list[Step] = []

    trips: Dim | None = None
    if trip_value is not None:
        known = lowering.inference.values.get(trip_value.name)
        trips = known[0] if known is not None else lowering.bind(trip_value, steps)  # type: ignore[assignment]
        if isinstance(trips, int) and trips >= UNLIMITED:
            trips = None
    condition: Place | None = None
    if condition_value is not None or not _always_true(body):
        condition = lowering.arena(f"{node.outputs[0].name}.condition" if node.outputs else "condition", BOOL, 1)
        steps += lowering.fill_bool(condition, condition_value)

    places = [lowering.places[value.name] for value in states]
    for value, inner, outer in zip(initial, body.inputs[2:], states, strict=True):
        assert value is not None
        if value.shape != inner.shape or inner.shape != outer.shape:
            raise HostNeeded(f"{node.where}: the state %{inner.name} changes its shape between iterations", node.origin)
    for value, place in zip(initial, places, strict=True):
        assert value is not None
        steps += lowering.copy(value, place)

    counter: str | None = None
    for value in scans:
        leading = value.shape[0]
        name = as_symbol(leading)
        if trips is None or (leading != trips and name is None):
            reason = f"{node.where}: the scan output %{value.name} has no known limit of iterations"
            raise HostNeeded(reason, node.origin)
        if leading != trips and name is not None:
            counter = name.name
            lowering.resize(lowering.places[value.name], trips * product(value.shape[1:]))

    inside: list[Step] = []
    iteration, condition_in = body.inputs[0], body.inputs[1]
    if _is_read(body, iteration):
        lowering.places[iteration.name] = lowering.arena(iteration.name, I64, 1)
        inside += lowering.store_index(symbol(index), lowering.places[iteration.name])
    if condition is not None:
        lowering.places[condition_in.name] = condition
    elif _is_read(body, condition_in):
        lowering.places[condition_in.name] = lowering.arena(condition_in.name, BOOL, 1)
        steps += lowering.fill_bool(lowering.places[condition_in.name], None)
    for inner, place in zip(body.inputs[2:], places, strict=True):
        lowering.places[inner.name] = place

    condition_out = body.outputs[0]
    following = [
        lowering.arena(f"{value.name}.next", value.dtype, product(value.shape)) for value in body.outputs[1 : 1 + count]
    ]
    scanned = [
        Place(lowering.places[v.name].memory, lowering.places[v.name].offset + symbol(index) * product(v.shape[1:]))
        for v in scans
    ]
    next_condition = lowering.arena(f"{condition_out.name}.next", BOOL, 1)
    inside += lowering.region(body, [next_condition, *following, *scanned])
    inside += advance(lowering, body, lowering.checks.depth)
    for value, place, source in zip(body.outputs[1:], places, following, strict=False):
        inside += lowering.copy(value, place, source)
    if condition is not None:
        inside += lowering.copy(condition_out, condition, next_condition)
    return [*steps, Repeat(index, trips, condition, tuple(inside), counter)]


def lower_scan(lowering: Lowering, node: Node) -> list[Step]:
    """Steps of a Scan over leading axes; slices are views of the scanned tensors, written and read in place.

    Raises HostNeeded for other axes than the first.
    """
    body = node.regions["body"]
    scanned = node.attributes["num_scan_inputs"]
    assert isinstance(scanned, int)
    count = len(node.inputs) - scanned
    outputs = len(node.outputs) - count
    for name in ("scan_input_axes", "scan_output_axes"):
        if any(_numbers(node, name)):
            raise HostNeeded(f"{node.where}: {name} other than 0 are not compiled", node.origin)
    index = _index_name(lowering, node)
    steps: list[Step] = []
    first = node.inputs[count]
    assert first is not None
    trips = first.shape[0]
    places = [lowering.places[value.name] for value in node.outputs[:count]]
    for value, inner, outer, place in zip(node.inputs[:count], body.inputs, node.outputs, places, strict=False):
        assert value is not None
        if value.shape != inner.shape or inner.shape != outer.shape:
            raise HostNeeded(f"{node.where}: the state %{inner.name} changes its shape between iterations", node.origin)
        steps += lowering.copy(value, place)
        lowering.places[inner.name] = place

    def slice_of(value: Value, place: Place, backwards: bool) -> Place:
        position = trips - 1 - symbol(index) if backwards else symbol(index)
        return Place(place.memory, place.offset + position * product(value.shape[1:]))

    reading = _numbers(node, "scan_input_directions") or (0,) * scanned
    writing = _numbers(node, "scan_output_directions") or (0,) * outputs
    for value, inner, backwards in zip(node.inputs[count:], body.inputs[count:], reading, strict=True):
        assert value is not None
        lowering.places[inner.name] = slice_of(value, lowering.place_of(value.name), bool(backwards))
    following = [lowering.arena(f"{v.name}.next", v.dtype, product(v.shape)) for v in body.outputs[:count]]
    written = [
        slice_of(value, lowering.places[value.name], bool(backwards))
        for value, backwards in zip(node.outputs[count:], writing, strict=True)
    ]
    inside = lowering.region(body, [*following, *written])
    inside += advance(lowering, body, lowering.checks.depth)
    for value, place, source in zip(body.outputs, places, following, strict=False):
        inside += lowering.copy(value, place, source)
    return [*steps, Repeat(index, trips, None, tuple(inside))]


def _index_name(lowering: Lowering, node: Node) -> str:
    stem = "".join(c if c.isalnum() else "_" for c in (node.outputs[0].name if node.outputs else node.op))
    return lowering.fresh_symbol(f"{stem}_iteration")


def _numbers(node: Node, name: str) -> Sequence[int]:
    found = node.attributes.get(name, ())
    assert isinstance(found, tuple)
    return tuple(int(item) for item in found)  # type: ignore[arg-type]


def _is_read(body: Graph, value: Value) -> bool:
    return value in body.users or value in body.outputs


def _always_true(body: Graph) -> bool:
    """Whether the body hands its condition on unchanged or as a constant true."""
    out = body.outputs[0]
    seen = {out}
    while out in body.producers and body.producers[out].op == "Identity":
        out = body.producers[out].operands[0]
        seen.add(out)
    array = body.constant(out)
    return out == body.inputs[1] or (array is not None and bool(array.all()))
