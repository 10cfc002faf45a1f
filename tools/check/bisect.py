"""Where a fault is: the first pass after which a model computes something else, and the smallest part that shows it.

The graph after each pass is written as ONNX again and evaluated by the oracle, so that neither later passes nor the
code generator have a part in it. Where all are right the code is wrong: then the program is run with every value
between its kernels an output, and the first that differs names the kernel. The guilty nodes are then cut out of the
ONNX model, with the reference's values in place of what was around them, and fewer and fewer of them tried (delta
debugging: Zeller & Hildebrandt 2002, "Simplifying and isolating failure-inducing input").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from ...compiler.driver import compile_graph
from ...compiler.nodes import names_read
from ...compiler.options import Options, target_of
from ...ir.dims import as_symbol
from ...ir.errors import OnnxcError
from ...ir.export import to_onnx
from ...ir.graph import Constant, Graph, Node, TensorType
from .compare import Difference, shape_of
from .engine import Build, Case, Checker, Judge, Stage, stages_of, turned
from .evaluate import FAULTY, Evaluation, Evaluator
from .subject import SMALL, Subject, subject_of, with_constants

TRIALS = 300
"""Parts of a model that are tried."""


OPEN, SIZED, FIXED = FORMS = ("open", "sized", "fixed")
"""Forms of a part: sizes that are symbols of the model stay symbols; all are numbers; and small vectors are constants,
which may decide what the rest of a part means."""


@dataclass(frozen=True)
class Part:
    """A part of a model that shows a fault by itself: its nodes by name, the model, and inputs for it."""

    nodes: tuple[str, ...]
    model: onnx.ModelProto
    inputs: Mapping[str, Any]
    difference: Difference
    trials: int


@dataclass(frozen=True)
class Fault:
    """What is at fault: a pass ("import" for the reading of the model) by `stage`, or the code: `kernels` by name.

    `kind` is "import", "pass", "kernel", "plan" (each kernel is right alone: the memory plan, or what is written in
    place), or "code" (of a model that Python runs in part, which no pass sees as a whole). `nodes` are the ONNX nodes
    that it was about, `value` the first value that differs, `part` the smallest part of the model that shows it (None:
    none was found). `unseen` are the passes after which nothing could be evaluated.
    """

    kind: str
    stage: Stage | None
    value: str
    nodes: tuple[str, ...]
    kernels: tuple[str, ...] = ()
    difference: Difference | None = None
    part: Part | None = None
    unseen: tuple[str, ...] = ()

    @property
    def culprit(self) -> str:
        if self.kind in ("pass", "import") and self.stage is not None:
            return f"pass {self.stage}" if self.kind == "pass" else "the import of the model"
        if self.kind == "plan":
            return "the memory plan: each kernel is right by itself"
        if self.kind == "code":
            return "what Python and compiled code run between them"
        return f"the code of kernel {', '.join(self.kernels) or 'of ' + self.value}"


def find_fault(checker: Checker, case: Case) -> Fault | None:
    """The fault behind a case in which outputs differ; None where nothing differs when it is looked at again, or where
    the compiled model refused the inputs."""
    if not case.actual:
        return None
    return _Search(checker, case).fault()


def subject_of_graph(graph: Graph) -> Subject:
    """A graph of the compiler as ONNX nodes, constants not copied. UnsupportedError where ONNX has no word for it."""
    constants = {}
    nodes = []
    for node in graph.nodes:
        handle = node.attributes.get("value")
        if node.op == "Constant" and isinstance(handle, Constant):
            constants[node.output.name] = handle.array
        else:
            nodes.append(node)
    outputs = tuple(value for value in graph.outputs if value.name not in constants)
    subject = subject_of(to_onnx(replace(graph, nodes=tuple(nodes), outputs=outputs)))
    return with_constants(subject, constants)


@dataclass
class _Search:
    checker: Checker
    case: Case
    unseen: list[str] = field(default_factory=list)

    @property
    def build(self) -> Build:
        return self.checker.build

    @property
    def judge(self) -> Judge:
        return self.case.judge

    def fault(self) -> Fault | None:
        before: Evaluation | None = None
        previous: Stage | None = None
        for stage in self.build.stages:
            if previous is not None and stage.graph == previous.graph:
                previous = stage
                continue
            self.checker.progress(f"evaluating after {stage.name}")
            found = self.evaluated(stage.graph)
            if found is None:
                self.unseen.append(str(stage))
                continue
            if self.outputs_differ(stage.graph, found):
                found = self.evaluated(stage.graph, vote=True) or found
                if found.compiled and previous is not None and self.code_differs(previous.graph):
                    break
                if self.outputs_differ(stage.graph, found):
                    return self.in_pass(stage, found, before)
            before, previous = found, stage
        return self.in_code(before)

    def code_differs(self, graph: Graph) -> bool:
        """Whether onnxc's own code for a graph that is right computes something else."""
        found = evaluate_compiled(graph, self.inputs_of(graph), self.build.options)
        return found is not None and self.outputs_differ(graph, found)

    def inputs_of(self, graph: Graph) -> dict[str, Any]:
        taken = {value.name for value in graph.inputs}
        return {name: array for name, array in self.case.inputs.items() if name in taken}

    def evaluated(self, graph: Graph, vote: bool = False) -> Evaluation | None:
        """All values of a graph, by the engines that were right about the model."""
        return evaluate_graph(graph, self.inputs_of(graph), self.build.options, vote, self.faulty)

    @cached_property
    def faulty(self) -> frozenset[str]:
        """Operators that the reference computed wrongly."""
        return FAULTY.union(d.operator for d in self.judge.reference.disputes if d.winner == "onnxruntime")

    def outputs_differ(self, graph: Graph, found: Evaluation) -> bool:
        return any(
            not self.judge.compare(name, found.values[value.name]).same
            for name, value in zip(self.judge.subject.outputs, graph.outputs, strict=True)
            if value.name in found.values
        )

    # A pass.

    def in_pass(self, stage: Stage, found: Evaluation, before: Evaluation | None) -> Fault:
        good = dict(before.values if before is not None else {}) | self.judge.reference.values
        value, nodes, difference = first_difference(stage.graph, found.values, good, self.judge)
        positions = self.judge.subject.named({name for node in nodes for name in node.origin})
        names = tuple(self.judge.subject.nodes[i].name for i in sorted(positions))
        kind = "pass" if stage.number else "import"
        part = self.smallest(positions, lambda p, inputs, outputs: self.after_pass(p, inputs, outputs, stage.number))
        return Fault(kind, stage, value, names, (), difference, part, tuple(self.unseen))

    def after_pass(
        self, model: onnx.ModelProto, inputs: Mapping[str, Any], outputs: Sequence[str], number: int
    ) -> Mapping[str, Any] | None:
        """The outputs of a part after the passes up to the guilty one."""
        options = replace(self.build.options, dims=None, shapes=None, progress=None, after=None)
        graph = stages_of(model, options, number)[-1].graph
        found = evaluate_graph(graph, inputs, options, faulty=self.faulty)
        if found is None:
            return None
        return {name: found.values[value.name] for name, value in zip(outputs, graph.outputs, strict=True)}

    # The code.

    def in_code(self, right: Evaluation | None) -> Fault | None:
        self.checker.progress("observing all kernels")
        if not self.build.stages:
            return Fault("code", None, "", (), part=self.smallest((), self.compiled))
        graph = self.build.stages[-1].graph
        good = dict(right.values if right is not None else {}) | self.judge.reference.values
        observed = self.build.observed(self.case.inputs)
        value, nodes, difference = first_difference(graph, observed, good, self.judge)
        if not nodes and self.case.good:
            return None
        origins = {name for node in nodes for name in node.origin}
        positions = self.judge.subject.named(origins)
        kernels = self.build.kernels(self.case.inputs)
        exact = [name for name, origin in kernels.items() if any(origin == node.origin for node in nodes)]
        named = exact or [name for name, origin in kernels.items() if origins.intersection(origin)]
        kind = "kernel" if nodes else "plan"
        part = self.smallest(positions, self.compiled)
        names = tuple(self.judge.subject.nodes[i].name for i in sorted(positions))
        found = tuple(named) if nodes else ()
        return Fault(kind, None, value, names, found, difference, part, tuple(self.unseen))

    def compiled(
        self, model: onnx.ModelProto, inputs: Mapping[str, Any], outputs: Sequence[str]
    ) -> Mapping[str, Any] | None:
        """The outputs of a part, compiled."""
        options = replace(self.build.options, dims=None, shapes=None, progress=None, after=None)
        build = Build(model, options)
        return build.run(inputs)

    # The smallest part.

    def smallest(self, start: Iterable[int], run: Callable[..., Mapping[str, Any] | None]) -> Part | None:
        """The fewest nodes that show the fault, found from those that the fault names and what is around them."""
        self.checker.progress("looking for the smallest part")
        shrink = _Shrink(self.judge, run, self.open_sizes())
        subject = self.judge.subject
        everything = set(range(len(subject.nodes)))
        chosen = set(start) or everything
        for _ in range(4):
            if shrink.shows_somehow(chosen):
                break
            chosen = neighbours(subject, chosen)
        else:
            chosen = everything
            if not shrink.shows_somehow(chosen):
                return None
        return shrink.part(shrink.minimal(sorted(chosen)))

    def open_sizes(self) -> dict[str, tuple[str, ...]]:
        """The sizes of values that are symbols of the imported graph, by name; "" for those that are numbers."""
        found: dict[str, tuple[str, ...]] = {}
        graph = self.build.stages[0].graph if self.build.stages else None
        for value in (*graph.inputs, *graph.producers) if graph is not None else ():
            if isinstance(value.type, TensorType):
                symbols = [as_symbol(dim) for dim in value.shape]
                found[value.name] = tuple("" if symbol is None else symbol.name for symbol in symbols)
        return found


