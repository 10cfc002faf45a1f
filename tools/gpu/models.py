"""Part 2: real models and architectures on a GPU, in all precisions, against ONNX Runtime on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .prepare import PRECISIONS, Prepared, prepared
from .processes import TaskError

if TYPE_CHECKING:
    from ...ir.target import Target
    from .architectures import Architecture
    from .check import Check

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
PREPARING, RUNNING = 420.0, 45.0
"""Seconds after which a model is taken to hang."""
REFERENCE_THREADS = 2


@dataclass(frozen=True)
class Subject:
    """A model to be compared: a file, or an architecture that is exported with this batch."""

    name: str
    file: str = ""
    architecture: Architecture | None = None
    batch: int = 1
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    timed: bool = False
    """Whether it is to be timed: exported in f16, its kernels' bytes and operations counted, without a reference."""

    @property
    def missing(self) -> str:
        return self.architecture.missing if self.architecture is not None else ""


@dataclass(frozen=True)
class Ready:
    """A model compiled in several precisions (or why it could not be), and its inputs with the results expected, by
    name of the case."""

    path: str
    cases: Mapping[str, tuple[Arrays, Arrays]]
    reference: str
    compiled: Mapping[str, Prepared | str]


class NotComparable(Exception):
    """A subject that cannot be had, or of which nobody tells the results."""


def subjects_of(folders: Sequence[str], architectures: Sequence[Architecture]) -> list[Subject]:
    """Those of the files in folders, the largest first, then the architectures."""
    files = [(path, str(path.relative_to(folder).with_suffix(""))) for folder in folders for path in found_in(folder)]
    files.sort(key=lambda item: (-item[0].stat().st_size, item[1]))
    return [
        *(Subject(name, file=str(path)) for path, name in files),
        *(Subject(architecture.name, architecture=architecture) for architecture in architectures),
    ]


def found_in(folder: str) -> list[Path]:
    """The ONNX models of a folder."""
    return sorted(Path(folder).rglob("*.onnx"))


# In processes that compile


def ready(subject: Subject, target: Target, stem: str) -> Ready:
    """Exports a subject where it is an architecture, runs the reference, compiles. Files begin with `stem`."""
    path = subject.file
    if subject.architecture is not None:
        from .architectures import export

        path = f"{stem}.onnx"
        try:
            given: Mapping[str, Arrays] = {"": export(subject.architecture, subject.batch, path, subject.timed)}
        except Exception as error:
            raise NotComparable(f"not exported: {error.__cause__ or error}") from error
    else:
        given = _given(path)
    cases: dict[str, tuple[Arrays, Arrays]] = {name: (inputs, {}) for name, inputs in given.items()}
    reference = ""
    if not subject.timed:
        try:
            reference, run = _reference(path)
            cases = {name: (inputs, run(inputs)) for name, inputs in given.items()}
        except Exception as error:
            raise NotComparable(f"the reference fails: {error}") from error
    compiled: dict[str, Prepared | str] = {}
    for precision in subject.precisions:
        try:
            artifact = f"{stem}.{precision}.onnxc"
            compiled[precision] = prepared(path, target, precision, artifact, subject.timed)
        except Exception as error:  # the other precisions may do
            # Values of inputs decide axes: compiled when they are there.
            late = type(error).__name__ == "ValueNeeded"
            compiled[precision] = Prepared("", (), 0.0) if late else f"{type(error).__name__}: {error}"
    return Ready(path, cases, reference, compiled)


def _given(path: str) -> dict[str, Arrays]:
    """Inputs by case: model.npz and model.CASE.npz beside model.onnx, with arrays by the inputs' names; made up where
    there are none."""
    stem = Path(path).with_suffix("")
    files = [file for file in sorted(stem.parent.glob("*.npz")) if file.name.startswith(f"{stem.name}.")]
    found: dict[str, Arrays] = {}
    for file in files:
        with np.load(file, allow_pickle=False) as archive:
            found[file.name[len(stem.name) + 1 : -4].rstrip(".")] = {name: archive[name] for name in archive.files}
    return found or {"made up": _made_up(path)}


