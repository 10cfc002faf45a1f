"""`check`: a compiled model against what ONNX says it computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from ...compiler.compiled import here
from ...compiler.deferred import Deferred
from ...compiler.driver import compile_graph, compile_model, imported, passed
from ...compiler.importer import import_model
from ...compiler.interface import Interface
from ...compiler.options import Model, Options, target_of
from ...compiler.specialize import SpecializingExecutable, load_proto
from ...compiler.weights import load_model
from ...ir.dtypes import BY_NAME, F32, of_numpy
from ...ir.errors import DeviceError, HostNeeded, OnnxcError, ShapeError, TargetError, UnsupportedError, ValueNeeded
from ...ir.graph import Graph, TensorType
from ...passes.pipeline import Pass
from ..arrays import read_arrays
from .compare import Difference, Tolerance, compare, shape_of
from .evaluate import FAULTY, Evaluation, Evaluator
from .inputs import ATTEMPTS, bare_graph, made_inputs, ports_of, shapes_for
from .noise import Noise, measure
from .subject import SMALL, Subject, subject_of, with_constants
from .tolerance import tolerances

ORACLES: Mapping[str, tuple[str, ...]] = {
    "auto": ("reference", "onnxruntime", "onnxc"),
    "reference": ("reference", "onnxruntime", "onnxc"),
    "onnxruntime": ("onnxruntime", "reference", "onnxc"),
    "f64": ("reference", "onnxruntime", "onnxc"),
}
"""Who is asked about a node, the first first; "f64" asks with all floats widened."""


UNKNOWN = 1e-4
"""The tolerance, relative to the largest element, of what no error model can be made for."""


MOST = 0.25
"""The largest tolerance that still tells anything; what is further off is measured."""
HOPELESS = 1e5
"""Times the tolerance from which on no rounding explains a difference."""


@dataclass(frozen=True)
class Stage:
    """The graph after a pass: its name ("import" before any), its number in the pipeline, and the pass."""

    name: str
    number: int
    graph: Graph

    def __str__(self) -> str:
        return f"{self.name} ({self.number})" if self.number else self.name


class Build:
    """A model compiled afresh (never from the cache), with the graph after every pass; one whose inputs decide axes is
    compiled for the inputs of each run."""

    def __init__(self, model: Model, options: Options) -> None:
        self.options = replace(options, target=here(target_of(options)))
        self.stages: list[Stage] = []
        self._executable: Interface | Deferred
        try:
            self._executable = self._compiled(model, self.options)
        except ValueNeeded as error:
            if isinstance(model, Graph):
                raise
            proto, folder = load_proto(model)
            within = replace(self.options, folder=folder)

            def compile_values(
                known: onnx.ModelProto, shapes: Mapping[str, Sequence[int | None]], smallest: int
            ) -> Interface:
                shapes = {**(within.shapes or {}), **shapes}
                return self._compiled(known, replace(within, shapes=shapes, smallest=smallest))

            self._executable = SpecializingExecutable(proto, compile_values, str(error))
        except HostNeeded:  # Python runs a part of it: there is no one graph to look into
            self.stages = []
            self._executable = compile_model(model, replace(self.options, after=lambda *_: None))

    def _compiled(self, model: Model, options: Options) -> Interface:
        self.stages = stages_of(model, options)
        return compile_graph(self.stages[-1].graph, target_of(options), options)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name."""
        return self._executable.run(inputs)

    def kernels(self, inputs: Mapping[str, Any]) -> Mapping[str, tuple[str, ...]]:
        """The ONNX nodes of each kernel that runs for these inputs."""
        executable = self._executable
        if isinstance(executable, SpecializingExecutable):
            executable = executable.specialized(inputs)
        return executable.compiled.kernels if self.stages else {}

    def observed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the optimised program by name: the same kernels with every value between them an output; of a
        model that Python runs in part the outputs alone."""
        if not self.stages:
            return self.run(inputs)
        graph = self.stages[-1].graph
        constants = {value for node in graph.nodes if node.op == "Constant" for value in node.outputs}
        seen = [
            value
            for node in graph.nodes
            for value in node.outputs
            if value not in constants and isinstance(value.type, TensorType) and value not in graph.outputs
        ]
        shown = replace(graph, outputs=(*graph.outputs, *seen))
        executable = compile_graph(shown, target_of(self.options), self.options)
        taken = {port.name for port in executable.inputs}
        return executable.run({name: array for name, array in inputs.items() if name in taken})


def stages_of(model: Model, options: Options, until: int | None = None) -> list[Stage]:
    """The graph as imported and after each pass, up to number `until`."""
    stages = [Stage("import", 0, imported(model, options))]

    class Enough(Exception):
        """The pass that is wanted has run."""

    def after(item: Pass, graph: Graph, seconds: float) -> None:
        stages.append(Stage(item.name, len(stages), graph))
        if options.after is not None:
            options.after(item, graph, seconds)
        if len(stages) - 1 == until:
            raise Enough

    if until != 0:
        with suppress(Enough):
            passed(stages[0].graph, replace(options, after=after))
    return stages


@dataclass
class Judge:
    """Compares values of one model on one set of inputs with the reference's, within what rounding may do.

    `precision` is that of the compiled model.
    """

    subject: Subject
    inputs: Mapping[str, Any]
    reference: Evaluation
    precision: str = "f32"
    samples: bool = True

    @cached_property
    def tolerances(self) -> Mapping[str, Tolerance]:
        """By the error model, for the values that the imported graph has under their names."""
        try:
            return tolerances(self.graph, precision=self.precision)
        except OnnxcError:  # what Python runs in part is never imported as a whole
            return {}

    @cached_property
    def graph(self) -> Graph:
        return import_sized(self.subject, self.inputs)

    @cached_property
    def noise(self) -> Noise | None:
        """What rounding does to all values, measured; None where it cannot be."""
        if not self.samples:
            return None
        try:
            return measure(self.subject, self.inputs, self.reference, self.tolerances, self.subject.values)
        except (OnnxcError, ArithmeticError, ValueError):
            return None

    def compare(self, name: str, actual: Any) -> Difference:
        """`actual` with the reference's value of that name."""
        expected = self.reference.values[name]
        if name in self.reference.random:
            plain = compare(name, np.zeros_like(actual), np.zeros_like(expected))
            return replace(plain, reason=plain.reason or "random: only type and shape are compared")
        return self.difference(name, actual, expected)

    def difference(self, name: str, actual: Any, expected: Any) -> Difference:
        """`actual` with what was expected, by the tolerance for the value of that name; for a name that the imported
        graph does not know by the largest there is."""
        found = compare(name, actual, expected, self.tolerance(name))
        if found.same or shape_of(actual) != shape_of(expected) or _is_beyond(found) or self.noise is None:
            return found
        return self.noise.explains(name, found, actual, expected)

    def tolerance(self, name: str) -> Tolerance:
        """How far a value may be off before it is measured."""
        found = self.tolerances.get(name) or self.loosest
        return replace(found, relative=min(found.relative, MOST))

    @cached_property
    def loosest(self) -> Tolerance:
        return Tolerance(max((tolerance.relative for tolerance in self.tolerances.values()), default=UNKNOWN))