def evaluate_graph(
    graph: Graph, inputs: Mapping[str, Any], options: Options, vote: bool = False, faulty: frozenset[str] = FAULTY
) -> Evaluation | None:
    """All values of a graph at any stage, as ONNX; where ONNX has no word for something in it, its outputs by onnxc's
    own code for the graph as it is; None where that fails too."""
    with suppress(OnnxcError):
        return Evaluator(subject_of_graph(graph), vote=vote, faulty=faulty)(inputs)
    return evaluate_compiled(graph, inputs, options)


def evaluate_compiled(graph: Graph, inputs: Mapping[str, Any], options: Options) -> Evaluation | None:
    """The outputs of a graph by onnxc's own code for it, without any pass more; None where it cannot be compiled."""
    try:
        results = compile_graph(graph, target_of(options), options).run(inputs)
    except OnnxcError:
        return None
    return Evaluation(dict(results), compiled=True)


def first_difference(
    graph: Graph, found: Mapping[str, Any], good: Mapping[str, Any], judge: Judge
) -> tuple[str, tuple[Node, ...], Difference | None]:
    """The first value of a graph that is not as it should be, and the nodes that made it of values that are right.

    Values that exist in this graph alone are neither right nor wrong: their nodes count as part of what comes next.
    """
    right: set[str] = {value.name for value in graph.inputs}
    for node in graph.nodes:
        for value in node.outputs:
            actual = _content(node) if node.op == "Constant" else found.get(value.name)
            expected = _expected(value.name, good)
            if actual is None or expected is None or value.name in judge.reference.random:
                continue
            difference = judge.difference(value.name, actual, expected)
            if not difference.same:
                return value.name, _slice(graph, node, right), difference
            right.add(value.name)
    for value in graph.outputs:
        if value.name not in right and value in graph.producers:
            return value.name, _slice(graph, graph.producers[value], right), None
    return "", (), None


