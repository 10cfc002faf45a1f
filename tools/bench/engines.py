"""What `onnxc bench` compares: each engine loads a model and runs it. Other engines are imported when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeAlias

Arrays: TypeAlias = Mapping[str, Any]
Run: TypeAlias = "Callable[[Arrays], Mapping[str, Any]]"
"""Outputs by name, for inputs by name; numpy arrays both."""


@dataclass(frozen=True)
class Job:
    """A model to run: its file, the symbols' sizes, the shapes of its inputs, threads, the precision ("" for that
    of the model), and further options of onnxc's `compile`."""

    path: str
    dims: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    threads: int
    precision: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and the bytes of machine code made for it where the engine tells."""

    run: Run
    code_bytes: int | None = None


def load_onnxc(job: Job) -> Loaded:
    from ... import compile as compile_model
    from ...compiler.deferred import Deferred

    executable = compile_model(
        job.path, dims=dict(job.dims), threads=job.threads, precision=job.precision or "f32", **job.options
    )
    if isinstance(executable, Deferred):  # its code comes with the first run
        return Loaded(executable.run)
    return Loaded(executable.run, sum(map(len, executable.compiled.objects)))


def load_onnxruntime(job: Job) -> Loaded:
    """The CPU provider with all its optimizations and the sizes fixed; its threads sleep between calls."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
    for name, size in job.dims.items():
        options.add_free_dimension_override_by_name(name, size)
    session = onnxruntime.InferenceSession(job.path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return Loaded(lambda inputs: dict(zip(names, session.run(None, dict(inputs)), strict=True)))


def load_openvino(job: Job) -> Loaded:
    """The CPU plugin for latency, in f32 unless another precision is asked for, with the shapes fixed."""
    import openvino

    core = openvino.Core()
    model = core.read_model(job.path)
    model.reshape({name: list(shape) for name, shape in job.shapes.items()})
    properties = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": job.precision or "f32",
    }
    request = core.compile_model(model, "CPU", properties).create_infer_request()
    names = [output.get_any_name() for output in model.outputs]

    def run(inputs: Arrays) -> Mapping[str, Any]:
        results = request.infer(dict(inputs), share_inputs=True, share_outputs=True)
        return dict(zip(names, results.to_tuple(), strict=True))

    return Loaded(run)


LOADERS: Mapping[str, Callable[[Job], Loaded]] = {
    "onnxc": load_onnxc, "onnxruntime": load_onnxruntime, "openvino": load_openvino,
}  # fmt: skip
"""Engines by the names of their packages."""


def split(engine: str) -> tuple[str, str]:
    """(name, precision) of "openvino:bf16". Raises KeyError for an engine that is not known."""
    name, _, precision = engine.partition(":")
    LOADERS[name]
    return name, precision


def version_of(engine: str) -> str:
    """The installed version of an engine. Raises importlib.metadata.PackageNotFoundError where there is none."""
    return version(split(engine)[0])