def _is_beyond(found: Difference) -> bool:
    """Whether no rounding explains a difference, so that there is no need to measure it: floats alone have noise."""
    return BY_NAME.get(found.dtype, F32).is_float and found.excess > HOPELESS


def import_sized(subject: Subject, inputs: Mapping[str, Any]) -> Graph:
    """The subject's graph with the sizes that the inputs have, and with the small integers among them as constants
    where it cannot be had without."""
    shapes = {name: shape_of(array) for name, array in inputs.items() if not isinstance(array, list)}
    try:
        return import_model(part_of(subject, inputs), shapes={n: s for n, s in shapes.items() if n in subject.inputs})
    except (ValueNeeded, ShapeError):  # the latter in a branch that is not taken
        fixed = {n: a for n, a in inputs.items() if isinstance(a, np.ndarray) and a.size <= SMALL and a.ndim <= 1}
        known = with_constants(subject, fixed)
        return import_model(part_of(known, {n: a for n, a in inputs.items() if n not in fixed}))


def part_of(subject: Subject, inputs: Mapping[str, Any]) -> onnx.ModelProto:
    """The whole subject as a model whose inputs have the types and sizes of these arrays."""
    return subject.model(subject.nodes, inputs, subject.outputs, subject.inputs)


@dataclass(frozen=True)
class Verdict:
    """One output: how it differs from the reference, and on a difference who agrees with whom.

    `agreement` tells for ONNX Runtime and the evaluation in f64 whether they agree with the (compiled, reference)
    result. `status` is "same", "rounding" (no further off than rounding alone carries it), "tie", "random", "reference
    alone" (ONNX Runtime agrees with the compiled result against the reference) or "differs".
    """

    difference: Difference
    seed: int
    agreement: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)

    @property
    def status(self) -> str:
        if not self.difference.same:
            return "reference alone" if self.agreement.get("onnxruntime") == (True, False) else "differs"
        reason = self.difference.reason
        kinds = {"near a tie": "tie", "rounding moves it as far": "rounding"}
        return "random" if reason.startswith("random") else kinds.get(reason, "same")

    @property
    def good(self) -> bool:
        return self.status != "differs"


