"""The texts of every stage of a compiled model: what `Executable.dump` and `onnxc dump` show."""

from __future__ import annotations

from collections.abc import Iterator

from ..backends.cpu.build import scheduled
from ..backends.cpu.entry import render_entry
from ..backends.cpu.llvm import render_kernel
from ..backends.cpu.objects import assembly
from ..ir.errors import OnnxcError
from ..ir.loops import Kernel
from ..ir.program import Program
from ..ir.target import Target

KERNEL_STAGES = {"kernels": "txt", "vectors": "txt", "llvm": "ll", "asm": "s"}
"""Stages that have a text for each kernel, and how a file of it is called: loop nests as they were scheduled, the same
with explicit lanes and functions as arithmetic, LLVM IR, and the assembly of the target."""
ENTRY = "entry"
"""Stands for the code that runs the kernels in order, which the stages `llvm` and `asm` have besides the kernels."""


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
    if stage in ("llvm", "asm") and wanted in (None, ENTRY):
        text = render_entry(program, target)
        yield ENTRY, assembly(text, target) if stage == "asm" else text
    for name, kernel in matching(program, wanted).items() if wanted != ENTRY else ():
        if stage == "kernels":
            yield name, str(kernel)
            continue
        lowered = scheduled(kernel, target)
        if stage == "vectors":
            yield name, str(lowered)
        else:
            text = render_kernel(lowered, target, True)
            yield name, assembly(text, target) if stage == "asm" else text


def stage_text(stage: str, program: Program, target: Target, wanted: str | None = None) -> str:
    """The whole text of a stage behind the graph. Raises OnnxcError for an unknown stage or kernel."""
    if stage == "program":
        return str(program)
    if stage not in KERNEL_STAGES:
        raise OnnxcError(f"no stage is called {stage!r}; there are graph, program, {', '.join(KERNEL_STAGES)}")
    return "\n".join(text for _, text in kernel_texts(stage, program, target, wanted))
