"""Graphs run with their values shown: the model's own by one compiled program, those inside If, Loop and Scan each by
another, whenever the node that holds them would run them.

So every graph is compiled as an ordinary model, whatever the values in it are, and what a node computes is not asked
for twice: branches and bodies that hold nothing to observe are not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper

from ...compiler.driver import compile_model
from ...compiler.nodes import names_read
from ...compiler.options import Options
from .graph import GraphDraft
from .settings import QuantizationError, Settings
from .statistics import Statistics

Array = NDArray[Any]
Values = Mapping[str, Any]


class Observed:
    """A graph of which values are looked at, in it (`wanted`, with the axis of channels) or in graphs inside it."""

    def __init__(
        self,
        graph: GraphDraft,
        wanted: Mapping[GraphDraft, Mapping[str, int | None]],
        settings: Settings,
        folder: str | None,
    ) -> None:
        self.graph = graph
        self.found = {name: Statistics(axis=axis) for name, axis in wanted.get(graph, {}).items()}
        parts = ((key, Observed(part, wanted, settings, folder)) for key, part in graph.inner.items())
        self.inner: dict[tuple[str, str], Observed] = {key: part for key, part in parts if part.found or part.inner}
        holders = {name for name, _ in self.inner}
        self.holders = [node for node in graph.graph.node if node.name in holders and node.op_type in WALKS]
        names = [*self.found, *(name for part in self.inner.values() for name in part.graph.captured())]
        names += [name for node in self.holders for name in node.input if name]
        names += [] if graph.outer is None else graph.results()
        given = {*graph.given(), *graph.constants}
        self.shown = list(dict.fromkeys(name for name in names if name not in given))
        # Who watches the passes gets them run: a model that is needed once does not go into the cache.
        self.options = Options(threads=settings.threads, folder=folder, after=lambda *_: None)
        self.shapes: dict[str, list[int | None]] = {}
        self.program: Any = None
        if graph.outer is None and self.shown:
            self.program = compile_model(with_outputs(graph.shared.proto, self.shown), self.options)

    def __call__(self, feed: Values, sample: int) -> int:
        """Runs the graph on what it is given; how many bytes its values take. QuantizationError for NaN."""
        values = self._run(feed)
        self._look({**values, **feed}, sample)
        return sum(np.asarray(array).nbytes for array in values.values())

    def statistics(self) -> dict[GraphDraft, dict[str, Statistics]]:
        """Of this graph's values and those inside it; a graph that never ran has empty ones."""
        found = {graph: dict[str, Statistics]() for graph in self.graph.graphs()} | {self.graph: self.found}
        for inner in self.inner.values():
            found |= inner.statistics()
        return found

    def _run(self, given: Values) -> dict[str, Any]:
        if not self.shown:
            return {}
        if self.graph.outer is None:
            assert self.program is not None
            return dict(self.program.run(given))
        if self._widened(given) or self.program is None:
            self.program = compile_model(self._model(given), self.options)
        return dict(self.program.run({name: given[name] for name in self.shapes}))

    def _widened(self, given: Values) -> bool:
        """Whether an operand has another size than ever before: that axis is left open then."""
        before = {name: list(shape) for name, shape in self.shapes.items()}
        for name in self.graph.given():
            shape = list(np.shape(given[name]))
            known = self.shapes.setdefault(name, list(shape))
            if len(known) != len(shape):
                raise QuantizationError(f'the value "{name}" has {len(known)} axes once and {len(shape)} then')
            self.shapes[name] = [a if a == b else None for a, b in zip(known, shape, strict=True)]
        return before != self.shapes

    def _model(self, given: Values) -> ModelProto:
        """The graph as a model whose inputs are all that it is given."""
        graph = self.graph
        used = set(names_read(graph.graph.node)) | set(self.shown)
        made = GraphProto(name="inner")
        made.node.extend(graph.graph.node)
        made.initializer.extend(tensor for name, tensor in graph.constants.items() if name in used)
        for name, shape in self.shapes.items():
            kind = helper.np_dtype_to_tensor_dtype(np.asarray(given[name]).dtype)
            dims = [f"{name}_{axis}" if size is None else size for axis, size in enumerate(shape)]
            made.input.append(helper.make_tensor_value_info(name, kind, dims))
        made.output.extend(onnx.ValueInfoProto(name=name) for name in self.shown)
        return graph.model(made)

    def _look(self, values: Values, sample: int) -> None:
        """Takes in values, then runs the graphs inside on what these are."""
        for name, statistics in self.found.items():
            array = values[name]
            statistics.add(np.asarray(array, np.float32))
            if not _finite(array):
                raise QuantizationError(
                    f'the value "{name}" of the node "{self._definer(name)}" has NaN in it on sample {sample}'
                    ": check the data, or keep the nodes that read it in float (--keep)"
                )
        for node in self.holders:
            parts = {attribute: part for (name, attribute), part in self.inner.items() if name == node.name}
            around = {name: self._value(name, values) for part in parts.values() for name in part.graph.captured()}
            operands = [self._value(name, values) if name else None for name in node.input]
            WALKS[node.op_type](node, parts, operands, around, sample)

    def step(self, feed: Values, sample: int) -> list[Any]:
        """As a call; the graph's results."""
        values = {**self._run(feed), **feed}
        self._look(values, sample)
        return [self._value(name, values) for name in self.graph.results()]

    def _value(self, name: str, values: Values) -> Any:
        return values[name] if name in values else self.graph.array(name)

    def _definer(self, name: str) -> str:
        node = self.graph.definers().get(name)
        return name if node is None else node.name