@dataclass(frozen=True)
class Case:
    """One run: the inputs, what the reference says, what the compiled model gave, and the verdicts, worst first."""

    seed: int
    inputs: Mapping[str, Any]
    judge: Judge
    actual: Mapping[str, Any]
    verdicts: tuple[Verdict, ...]

    @property
    def good(self) -> bool:
        return all(verdict.good for verdict in self.verdicts)


@dataclass(frozen=True)
class PerNode:
    """Intermediate values of one case, worst first: those that the optimised program still holds under their names.

    `total` counts the values of the ONNX model.
    """

    values: tuple[Difference, ...]
    total: int


@dataclass(frozen=True)
class Checker:
    """Checks one model. `given` are inputs, `fills` how to fill others, as `onnxc run --input` reads them."""

    model: Any
    options: Options
    oracle: str = "auto"
    given: Sequence[str] = ()
    progress: Callable[[str], None] = lambda what: None

    @cached_property
    def proto(self) -> onnx.ModelProto:
        return load_model(self.model, self.options.folder)[0]

    @cached_property
    def subject(self) -> Subject:
        return subject_of(self.model, self.options.folder)

    @cached_property
    def build(self) -> Build:
        self.progress("compiling")
        return Build(self.model, self.options)

    def evaluator(self, subject: Subject | None = None) -> Evaluator:
        faulty = frozenset[str]() if self.oracle == "reference" else FAULTY
        return Evaluator(subject or self.subject, ORACLES[self.oracle], vote=self.oracle == "auto", faulty=faulty)

    def case(self, seed: int = 0, arrays: Mapping[str, Any] | None = None) -> Case:
        """The model run and judged on inputs: `arrays`, and for the others made-up ones.

        Raises ModelError where the model cannot be evaluated on any inputs that are made up.
        """
        inputs, evaluation = self.evaluated(seed, arrays or {})
        judge = Judge(self.subject, inputs, evaluation, self.options.precision)
        build = self.build
        self.progress("running")
        try:
            actual = build.run(inputs)
        except (UnsupportedError, TargetError, DeviceError):
            raise
        except OnnxcError as error:  # ONNX's semantics has a result for these inputs
            refused = [_refused(name, evaluation.values[name], str(error), seed) for name in self.subject.outputs]
            return Case(seed, inputs, judge, {}, tuple(refused))
        self.progress("comparing")
        verdicts = [self.verdict(judge, name, actual[name], seed) for name in self.subject.outputs]
        return Case(seed, inputs, judge, actual, tuple(sorted(verdicts, key=lambda v: v.difference.severity)))

    def evaluated(self, seed: int, arrays: Mapping[str, Any]) -> tuple[dict[str, Any], Evaluation]:
        """Inputs that suit the model, and what the oracle says of all its values."""
        ports = ports_of(self.proto.graph, self.subject.constants)
        given, fills = read_arrays(self.given, ports)
        given |= arrays
        attempts = len(ATTEMPTS) if len(given) < len(ports) else 1
        reasons: list[Exception] = []
        for attempt in range(attempts):
            try:
                shapes = shapes_for(ports, given, self.options.dims or {}, attempt) | dict(self.options.shapes or {})
                inputs = self.inputs(shapes, given, fills, seed)
                self.progress("evaluating")
                return inputs, self.oracle_values(inputs)
            except (OnnxcError, IndexError) as error:
                reasons.append(error)
        raise reasons[0]

    def inputs(
        self, shapes: Mapping[str, Any], given: Mapping[str, Any], fills: Mapping[str, str], seed: int
    ) -> dict[str, Any]:
        random = np.random.default_rng(seed)
        small = {p.name: p for p in ports_of(self.proto.graph, self.subject.constants)}
        try:
            graph = imported(self.model, replace(self.options, dims=None, shapes=shapes))
        except HostNeeded:
            graph = bare_graph(self.proto.graph, self.subject.constants, shapes)
        except (ValueNeeded, ShapeError):
            fixed = {n: given[n] if n in given else self.guess(n, small[n].dtype, shapes[n], random) for n in shapes
                     if np.prod(shapes[n], dtype=int) <= SMALL and len(shapes[n]) <= 1}  # fmt: skip
            known = with_constants(self.subject, fixed)
            sized = {n: np.broadcast_to(np.zeros((), BY_NAME[small[n].dtype].numpy), shapes[n]) for n in known.inputs}
            graph = import_model(part_of(known, sized))
            given = {**given, **fixed}
        return made_inputs(graph, given, fills, random) | {n: a for n, a in given.items() if n in shapes}

    def guess(self, name: str, dtype: str, shape: tuple[int, ...], random: np.random.Generator) -> Any:
        """A value for an input that the graph's form hangs on: one of those that it is compared with, else 1."""
        choices: list[float] = []
        for node in self.subject.nodes:
            if node.op_type == "Equal" and name in node.input:
                for other in set(node.input) & set(self.subject.constants):
                    choices += np.asarray(self.subject.constants[other]).reshape(-1).tolist()
        return random.choice(np.array(choices or [1]), shape).astype(BY_NAME[dtype].numpy).reshape(shape)

    def oracle_values(self, inputs: Mapping[str, Any]) -> Evaluation:
        if self.oracle != "f64":
            return self.evaluator()(inputs)
        plain = self.evaluator()(inputs)
        wide = Evaluator(self.subject, ORACLES["f64"], wide=True, known=plain)(inputs)
        wide.values = {name: _as(array, plain.values.get(name)) for name, array in wide.values.items()}
        return wide

    def per_node(self, case: Case) -> PerNode:
        """The intermediate values of a case, worst first: those that exist under their ONNX names after optimising.

        Raises what the compiled model raises where it refuses the inputs.
        """
        self.progress("observing all kernels")
        reference = case.judge.reference
        observed = with_transposed(self.build.observed(case.inputs))
        named = [name for name in self.subject.values if reference.values.get(name) is not None]
        seen = [n for n in named if n in observed and shape_of(observed[n]) == shape_of(reference.values[n])]
        found = [case.judge.compare(name, observed[name]) for name in seen]
        return PerNode(tuple(sorted(found, key=lambda difference: difference.severity)), len(named))

    def verdict(self, judge: Judge, name: str, actual: Any, seed: int) -> Verdict:
        """An output judged; where it differs the other oracles are asked too."""
        found = judge.compare(name, actual)
        if found.same:
            return Verdict(found, seed)
        self.progress("asking the other oracles")
        return Verdict(found, seed, self.agreement(judge, name, actual))

    def agreement(self, judge: Judge, name: str, actual: Any) -> dict[str, tuple[bool, bool]]:
        """Whether ONNX Runtime's result and that in f64 agree with the compiled and with the reference's one."""
        expected = judge.reference.values[name]
        found = {}
        for oracle, value in self.opinions(judge, name).items():
            pair = []
            for other in (actual, expected):
                near = compare(name, other, _as(value, expected), judge.tolerance(name))
                noise = None if near.same or _is_beyond(near) else judge.noise
                pair.append((near if noise is None else noise.explains(name, near, other, _as(value, expected))).same)
            found[oracle] = (pair[0], pair[1])
        return found

    def opinions(self, judge: Judge, name: str) -> dict[str, Any]:
        """What the other oracles say of a value; ONNX Runtime's word counts where it evaluated every node."""
        found: dict[str, Any] = {}
        try:
            other = Evaluator(self.subject, ("onnxruntime",))(judge.inputs, [name])
            found["onnxruntime"] = other.values[name]
        except (UnsupportedError, ImportError):
            pass
        with suppress(OnnxcError):
            wide = Evaluator(self.subject, wide=True, known=judge.reference)(judge.inputs, [name])
            found["f64"] = wide.values[name]
        return found


