"""The texts of every stage of a compiled model: what `Executable.dump` and `onnxc dump` show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..ir.errors import OnnxcError
from ..ir.loops import Kernel
from ..ir.program import Program
from ..ir.target import Target

KERNEL_STAGES: Mapping[str, Mapping[str, str]] = {
    "cpu": {"kernels": "txt", "vectors": "txt", "llvm": "ll", "asm": "s"},
    "cuda": {"kernels": "txt", "cuda": "cu", "ptx": "ptx", "sass": "sass"},
}
"""By kind of target: stages that have a text for each kernel, and how a file of it is called. Loop nests as they were
scheduled; for CPUs the same with explicit lanes and functions as arithmetic, LLVM IR, and the assembly of the target;
for GPUs CUDA C, PTX, and the machine code of the first architecture."""
RESOURCES = "resources"
"""For GPUs: registers, shared memory, spills and occupancy of each kernel, on every architecture."""
ENTRY = "entry"
"""Stands for the code that runs the kernels in order, which the stages `llvm` and `asm` have besides the kernels."""
PRELUDE = "prelude"
"""Stands for the functions that the CUDA C of every kernel may call."""


def stages_of(target: Target) -> tuple[str, ...]:
    """The stages behind the graph."""
    return ("program", *KERNEL_STAGES[target.kind], *([RESOURCES] if target.kind == "cuda" else []))


def matching(program: Program, wanted: str | None) -> dict[str, Kernel]:
    """The kernels that a person means: of that name, else made of a node of that name, else with it in their names."""
    kernels = dict(program.kernels)
    if wanted is None:
        return kernels
    tests = (
        lambda name, kernel: name == wanted,
        lambda name, kernel: wanted in kernel.origin,
        lambda name, kernel: wanted.lower() in name.lower(),
    )
    for test in tests:
        found = {name: kernel for name, kernel in kernels.items() if test(name, kernel)}
        if found:
            return found
    raise OnnxcError(f"no kernel is called {wanted!r}, nor made of a node of that name; there are {', '.join(kernels)}")


def kernel_texts(stage: str, program: Program, target: Target, wanted: str | None = None) -> Iterator[tuple[str, str]]:
    """(kernel, text) at a stage of KERNEL_STAGES, of all kernels or of those that `matching` finds."""
    if stage == "kernels":
        for name, kernel in matching(program, wanted).items():
            yield name, str(kernel)
    elif target.kind == "cuda":
        yield from _device_texts(stage, program, target, wanted)
    else:
        yield from _host_texts(stage, program, target, wanted)


def _host_texts(stage: str, program: Program, target: Target, wanted: str | None) -> Iterator[tuple[str, str]]:
    from ..backends.cpu.build import scheduled
    from ..backends.cpu.entry import render_entry
    from ..backends.cpu.llvm import render_kernel
    from ..backends.cpu.objects import assembly

    if stage in ("llvm", "asm") and wanted in (None, ENTRY):
        text = render_entry(program, target)
        yield ENTRY, assembly(text, target) if stage == "asm" else text
    for name, kernel in matching(program, wanted).items() if wanted != ENTRY else ():
        lowered = scheduled(kernel, target)
        if stage == "vectors":
            yield name, str(lowered)
        else:
            text = render_kernel(lowered, target, True)
            yield name, assembly(text, target) if stage == "asm" else text


def _device_texts(stage: str, program: Program, target: Target, wanted: str | None) -> Iterator[tuple[str, str]]:
    from ..backends.cuda.build import kernel_texts
    from ..backends.cuda.nvrtc import compile_kernels
    from ..backends.cuda.report import sass
    from ..backends.cuda.source import prelude

    if stage == "cuda" and wanted in (None, PRELUDE):
        yield PRELUDE, prelude()
    texts = kernel_texts(matching(program, wanted)) if wanted != PRELUDE else {}
    if stage == "cuda":
        yield from texts.items()
        return
    architecture = target.cpu if stage == "sass" else target.cpu.replace("sm_", "compute_")
    for name, result in compile_kernels(prelude(), texts, architecture).items():
        yield name, sass(result.image) if stage == "sass" else result.image.decode().rstrip("\0")


def _resources(program: Program, target: Target, wanted: str | None) -> str:
    from ..backends.cuda.build import kernel_texts
    from ..backends.cuda.launch import launch_of
    from ..backends.cuda.nvrtc import compile_kernels
    from ..backends.cuda.report import rows, table
    from ..backends.cuda.source import prelude
    from ..ir.cuda_devices import DEVICES

    kernels = matching(program, wanted)
    launches = {name: launch_of(kernel) for name, kernel in kernels.items()}
    tables = []
    for architecture in target.images:
        if architecture in DEVICES:
            compiled = compile_kernels(prelude(), kernel_texts(kernels), architecture)
            used = {name: result.resources[name] for name, result in compiled.items()}
            tables.append(table(rows(used, launches, DEVICES[architecture]), DEVICES[architecture]))
    return "\n".join(tables)


def stage_text(stage: str, program: Program, target: Target, wanted: str | None = None) -> str:
    """The whole text of a stage behind the graph. Raises OnnxcError for an unknown stage or kernel."""
    if stage not in stages_of(target):
        stages = ", ".join(stages_of(target))
        raise OnnxcError(f"no stage is called {stage!r} where the target is {target}; there are graph, {stages}")
    if stage == "program":
        return str(program)
    if stage == RESOURCES:
        return _resources(program, target, wanted)
    return "\n".join(text for _, text in kernel_texts(stage, program, target, wanted))
