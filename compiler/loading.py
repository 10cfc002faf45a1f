"""From a compiled model to one that can be called in this process, whatever it is compiled for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..ir.program import Program
from .compiled import Compiled
from .deferred import Deferred
from .executable import Executable
from .interface import Interface
from .limits import check_constants, limit_of
from .options import Model, Options, target_of, usable_threads
from .stretching import Variants


def loaded(
    compiled: Compiled, threads: int | None, max_memory: int | str | None = None, mapped: bool = False
) -> Interface:
    """The model ready to run; `mapped` constants stay in the file that they are mapped from. TargetError where this
    machine lacks what its code uses, LimitError where the constants take more than `max_memory`."""
    check_constants({name: array.nbytes for name, array in compiled.constants.items()}, limit_of(max_memory))
    if compiled.target.kind == "cuda":
        from .cuda_executable import CudaExecutable

        return CudaExecutable(compiled, None if max_memory is None else limit_of(max_memory))
    return Executable(compiled, usable_threads(threads), limit_of(max_memory), mapped)


def executable_of(compiled: Compiled, model: Model, options: Options) -> Interface:
    """The model ready to run; of one that came from the cache, the program is made again when a dump needs it."""
    if compiled.program is None:

        def program() -> Program:
            from .driver import graph_of, program_of

            return program_of(graph_of(model, options), target_of(options))

        compiled = replace(compiled, program=program)
    found = loaded(compiled, options.threads, options.max_memory)
    if compiled.assumptions:

        def compile_for(shapes: Mapping[str, Sequence[int | None]]) -> Interface | Deferred:
            from .driver import compile_model

            return compile_model(model, replace(options, shapes={**(options.shapes or {}), **shapes}))

        found.variants = Variants(compiled.inputs, compile_for)
    return found