def _refused(name: str, expected: Any, why: str, seed: int) -> Verdict:
    """The verdict on an output that a compiled model did not give."""
    empty = compare(name, np.zeros(0), np.zeros(0))
    dtype = "seq" if isinstance(expected, list) else of_numpy(np.asarray(expected).dtype).name
    refused = replace(empty, dtype=dtype, shape=shape_of(expected), excess=np.inf, noise_db=-np.inf)
    return Verdict(replace(refused, reason=f"the compiled model refuses these inputs: {why}"), seed)


def turned(name: str) -> tuple[str, tuple[int, ...]] | None:
    """Of a value that a pass keeps with its axes in another order: the name of the plain value, and the order."""
    match = re.fullmatch(r"(.+)\.(\d+)", name)
    order = tuple(map(int, match[2])) if match else ()
    return (match[1], order) if match and len(order) > 1 and sorted(order) == list(range(len(order))) else None


def with_transposed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, and under their plain names those that are there with their axes in another order."""
    found = dict(values)
    for name, array in values.items():
        plain = turned(name)
        if plain is not None and len(plain[1]) == len(shape_of(array)):
            found.setdefault(plain[0], np.transpose(array, np.argsort(plain[1])))
    return found


def _as(value: Any, like: Any) -> Any:
    """An f64 value in the type that it has in truth."""
    known = isinstance(value, np.ndarray) and isinstance(like, np.ndarray) and like.dtype != object
    if not known:
        return value
    with np.errstate(all="ignore"):
        return value.astype(like.dtype)
