"""A program as object code for a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

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
from .objects import Compilation

ENTRY = "entry"
"""The name of the module that calls the kernels."""


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


def modules(
    program: Program, target: Target, threaded: bool = True, known: Mapping[str, Kernel] = MappingProxyType({})
) -> Iterator[tuple[str, str]]:
    """(name, LLVM IR text) of the entry functions and of every kernel that is not `known`."""
    checked = bounds.wanted()
    if checked:
        program = bounds.with_buffer_sizes(program)
    yield ENTRY, render_entry(program, target, checked)
    for name, kernel in program.kernels.items():
        if known.get(name) is not kernel:
            yield name, render_kernel(scheduled(kernel, target), target, threaded, checked)


class Building:
    """Compiles a program while it is still being lowered: LLVM works on its kernels in other processes meanwhile.

    `progress(done, total)` is told how far it is, of what is known by then; a text is half of a module's way.
    """

    def __init__(
        self, target: Target, threaded: bool = True, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.target, self.threaded, self.checked = target, threaded, bounds.wanted()
        self._tell = progress or (lambda done, total: None)
        self._texts = self._objects = 0
        self._rendered: dict[str, Kernel] = {}
        self._work = Compilation(target, progress=self._compiled)

    def __enter__(self) -> Building:
        self._work.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._work.__exit__(*error)

    def _compiled(self, objects: int, known: int) -> None:
        self._objects = objects
        self._tell(self._texts + objects, 2 * max(self._texts, known))

    def add(self, name: str, kernel: Kernel) -> None:
        """One more kernel that the program will have."""
        if not self.checked:  # else it gets sizes that only the whole program tells
            text = render_kernel(scheduled(kernel, self.target), self.target, self.threaded)
            self._rendered[name] = kernel
            self._add(name, text)

    def _add(self, name: str, text: str) -> None:
        self._work.add(name, text)
        self._texts += 1
        self._tell(self._texts + self._objects, 2 * self._texts)

    def finish(self, program: Program) -> Built:
        """The program, when all is known of it."""
        for name, text in modules(program, self.target, self.threaded, self._rendered):
            self._add(name, text)
        objects = dict(self._work.finish())
        self._tell(2 * self._texts, 2 * self._texts)
        return Built(program, self.target, tuple(objects[name] for name in (ENTRY, *program.kernels)))


def build(
    program: Program, target: Target, threaded: bool = True, progress: Callable[[int, int], None] | None = None
) -> Built:
    """Compiles a program."""
    with Building(target, threaded, progress) as building:
        return building.finish(program)
