"""A compiled model against ONNX's reference and, where they disagree, against ONNX Runtime.

How far two right results may lie apart is not a fixed number: it follows from the element type, and where that is not
enough, from the model itself. `Perturbed` runs the reference with every operand and result of every node that rounds
moved by a few units in the last place; a result may differ by as much as those runs differ from each other. So an
ill-conditioned model gets its due, and a wrong number in a well-conditioned one is found whatever its size.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxc
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnxc.ir.ops import REGISTRY

Array = npt.NDArray[Any]
Values = Mapping[str, Any]
Opinion = Callable[[onnx.ModelProto], Values]
REFERENCE = "the reference"

UNITS = 32
"""Units in the last place that may lie between two results of one node, of its own size and (an eighth of it) of the
largest element's: polynomials of a few ulp, sums in another order."""
TRIALS = 24
"""Perturbed runs that excuse a difference."""
EXACT = {
    *(name for name, operator in REGISTRY.items() if operator.movement),
    *("Abs", "Neg", "Relu", "Max", "Min", "Clip", "Sign", "Floor", "Ceil", "Round", "Equal", "Less", "Greater"),
    *("LessOrEqual", "GreaterOrEqual", "ArgMax", "ArgMin", "TopK", "Where", "IsNaN", "IsInf", "NonZero", "Shape"),
    *("MaxPool", "ReduceMax", "ReduceMin", "Gather", "GatherND", "GatherElements", "ScatterND", "ScatterElements"),
}
"""Operators that round nothing."""


@dataclass(frozen=True)
class Outcome:
    """What came of a comparison: nothing wrong where `message` is empty; `refused` says what was not run."""

    message: str = ""
    refused: str = ""


@contextmanager
def quiet() -> Iterator[None]:
    """Without numpy's words on overflow and NaN."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def as_outputs(names: Sequence[str], arrays: Sequence[Any]) -> dict[str, Any]:
    return {n: a if isinstance(a, list) or a is None else np.asarray(a) for n, a in zip(names, arrays, strict=True)}


def by_reference(model: onnx.ModelProto, inputs: Values) -> dict[str, Any]:
    """What ONNX's reference computes."""
    with quiet():
        evaluator = ReferenceEvaluator(model, new_ops=CORRECTED)
        return as_outputs(evaluator.output_names, evaluator.run(None, dict(inputs)))


def by_onnxruntime(model: onnx.ModelProto, inputs: Values) -> dict[str, Any]:
    """What ONNX Runtime computes, node by node as the model has them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    taken = {value.name for value in session.get_inputs()}
    return as_outputs(names, session.run(names, {n: a for n, a in inputs.items() if n in taken}))


INTEGERS = (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2)
"""Those that numpy does not know as integers."""


def is_float(array: Array) -> bool:
    return array.dtype.kind in "fc" or (array.dtype.kind == "V" and array.dtype not in INTEGERS)


def unit(dtype: np.dtype[Any]) -> float:
    """One unit in the last place of 1."""
    return float(ml_dtypes.finfo(dtype).eps)


class Erf(OpRun):
    """As the reference has it, but for f64, which it rounds to f32."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype),)


ASSUMED = "the model needs"
"""Said at a run whose sizes broadcast in another way than the code was compiled for: one is 1 that need not be."""
CORRECTED = [Erf]
"""Operators that the reference computes wrongly, and that ONNX Runtime lacks for the type."""


