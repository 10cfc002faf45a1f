"""Part 1: the node cases of ONNX's own test suite on a GPU, by family of operators."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .prepare import Prepared, prepared
from .processes import TaskError

if TYPE_CHECKING:
    from .check import Check

Waiting: TypeAlias = "Sequence[tuple[Case, Future[Prepared]]]"

COMPILING, RUNNING = 90.0, 30.0
"""Seconds after which a case is taken to hang."""
TOLD = 200
BY_ONNX, SEVERAL = "by ONNX's definition", "several operators"


@dataclass(frozen=True)
class Case:
    """A model with pairs of inputs and expected outputs; `op` is the operator that it is about."""

    name: str
    op: str
    model: bytes
    data_sets: Sequence[tuple[Sequence[Any], Sequence[Any]]]
    rtol: float = 1e-3
    atol: float = 1e-7


def node_cases() -> list[Case]:
    """All of ONNX's node cases. It makes them anew, which takes some ten seconds."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases: dict[str, Any] = {case.name: case for case in load_model_tests(kind="node")}
    found = []
    for name, case in cases.items():
        # What an operator is defined by, as a model of its own, is named as the case of that operator is.
        about = cases.get(name.partition("_expanded")[0], case)
        ops = {node.op_type if not node.domain else f"{node.domain}.{node.op_type}" for node in about.model.graph.node}
        op = next(iter(ops - {"Constant"}), "Constant") if len(ops - {"Constant"}) < 2 else ""
        found.append(Case(name, op, case.model.SerializeToString(), case.data_sets, case.rtol, case.atol))
    return found


@functools.cache
def _families() -> dict[str, str]:
    from ...ir.ops.declare import Registry

    modules = vars(import_module("...ir.ops", __package__))
    registries = {name: getattr(module, "declare", None) for name, module in modules.items()}
    return {op: name for name, found in registries.items() if isinstance(found, Registry) for op in found.operators}


def family_of(op: str) -> str:
    """The module of `ir/ops/` that declares an operator."""
    return _families().get(op, BY_ONNX if op else SEVERAL)


# On the CPU


def cpu_passes(model: bytes, data_sets: Sequence[Any], rtol: float, atol: float) -> bool:
    """Whether the case passes compiled for this machine's CPU."""
    import onnx

    from ...compiler.onnx_backend import OnnxcBackend

    try:
        run = OnnxcBackend.prepare(onnx.load_model_from_string(model)).run
        return not any(difference(run(inputs), outputs, rtol, atol) for inputs, outputs in data_sets)
    except Exception:
        return False


def difference(actual: Sequence[Any], expected: Sequence[Any], rtol: float, atol: float) -> str:
    """How outputs differ from those expected, as ONNX's suite compares them; nothing where they agree."""
    if len(actual) != len(expected):
        return f"{len(actual)} outputs: there are {len(expected)}"
    for position, (found, wanted) in enumerate(zip(actual, expected, strict=True)):
        if not isinstance(found, np.ndarray) or (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            form = f"{found.dtype}{list(found.shape)}" if isinstance(found, np.ndarray) else str(type(found))
            return f"output {position} is {form}: it must be {wanted.dtype}{list(wanted.shape)}"
        if wanted.dtype.kind in "biuOSU" and wanted.dtype.itemsize:
            bad = np.asarray(found != wanted)
        else:
            wide = np.complex128 if wanted.dtype.kind == "c" else np.float64
            found, wanted = found.astype(wide), wanted.astype(wide)
            bad = ~np.isclose(found, wanted, rtol, atol, equal_nan=True)
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0]) if bad.ndim else ()
            return (
                f"output {position}: {int(bad.sum())} of {bad.size} elements differ, at {list(place)} "
                f"{found[place]} for {wanted[place]}"
            )
    return ""


# On the GPU


def run_case(artifact: str, model: bytes, data_sets: Sequence[Any], rtol: float, atol: float) -> str:
    """How the case's outputs differ on the GPU; the model is compiled here where there is no artifact of it."""
    from ...compiler.api import compile, load

    executable = load(artifact) if artifact else compile(model, target="cuda")
    names = [port.name for port in executable.inputs]
    for inputs, outputs in data_sets:
        results = list(executable.run(dict(zip(names, inputs, strict=True))).values())
        if message := difference(results, outputs, rtol, atol):
            return message
    return ""


# The part


def submitted(check: Check, cases: Sequence[Case], priority: int) -> Waiting:
    """The cases, which are being compiled."""
    found = []
    for number, case in enumerate(cases):
        arguments = (case.model, check.target, "f32", check.path(f"case{number}.onnxc"))
        found.append((case, check.pool.submit(prepared, *arguments, timeout=COMPILING, priority=priority)))
    return found


def check_operators(check: Check, waiting: Waiting) -> None:
    """Runs the cases one after the other, as they are compiled, and reports them by family."""
    part, deadline = check.report.part("operators"), check.budget.part("operators")
    families: dict[str, Counter[str]] = {}
    part["families"], part["failures"] = families, []
    doubtful: list[tuple[Case, str, Future[bool]]] = []
    late = []
    for number, (case, future) in enumerate(waiting):
        if number and number % TOLD == 0:
            check.say(f"  {number} of {len(waiting)} cases")
        family = families.setdefault(family_of(case.op), Counter(cases=0, agree=0, refused=0, fail=0))
        if not deadline.left:
            late.append(case.name)
            future.cancel()
            continue
        try:
            message = _outcome(check, case, future, deadline.left)
        except TimeoutError:
            late.append(case.name)
            continue
        if not message:
            family["cases"] += 1
            family["agree"] += 1
        else:
            data = (case.model, case.data_sets, case.rtol, case.atol)
            doubtful.append((case, message, check.pool.submit(cpu_passes, *data, timeout=COMPILING)))
    for case, message, passes in doubtful:
        family = families[family_of(case.op)]
        # What the CPU does not do either is none of the GPU's cases.
        if _passes(passes):
            family["cases"] += 1
            family["fail"] += 1
            part["failures"].append({"case": case.name, "family": family_of(case.op), "message": message[:400]})
        else:
            family["refused"] += 1
    if late:
        check.shortened("operators", f"{len(late)} of {len(waiting)} cases were not run: no time was left")
    part["families"] = {name: dict(counts) for name, counts in sorted(families.items())}


def _outcome(check: Check, case: Case, future: Future[Prepared], left: float) -> str:
    """What went wrong with a case on the GPU; nothing where nothing did. TimeoutError where time is over."""
    try:
        artifact = future.result(left).artifact
    except TaskError as error:
        if error.kind != "ValueNeeded":
            return str(error)
        artifact = ""  # values of its inputs decide axes: compiled when they are there
    data = (artifact, case.model, case.data_sets, case.rtol, case.atol)
    try:
        return str(check.on_gpu(run_case, *data, timeout=RUNNING))
    except TaskError as error:
        return str(error)


def _passes(future: Future[bool]) -> bool:
    try:
        return bool(future.result(COMPILING))
    except (TaskError, TimeoutError):
        return False
