"""Branches and loops that Python runs, because their bodies or their states are no tensors of numbers of one shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx
from onnx import GraphProto, NodeProto

from ...ir.errors import OnnxcError, ShapeError, UnsupportedError
from .kinds import attributes_of


class Body(Protocol):
    """The plan of a node's graph."""

    @property
    def graph(self) -> GraphProto: ...
    def run(self, inputs: Sequence[Any], outside: Mapping[str, Any]) -> list[Any]:
        """The outputs, for inputs in order and the values of the graphs around."""


Run: TypeAlias = Callable[[Sequence[Any], Mapping[str, Any]], Sequence[Any]]
"""The outputs of a node, for its operands and the values of the graph that it is in."""


def _if(node: NodeProto, bodies: Mapping[str, Body]) -> Run:
    def run(inputs: Sequence[Any], values: Mapping[str, Any]) -> Sequence[Any]:
        return bodies["then_branch" if _truth(inputs[0]) else "else_branch"].run((), values)

    return run


def _loop(node: NodeProto, bodies: Mapping[str, Body]) -> Run:
    body = bodies["body"]
    iteration, condition = (len(value.type.tensor_type.shape.dim) for value in body.graph.input[:2])

    def run(inputs: Sequence[Any], values: Mapping[str, Any]) -> Sequence[Any]:
        trips = None if inputs[0] is None else int(np.asarray(inputs[0]).reshape(-1)[0])
        goes_on = len(inputs) < 2 or inputs[1] is None or _truth(inputs[1])
        states = list(inputs[2:])
        rows: list[list[Any]] = [[] for _ in body.graph.output[1 + len(states) :]]
        count = 0
        while goes_on and (trips is None or count < trips):
            head = [np.full((1,) * iteration, count, np.int64), np.full((1,) * condition, goes_on)]
            try:
                found = body.run([*head, *states], values)
            except OnnxcError as error:
                raise type(error)(f"iteration {count}: {error}") from error
            goes_on = _truth(found[0])
            states = found[1 : 1 + len(states)]
            for row, value in zip(rows, found[1 + len(states) :], strict=True):
                row.append(value)
            count += 1
        outputs = body.graph.output[1 + len(states) :]
        return [*states, *(_stacked(row, output) for row, output in zip(rows, outputs, strict=True))]

    return run


def _scan(node: NodeProto, bodies: Mapping[str, Body]) -> Run:
    body, attributes = bodies["body"], attributes_of(node)
    scanned = attributes["num_scan_inputs"]
    outputs = body.graph.output[len(body.graph.input) - scanned :]

    def numbers(name: str, count: int) -> list[int]:
        return attributes.get(name) or [0] * count

    def run(inputs: Sequence[Any], values: Mapping[str, Any]) -> Sequence[Any]:
        if len(inputs) != len(body.graph.input):
            raise UnsupportedError("Scan of opset 8 is not supported there; export with opset 9 or newer")
        states, sequences = list(inputs[: len(inputs) - scanned]), []
        for array, axis, back in zip(
            inputs[len(states) :],
            numbers("scan_input_axes", scanned),
            numbers("scan_input_directions", scanned),
            strict=True,
        ):
            moved = np.moveaxis(array, axis, 0)
            sequences.append(moved[::-1] if back else moved)
        if len({len(sequence) for sequence in sequences}) > 1:
            raise ShapeError(f"the sequences have the lengths {', '.join(str(len(s)) for s in sequences)}")
        rows: list[list[Any]] = [[] for _ in outputs]
        for count in range(len(sequences[0])):
            try:
                found = body.run([*states, *(np.array(sequence[count, ...]) for sequence in sequences)], values)
            except OnnxcError as error:
                raise type(error)(f"iteration {count}: {error}") from error
            states = found[: len(states)]
            for row, value in zip(rows, found[len(states) :], strict=True):
                row.append(value)
        results = []
        for row, output, axis, back in zip(
            rows,
            outputs,
            numbers("scan_output_axes", len(rows)),
            numbers("scan_output_directions", len(rows)),
            strict=True,
        ):
            results.append(np.moveaxis(_stacked(row[::-1] if back else row, output), 0, axis))
        return [*states, *results]

    return run


def _map(node: NodeProto, bodies: Mapping[str, Body]) -> Run:
    body = bodies["body"]

    def run(inputs: Sequence[Any], values: Mapping[str, Any]) -> Sequence[Any]:
        count = len(inputs[0])
        if any(isinstance(item, list) and len(item) != count for item in inputs):
            counts = " and ".join(str(len(item)) for item in inputs if isinstance(item, list))
            raise ShapeError(f"the sequences have {counts} elements")
        rows = []
        for place in range(count):
            rows.append(body.run([item[place] if isinstance(item, list) else item for item in inputs], values))
        return [[row[position] for row in rows] for position in range(len(node.output))]

    return run


CONTROL: Mapping[str, Callable[[NodeProto, Mapping[str, Body]], Run]] = {
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
    "SequenceMap": _map,
}


def _truth(value: Any) -> bool:
    array = np.asarray(value)
    if array.size != 1:
        raise ShapeError(f"a condition of the shape {list(array.shape)}")
    return bool(array.reshape(-1)[0])


def _stacked(rows: Sequence[np.ndarray], output: onnx.ValueInfoProto) -> np.ndarray:
    """The iterations' values along a new first axis; of no iterations, what the graph declares of one."""
    if rows:
        return np.stack(rows)
    tensor = output.type.tensor_type
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    return np.empty((0, *sizes), onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type or 1))