class Perturbed(ReferenceEvaluator):
    """The reference, each value that a rounding node reads or gives moved by some units in the last place."""

    def __init__(self, model: onnx.ModelProto, seed: int) -> None:
        super().__init__(model, new_ops=CORRECTED)
        self.random = np.random.default_rng(seed)
        for node in self.rt_nodes_:
            if node.op_type not in EXACT:
                node.run = functools.partial(self.moved, node.run)

    def moved(self, run: Callable[..., Any], *operands: Any, **keywords: Any) -> Any:
        result = run(*map(self.move, operands), **keywords)
        return tuple(self.move(value, 1) for value in result)

    def move(self, value: Any, absolute: float = 0.0) -> Any:
        """Each element moved by a part of itself, and by `absolute` such parts of an eighth of the largest one."""
        if (
            not isinstance(value, np.ndarray | np.generic)
            or not is_float(np.asarray(value))
            or value.dtype.itemsize < 2
        ):
            return value
        by = self.random.uniform(-UNITS / 4, UNITS / 4, np.shape(value)) * unit(value.dtype)
        exact = wide(np.asarray(value))
        largest = np.abs(exact[np.isfinite(exact)]).max(initial=0.0) * absolute / 8
        return np.asarray(exact + (exact + largest) * by).astype(value.dtype)


def wide(array: Array) -> Array:
    """As f64 (or complex128), in which every element type can be subtracted, bar integers, which are compared whole."""
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def unequal(found: Array, wanted: Array, slack: Array | float = 0.0) -> Array:
    """Where elements differ by more than the type's rounding and `slack`."""
    if not is_float(wanted):
        return np.asarray(found != wanted)
    with quiet():
        a, b = wide(found), wide(wanted)
        finite = np.abs(b[np.isfinite(b)])
        reach = UNITS * unit(wanted.dtype)
        tiny = float(ml_dtypes.finfo(wanted.dtype).smallest_subnormal) if wanted.dtype.itemsize > 1 else 0.0
        bound = reach * np.abs(b) + reach / 8 * finite.max(initial=0.0) + 2 * tiny + slack
        same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= bound)
        return np.asarray(~same)


def described(name: str, found: Any, wanted: Any, by: str, slack: Array | float = 0.0) -> str:
    """What differs between two values of an output; "" where nothing does."""
    if isinstance(wanted, list) or isinstance(found, list) or wanted is None or found is None:
        if not isinstance(wanted, list) or not isinstance(found, list) or len(wanted) != len(found):
            return f"{name}: {found!r}, by {by} {wanted!r}"
        return next(filter(None, (described(name, a, b, by) for a, b in zip(found, wanted, strict=True))), "")
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return f"{name}: {found.dtype}{list(found.shape)}, by {by} {wanted.dtype}{list(wanted.shape)}"
    wrong = unequal(found, wanted, slack)
    if not wrong.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"{name}{list(at)}: {found[at]!r}, by {by} {wanted[at]!r} ({int(wrong.sum())} of {wrong.size} differ)"


def compared(found: Values, wanted: Values, by: str) -> str:
    """The first output that differs, in words."""
    return next(filter(None, (described(name, found[name], value, by) for name, value in wanted.items())), "")


def excused(model: onnx.ModelProto, inputs: Values, found: Values, wanted: Values) -> bool:
    """Whether perturbed runs of the reference differ from it as much as what was found does."""
    slack = {name: np.zeros(np.shape(value)) for name, value in wanted.items()}
    for trial in range(TRIALS):
        with quiet():
            try:
                evaluator = Perturbed(model, trial)
                run = as_outputs(evaluator.output_names, evaluator.run(None, dict(inputs)))
            except Exception:  # an index that a rounding moved out of range: the model decides nothing there
                return True
            for name, value in run.items():
                if isinstance(value, list) or value is None:
                    continue
                if value.shape != slack[name].shape:  # so many elements are chosen by a comparison of rounded values
                    slack[name] = np.full((), np.inf)
                    continue
                a, b = wide(value), wide(wanted[name])
                moved = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
                slack[name] = np.maximum(slack[name], np.where(np.isnan(moved), np.inf, moved))
    for name, value in wanted.items():
        if isinstance(value, list) or value is None:
            continue
        if slack[name].shape != value.shape:
            continue
        if not is_float(value):
            if not (found[name].shape == value.shape and np.all((found[name] == value) | (slack[name] > 0))):
                return False
        elif (
            found[name].shape != value.shape
            or found[name].dtype != value.dtype
            or np.any(unequal(found[name], value, 4 * slack[name]) & ~np.isinf(slack[name]))
        ):
            return False
    return True


