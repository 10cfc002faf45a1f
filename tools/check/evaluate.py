"""What ONNX says a model computes: its nodes evaluated one by one, without any optimisation.

The engines are ONNX's own reference, ONNX Runtime where it is installed, and onnxc's code for the node alone without
any pass; a node that one of them does not know goes to the next. None is infallible: which one answered is told, and on
a disagreement all of them are asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from ...ir.dtypes import BY_ONNX, F64, of_numpy
from ...ir.errors import UnsupportedError
from .compare import Difference, Tolerance, compare, shape_of, unit_roundoff
from .subject import SMALL, Subject

Array = NDArray[Any]
Engine: TypeAlias = Callable[[ModelProto, Mapping[str, Any]], Sequence[Any]]
"""Runs a model of one node on the arrays that it reads; raises what it likes where it cannot."""

RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
)
"""Operators that give something else each time."""
FAULTY = frozenset(("ConvTranspose", "Loop"))
"""Operators that `onnx.reference` is known to compute wrongly: it knows neither groups nor loops without a condition.
ONNX Runtime is asked first."""


def by_reference(model: ModelProto, feeds: Mapping[str, Any]) -> Sequence[Any]:
    """By `onnx.reference`."""
    from onnx.reference import ReferenceEvaluator

    with np.errstate(all="ignore"):
        return [_plain(result) for result in ReferenceEvaluator(model).run(None, dict(feeds))]


def _plain(result: Any) -> Any:
    return result if result is None or isinstance(result, list | tuple) else np.asarray(result)


def by_runtime(model: ModelProto, feeds: Mapping[str, Any]) -> Sequence[Any]:
    """By ONNX Runtime without optimisations; ImportError where it is not installed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    results: Sequence[Any] = session.run(None, {name: array for name, array in feeds.items() if name in taken})
    return results


def by_onnxc(model: ModelProto, feeds: Mapping[str, Any]) -> Sequence[Any]:
    """By onnxc's own code for the node, of which no pass has seen anything."""
    from ...compiler.driver import compile_graph, imported
    from ...compiler.options import Options, target_of

    options = Options()
    graph = imported(model, options)
    executable = compile_graph(graph, target_of(options), options)
    results = executable.run({port.name: feeds[port.name] for port in executable.inputs})
    return list(results.values())


ENGINES: Mapping[str, Engine] = {"reference": by_reference, "onnxruntime": by_runtime, "onnxc": by_onnxc}


@dataclass(frozen=True)
class Dispute:
    """A node about which the reference and ONNX Runtime do not agree, and whom onnxc's own code for it joins."""

    node: str
    operator: str
    winner: str
    loser: str
    difference: Difference