def _expected(name: str, good: Mapping[str, Any]) -> Any:
    """What a value should be; also of one that is a known value with its axes in another order."""
    plain = turned(name)
    array = None if plain is None else good.get(plain[0])
    if name in good or plain is None or array is None or len(shape_of(array)) != len(plain[1]):
        return good.get(name)
    return np.transpose(array, plain[1])


def _content(node: Node) -> Any:
    handle = node.attributes["value"]
    assert isinstance(handle, Constant)
    return handle.array


def _slice(graph: Graph, node: Node, right: set[str]) -> tuple[Node, ...]:
    """A node with those before it, up to values that are known to be right."""
    found: dict[Node, None] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        found[current] = None
        producers = [graph.producers[v] for v in current.reads if v in graph.producers and v.name not in right]
        waiting += [p for p in producers if p not in found]
    return tuple(reversed(found))


def neighbours(subject: Subject, chosen: set[int]) -> set[int]:
    """The nodes with those that they read from and that read from them."""
    found = set(chosen)
    for position, reads in enumerate(subject.reads):
        sources = {subject.definer[name] for name in reads if name in subject.definer}
        if position in chosen:
            found |= sources
        if sources & chosen:
            found.add(position)
    return found


@dataclass
class _Shrink:
    """Tries parts of a model: `run(model, inputs, outputs)` gives what the suspect makes of a part."""

    judge: Judge
    run: Callable[[onnx.ModelProto, Mapping[str, Any], Sequence[str]], Mapping[str, Any] | None]
    open_sizes: Mapping[str, tuple[str, ...]]
    form: str = FORMS[0]
    trials: int = 0
    known: dict[tuple[str, frozenset[int]], Difference | None] = field(default_factory=dict)

    def shows_somehow(self, chosen: Iterable[int]) -> bool:
        """Whether a part shows the fault in any of its forms, of which the one that does is kept."""
        for form in FORMS:
            self.form = form
            if self.shows(chosen):
                return True
        return False

    def shows(self, chosen: Iterable[int]) -> Difference | None:
        """How a part differs from the reference's values; None where it does not, or cannot be run."""
        key = self.form, frozenset(chosen)
        if key not in self.known:
            self.known[key] = self._tried(key[1]) if self.trials < TRIALS else None
        return self.known[key]

    def _tried(self, chosen: frozenset[int]) -> Difference | None:
        self.trials += 1
        model, inputs, outputs = self.cut(chosen)
        if not outputs:
            return None
        try:
            found = self.run(model, inputs, outputs)
        except Exception:  # a part may be what no model is
            return None
        if found is None:
            return None
        known = self.read(chosen)
        part = replace(self.judge.subject, nodes=self.nodes(chosen), inputs=tuple(known), outputs=outputs)
        judge = Judge(part, known, self.judge.reference, self.judge.precision)
        try:
            differences = [judge.compare(name, found[name]) for name in outputs]
        except OnnxcError:
            return None
        worst = min(differences, key=lambda difference: difference.severity)
        return None if worst.same else worst

    def nodes(self, chosen: Iterable[int]) -> tuple[onnx.NodeProto, ...]:
        return tuple(self.judge.subject.nodes[i] for i in sorted(chosen))

    def read(self, chosen: Iterable[int]) -> dict[str, Any]:
        """What a part reads from outside but for constants, as the reference has it."""
        nodes, values = self.nodes(chosen), self.judge.reference.values
        made = {name for node in nodes for name in node.output} | set(self.judge.subject.constants)
        return {name: values[name] for name in names_read(nodes) if name in values and name not in made}

    def cut(self, chosen: Iterable[int]) -> tuple[onnx.ModelProto, dict[str, Any], tuple[str, ...]]:
        """The part as a model, inputs with the reference's values, and its outputs: what others read, or nobody."""
        subject, values = self.judge.subject, self.judge.reference.values
        chosen = set(chosen)
        nodes = self.nodes(chosen)
        inside = set(names_read(nodes))
        outside = {name for i, reads in enumerate(subject.reads) if i not in chosen for name in reads}
        outside |= set(subject.outputs)
        made = [name for node in nodes for name in node.output if name and values.get(name) is not None]
        outputs = tuple(name for name in made if name in outside or name not in inside)
        inputs = self.read(chosen)
        if self.form == FIXED:
            fixed = {n: a for n, a in inputs.items() if isinstance(a, np.ndarray) and a.ndim <= 1 and a.size <= SMALL}
            subject = with_constants(subject, fixed)
            inputs = {name: array for name, array in inputs.items() if name not in fixed}
        model = subject.model(nodes, values, outputs)
        if self.form == OPEN:
            for value in (*model.graph.input, *model.graph.output):
                sizes = self.open_sizes.get(value.name, ())
                for dim, size in zip(value.type.tensor_type.shape.dim, sizes, strict=False):
                    if size:
                        dim.dim_param = size
        return model, inputs, outputs

    def minimal(self, chosen: list[int]) -> list[int]:
        """A part of which no node can be left out, by delta debugging."""
        pieces = 2
        while len(chosen) > 1:
            size = -(-len(chosen) // pieces)
            chunks = [chosen[i : i + size] for i in range(0, len(chosen), size)]
            for chunk in chunks:
                rest = [i for i in chosen if i not in chunk]
                smaller = chunk if len(chunks) > 2 and self.shows(chunk) else rest if self.shows(rest) else None
                if smaller is None and len(chunks) == 2 and self.shows(chunk):
                    smaller = chunk
                if smaller is not None:
                    chosen, pieces = smaller, 2
                    break
            else:
                if size == 1:
                    break
                pieces = min(len(chosen), 2 * pieces)
        return chosen

    def part(self, chosen: Sequence[int]) -> Part:
        model, inputs, _ = self.cut(chosen)
        difference = self.shows(chosen)
        assert difference is not None
        return Part(tuple(node.name for node in self.nodes(chosen)), model, inputs, difference, self.trials)


__all__ = ["Fault", "Part", "evaluate_graph", "find_fault", "subject_of_graph"]