def _branch(node: NodeProto, parts: Mapping[str, Observed], operands: Sequence[Any], around: Values, n: int) -> None:
    taken = parts.get("then_branch" if np.asarray(operands[0]).reshape(-1)[0] else "else_branch")
    if taken is not None:
        taken.step({name: around[name] for name in taken.graph.captured()}, n)


def _iterations(
    node: NodeProto, parts: Mapping[str, Observed], operands: Sequence[Any], around: Values, n: int
) -> None:
    """The body as long as its condition holds; with states that follow from one another."""
    body, count = parts["body"], 0
    limit = None if operands[0] is None else int(np.asarray(operands[0]).reshape(-1)[0])
    going = True if len(operands) < 2 or operands[1] is None else bool(np.asarray(operands[1]).reshape(-1)[0])
    states, names = list(operands[2:]), [value.name for value in body.graph.graph.input]
    while going and (limit is None or count < limit):
        inputs = dict(zip(names, (np.array(count, np.int64), np.array(going), *states), strict=True))
        results = body.step({**around, **inputs}, n)
        going, count = bool(np.asarray(results[0]).reshape(-1)[0]), count + 1
        states = results[1 : 1 + len(states)]


def _slices(node: NodeProto, parts: Mapping[str, Observed], operands: Sequence[Any], around: Values, n: int) -> None:
    """The body on one slice of the scanned operands after another."""
    body = parts["body"]
    options = {a.name: a for a in node.attribute}
    scanned = options["num_scan_inputs"].i
    states, arrays = list(operands[: len(operands) - scanned]), operands[len(operands) - scanned :]
    axes = list(options["scan_input_axes"].ints) if "scan_input_axes" in options else [0] * scanned
    back = list(options["scan_input_directions"].ints) if "scan_input_directions" in options else [0] * scanned
    moved = [np.moveaxis(array, axis, 0) for array, axis in zip(arrays, axes, strict=True)]
    names = [value.name for value in body.graph.graph.input]
    for count in range(len(moved[0])):
        slices = [array[-1 - count if turned else count] for array, turned in zip(moved, back, strict=True)]
        results = body.step({**around, **dict(zip(names, (*states, *slices), strict=True))}, n)
        states = results[: len(states)]


WALKS = {"If": _branch, "Loop": _iterations, "Scan": _slices}
"""Operators whose graphs are run; those of others are never reached."""


def _finite(array: Any) -> bool:
    """Infinities are left out of ranges; NaN has none."""
    return not bool(np.isnan(np.sum(np.asarray(array), dtype=np.float64))) or not bool(np.isnan(array).any())


def with_outputs(proto: ModelProto, names: list[str]) -> ModelProto:
    """The model with these values as its only outputs."""
    model = ModelProto()
    model.CopyFrom(proto)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return model


__all__ = ["Observed"]