def _made_up(path: str) -> Arrays:
    import onnx

    from ...compiler.binding import Port
    from ...ir.dtypes import BY_ONNX
    from ..arrays import made_up, sizes_for

    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    ports = []
    for value in graph.input:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
        if value.name not in weights:
            ports.append(Port(value.name, BY_ONNX[tensor.elem_type].name, shape))
    sizes, random = sizes_for(ports, {}), np.random.default_rng(0)
    return {port.name: made_up(port, sizes, "random", random) for port in ports}


def _reference(path: str) -> tuple[str, Any]:
    """The name of what tells the results expected, and a function from inputs to them."""
    try:
        import onnxruntime
    except ImportError:
        from ...compiler.api import compile

        return "onnxc on the CPU", compile(path).run
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = REFERENCE_THREADS
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return "onnxruntime", lambda inputs: dict(zip(names, session.run(None, dict(inputs)), strict=True))


# In the process that has the GPU


def compared(found: Prepared, path: str, precision: str, cases: Mapping[str, tuple[Arrays, Arrays]]) -> dict[str, Any]:
    """The largest difference of all outputs of all cases, and what is wrong, if anything is."""
    from ...compiler.api import compile, load

    executable = load(found.artifact) if found.artifact else compile(path, target="cuda", precision=precision)
    worst, message = 0.0, ""
    for case, (inputs, expected) in cases.items():
        results = executable.run(inputs)
        for name, wanted in expected.items():
            apart = relative_difference(results[name], wanted, precision == "f32")
            worst = max(worst, apart)
            if apart > PRECISIONS[precision] and not message:
                forms = dict.fromkeys(f"{array.dtype}{list(array.shape)}" for array in (results[name], wanted))
                message = f"output {name} ({' for '.join(forms)}) differs by {apart:.2g}{case and f', case {case}'}"
    return {"difference": worst if math.isfinite(worst) else None, "message": message}


def relative_difference(actual: Array, expected: Array, exact: bool = True) -> float:
    """Largest absolute difference over the largest absolute value expected; infinite where type, shape or NaN differ,
    or, if results must be `exact`, elements that are no floats."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    kind = expected.dtype.kind
    if kind in "biuOSU":
        return 0.0 if not exact or np.array_equal(actual, expected) else math.inf
    if not expected.size:
        return 0.0
    found, wanted = actual.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where(found == wanted, 0.0, np.abs(found - wanted))
    apart[np.isnan(found) & np.isnan(wanted)] = 0.0
    largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)
    worst = float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max())
    return worst / float(largest) if largest else worst


# The part


def check_models(check: Check, waiting: Mapping[Future[Ready], Subject]) -> None:
    """Compares every subject as it becomes ready, in every precision."""
    part, deadline = check.report.part("models"), check.budget.part("models")
    part["rows"], part["missing"] = [], {}
    late = dict(waiting)
    with suppress(TimeoutError):
        for future in as_completed(waiting, deadline.left):
            subject = waiting[future]
            try:
                part["rows"] += _rows(check, subject, future.result())
            except TaskError as error:
                if error.kind == NotComparable.__name__:
                    part["missing"][subject.name] = error.message[:400]
                else:
                    part["rows"].append(_row(subject, "all", {"difference": None, "message": str(error)}))
            del late[future]
            check.say(f"  {subject.name}")
    for future in late:
        future.cancel()
    if late:
        check.shortened("models", f"not compared in time: {', '.join(subject.name for subject in late.values())}")


def _rows(check: Check, subject: Subject, found: Ready) -> Iterator[dict[str, Any]]:
    for precision, compiled in found.compiled.items():
        if not check.budget.part("models").left:
            raise TimeoutError
        result: dict[str, Any] = {"difference": None, "message": compiled}
        if isinstance(compiled, Prepared):
            try:
                result = check.on_gpu(compared, compiled, found.path, precision, found.cases, timeout=RUNNING)
            except TaskError as error:
                result = {"difference": None, "message": str(error)}
        yield _row(subject, precision, result) | {"reference": found.reference}


def _row(subject: Subject, precision: str, result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": subject.name,
        "source": subject.architecture.library if subject.architecture else "file",
        "precision": precision,
        "difference": result["difference"],
        "tolerance": PRECISIONS.get(precision),
        "message": str(result["message"])[:400],
    }