@dataclass
class Evaluation:
    """Values by name; for each node, by its name, the engine that evaluated it; the values that are random; what the
    engines do not agree about; and whether all this is no evaluation but what onnxc's own code for the graph gave."""

    values: dict[str, Any] = field(default_factory=dict)
    engines: dict[str, str] = field(default_factory=dict)
    random: set[str] = field(default_factory=set)
    disputes: list[Dispute] = field(default_factory=list)
    compiled: bool = False


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the nodes of a subject. `order` names engines, the first is asked first.

    `vote`: the first two are both asked, and where they do not agree the third decides. `wide`: all floats, also those
    in attributes, are widened to f64; `known` then tells the types that the values have in truth, for engines that know
    no f64, and which engines were right. `faulty` are operators about which ONNX Runtime is asked first.
    """

    subject: Subject
    order: tuple[str, ...] = ("reference", "onnxruntime", "onnxc")
    vote: bool = False
    wide: bool = False
    known: Evaluation = field(default_factory=Evaluation)
    faulty: frozenset[str] = FAULTY

    def __call__(
        self,
        inputs: Mapping[str, Any],
        keep: Collection[str] | None = None,
        run: Callable[[NodeProto, dict[str, Any]], tuple[list[Any], str]] | None = None,
    ) -> Evaluation:
        """All values of the model, or those to `keep`. `run` evaluates a node in place of `node`."""
        found = Evaluation()
        subject, run = self.subject, run or self.node
        values: dict[str, Any] = dict(self.widened_arrays({**subject.constants, **inputs}))
        last = {name: position for position, reads in enumerate(subject.reads) for name in reads}
        wanted = set(subject.outputs) | set(keep or ())
        for position, (node, reads) in enumerate(zip(subject.nodes, subject.reads, strict=True)):
            feeds = {name: values[name] for name in reads if name in values}
            results, found.engines[node.name] = run(node, feeds)
            if self.vote and node.op_type not in RANDOM:
                results = self.voted(node, feeds, results, found)
            names = [name for name in node.output if name]
            values.update(zip(names, results, strict=False))
            if node.op_type in RANDOM or found.random.intersection(reads):
                found.random.update(names)
            for name in (*reads, *names) if keep is not None else ():
                if last.get(name, -1) <= position and name not in wanted:
                    values.pop(name, None)
        found.values = {name: array for name, array in values.items() if keep is None or name in wanted}
        return found

    def node(self, node: NodeProto, feeds: dict[str, Any]) -> tuple[list[Any], str]:
        """The outputs of a node, and the engine that gave them. UnsupportedError where none can."""
        reasons = []
        for name in self.engines(node):
            try:
                return self.by(name, node, feeds), name
            except Exception as error:  # each engine raises its own kinds
                reasons.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
        raise UnsupportedError(f'node "{node.name}" ({node.op_type}) cannot be evaluated: {"; ".join(reasons)}')

    def voted(self, node: NodeProto, feeds: dict[str, Any], results: list[Any], found: Evaluation) -> list[Any]:
        """The results that two of three engines agree on, where there are three; else those of the first."""
        first = found.engines[node.name]
        rest = [name for name in self.engines(node) if name != first]
        second = self._opinion(rest[0], node, feeds) if rest and first != "onnxc" else None
        difference = _unlike(results, second)
        if second is None or difference is None:
            return results
        third = self._opinion(rest[1], node, feeds) if len(rest) > 1 else None
        if third is None or (_unlike(second, third) is not None and _shapes(second) != _shapes(third)):
            return results
        if _unlike(second, third) is not None and _shapes(results) == _shapes(third):
            return results  # three opinions, of one shape
        found.engines[node.name] = rest[0]
        found.disputes.append(Dispute(node.name, node.op_type, rest[0], first, difference))
        return second

    def _opinion(self, engine: str, node: NodeProto, feeds: dict[str, Any]) -> list[Any] | None:
        try:
            return self.by(engine, node, feeds)
        except Exception:  # it does not know the operator
            return None

    def engines(self, node: NodeProto) -> Sequence[str]:
        right = self.known.engines.get(node.name, "onnxruntime" if node.op_type in self.faulty else self.order[0])
        if right == self.order[0]:
            return self.order
        if self.wide:  # onnxc's own code knows f64, ONNX Runtime often does not
            return [name for name in ("onnxc", right, *self.order) if name in self.order and name != "reference"]
        return sorted(self.order, key=lambda name: name != right)

    def by(self, engine: str, node: NodeProto, feeds: Mapping[str, Any]) -> list[Any]:
        """The outputs of a node by one engine."""
        wide = self.wide and engine != "onnxruntime"
        if self.wide and not wide:
            feeds = {name: self._narrowed(name, array) for name, array in feeds.items()}
        part = widened_node(node) if wide else node
        plain = engine == "reference"  # which copies no weights into a model of its own
        model = self.subject.model([part], feeds, [name for name in node.output if name], constants=not plain)
        if not plain:
            self._fix_small(model, feeds)
        results = list(ENGINES[engine](model, feeds))
        return [self._widened(result) for result in results] if self.wide else results

    def _fix_small(self, model: ModelProto, feeds: Mapping[str, Any]) -> None:
        """Makes integers that may decide shapes constants: a compiler has to know them."""
        for value in list(model.graph.input):
            array = feeds.get(value.name)
            if isinstance(array, np.ndarray) and array.size <= SMALL and array.dtype.kind in "iu":
                model.graph.input.remove(value)
                model.graph.initializer.append(numpy_helper.from_array(array, value.name))

    def widened_arrays(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: self._widened(array) for name, array in arrays.items()} if self.wide else arrays

    def _widened(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._widened(part) for part in value]
        if isinstance(value, np.ndarray) and of_numpy(value.dtype).kind == "float":
            return value.astype(np.float64)
        return value

    def _narrowed(self, name: str, value: Any) -> Any:
        known = self.known.values.get(name, self.subject.constants.get(name))
        if isinstance(value, np.ndarray) and isinstance(known, np.ndarray):
            return value.astype(known.dtype)
        return value


def _shapes(results: Sequence[Any]) -> list[tuple[int, ...]]:
    return [shape_of(result) for result in results if not isinstance(result, list | tuple)]


def _unlike(results: Sequence[Any], others: Sequence[Any] | None) -> Difference | None:
    """How results of one node on the same operands differ, by so much that rounding is no excuse: half the digits."""
    for number, (result, other) in enumerate(zip(results, others or (), strict=False)):
        if result is None or other is None:
            continue
        unit = unit_roundoff(of_numpy(np.asarray(result).dtype)) if not isinstance(result, list | tuple) else 0.0
        found = compare(str(number), result, other, Tolerance(math.sqrt(unit), steps=0 if unit else 1))
        if not found.same:
            return found
    return None


def widened_node(node: NodeProto) -> NodeProto:
    """The node with f64 wherever it says that floats are narrower, the graphs in it included."""
    wide = NodeProto()
    wide.CopyFrom(node)
    for attribute in wide.attribute:
        if attribute.name in ("to", "dtype", "output_dtype", "stash_type") and _is_float(attribute.i):
            attribute.i = F64.onnx
        if attribute.HasField("t"):
            _widen_tensor(attribute.t)
        if attribute.HasField("g"):
            _widen_graph(attribute.g)
    return wide


def _widen_graph(graph: GraphProto) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if _is_float(value.type.tensor_type.elem_type):
            value.type.tensor_type.elem_type = F64.onnx
    nodes = [widened_node(node) for node in graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _widen_tensor(tensor: TensorProto) -> None:
    if _is_float(tensor.data_type):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def _is_float(number: int) -> bool:
    return number in BY_ONNX and BY_ONNX[number].is_float
