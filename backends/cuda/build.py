"""A program as code for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...ir.loops import Kernel
from ...ir.program import Program
from ...ir.target import Target
from .launch import Launch, launch_of
from .source import function_name, prelude, render_kernel

CompileKernels = Callable[[Mapping[str, str], str], Mapping[str, bytes]]
"""(texts of kernels, architecture) to their images."""


@dataclass(frozen=True)
class Built:
    """A program's kernels as CUDA C by name, how each is launched, and for each architecture the image of each: a cubin
    for "sm_90", PTX for "compute_90"."""

    program: Program
    target: Target
    texts: Mapping[str, str]
    launches: Mapping[str, Launch]
    images: Mapping[str, Mapping[str, bytes]]


def kernel_texts(kernels: Mapping[str, Kernel]) -> dict[str, str]:
    """Each kernel as CUDA C, without the prelude."""
    return {name: render_kernel(kernel) for name, kernel in kernels.items()}


def source_of(texts: Mapping[str, str]) -> str:
    """One translation unit of kernels with all they need."""
    return "\n".join([prelude(), *texts.values()])


def compile_by_nvrtc(progress: Callable[[int, int], None] | None = None) -> CompileKernels:
    """NVRTC as what makes the images."""
    from .nvrtc import compile_kernels

    def compile_all(texts: Mapping[str, str], architecture: str) -> Mapping[str, bytes]:
        return {
            name: result.image for name, result in compile_kernels(prelude(), texts, architecture, progress).items()
        }

    return compile_all


def build(
    program: Program,
    target: Target,
    compile_kernels: CompileKernels | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Built:
    """Compiles a program for every architecture of the target. Raises TargetError where there is no NVRTC."""
    texts = kernel_texts(program.kernels)
    names = [function_name(kernel) for kernel in program.kernels.values()]
    assert names == list(texts), "kernels are called as their functions"
    compile_all = compile_kernels or compile_by_nvrtc(progress)
    images = {architecture: dict(compile_all(texts, architecture)) for architecture in target.images}
    return Built(program, target, texts, {n: launch_of(kernel) for n, kernel in program.kernels.items()}, images)