def reads(node: onnx.NodeProto) -> set[str]:
    """The names that a node and its bodies read."""
    names = set(node.input) - {""}
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                names |= reads(inner)
            names |= {value.name for value in attribute.g.output}
    return names


def pruned(model: onnx.ModelProto, outputs: Collection[str], cut: Collection[str] = ()) -> onnx.ModelProto:
    """The model of these outputs alone; values in `cut` are taken for granted, and what computes them is left out."""
    needed, nodes, graph = set(outputs), [], model.graph
    for node in reversed(graph.node):
        if needed & set(node.output) - set(cut):
            nodes.append(node)
            needed |= reads(node)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for field, kept in (
        ("node", nodes[::-1]),
        ("input", [value for value in graph.input if value.name in needed]),
        ("output", [value for value in graph.output if value.name in outputs]),
        ("initializer", [tensor for tensor in graph.initializer if tensor.name in needed]),
    ):
        result.graph.ClearField(field)
        getattr(result.graph, field).extend(kept)
    return result


def check_run(model: onnx.ModelProto, inputs: Values, found: Values, others: Sequence[tuple[str, Opinion]]) -> Outcome:
    """What was found for these inputs, compared with one opinion after the other until one agrees, output by output.

    An opinion is what another implementation gives for the model pruned to some outputs, or raises. Refused where all
    raise for an output.
    """
    names = [output.name for output in model.graph.output]
    if set(names) - set(found):
        return Outcome(f"there is no output {set(names) - set(found)}")
    for output in [names, *([name] for name in names)]:
        differences, troubles = [], []
        small = pruned(model, output)
        for by, opinion in others:
            try:
                wanted = {name: value for name, value in opinion(small).items() if name in output}
            except Exception as error:
                troubles.append(f"{by}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                continue
            difference = compared(found, wanted, by)
            if not difference or (by == REFERENCE and excused(small, inputs, found, wanted)):
                break
            differences.append(difference)
        else:
            if output is not names or len(names) == 1:
                return Outcome("; ".join(differences), "" if differences else "; ".join(troubles))
            continue
        if output is names:
            return Outcome()
    return Outcome()


def told(values: Values, model: onnx.ModelProto) -> Values:
    """The opinion that is there already."""
    return values


def check(
    model: onnx.ModelProto,
    cases: Sequence[Values],
    expected: Sequence[Values] | None = None,
    third: tuple[str, Sequence[Values]] | None = None,
) -> Outcome:
    """The model compiled once and run on each case; `expected` are the reference's results where they are there.

    A model that is refused with an UnsupportedError is no difference; any other error is. `third` names what else has
    been computed for each case.
    """
    try:
        executable = onnxc.compile(model, threads=1)
        runs = [dict(executable.run(case)) for case in cases]
    except onnxc.UnsupportedError as error:
        return Outcome(refused=str(error))
    except Exception as error:
        if isinstance(error, onnxc.ShapeError) and ASSUMED in str(error):
            return Outcome(refused=str(error))
        return Outcome(f"{type(error).__name__}: {error}")
    for number, (case, found) in enumerate(zip(cases, runs, strict=True)):
        given = expected[number] if expected else None
        others: list[tuple[str, Opinion]] = [
            (
                REFERENCE,
                functools.partial(by_reference, inputs=case) if given is None else functools.partial(told, given),
            ),
            ("ONNX Runtime", functools.partial(by_onnxruntime, inputs=case)),
        ]
        if third is not None:
            others.append((third[0], functools.partial(told, third[1][number])))
        outcome = check_run(model, case, found, others)
        if outcome.message or outcome.refused:
            return outcome
    return Outcome()
