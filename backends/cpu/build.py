"""A program as object code for a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...ir.loops import Kernel
from ...ir.program import Program
from ...ir.target import Target
from ...passes.math import expand_kernel
from ...passes.rounding_steps import round_in_steps
from ...passes.turned_tiles import turn_tiles
from ...passes.vectorize import Vectors, vectorize
from . import bounds
from .entry import render_entry
from .llvm import render_kernel
from .objects import compile_objects


@dataclass(frozen=True)
class Built:
    """Object files of a program, the entry functions' first."""

    program: Program
    target: Target
    objects: tuple[bytes, ...]


def scheduled(kernel: Kernel, target: Target) -> Kernel:
    """A kernel in the form that is rendered: explicit lanes, mathematical functions expanded."""
    kernel = vectorize(turn_tiles(kernel, target.vector_bits), Vectors.of(target))
    return expand_kernel(round_in_steps(kernel, target.fma))


def modules(program: Program, target: Target, threaded: bool = True) -> Iterator[tuple[str, str]]:
    """(name, LLVM IR text) of the entry functions and of every kernel."""
    checked = bounds.wanted()
    if checked:
        program = bounds.with_buffer_sizes(program)
    yield "entry", render_entry(program, target, checked)
    for name, kernel in program.kernels.items():
        yield name, render_kernel(scheduled(kernel, target), target, threaded, checked)


def build(
    program: Program, target: Target, threaded: bool = True, progress: Callable[[int, int], None] | None = None
) -> Built:
    """Compiles a program; `progress(done, total)` is told how far it is: half of the way when all IR is written."""
    tell = progress or (lambda done, total: None)
    count = 1 + len(program.kernels)
    done = [0, 0]  # texts, objects

    def texts() -> Iterator[tuple[str, str]]:
        for module in modules(program, target, threaded):
            yield module
            done[0] += 1
            tell(sum(done), 2 * count)

    def compiled(objects: int, known: int) -> None:
        done[1] = objects
        tell(sum(done), 2 * count)

    objects = compile_objects(texts(), target, progress=compiled)
    tell(2 * count, 2 * count)
    return Built(program, target, tuple(objects))
