"""What users call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..ir.target import Target
from .artifact import read
from .cache import ModelCache, executable_of
from .compiled import check_runs_here
from .executable import Executable
from .options import Model, Options, resolve_target, usable_threads

if TYPE_CHECKING:
    from .specialize import SpecializingExecutable


def compile(
    model: Model,
    *,
    target: str | Target | None = None,
    dims: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
    threads: int | None = None,
    precision: str = "f32",
) -> Executable | SpecializingExecutable:
    """Compiles a model: a path, the bytes of one, or a ModelProto.

    `dims` ({"batch": 1}) and `shapes` ({"x": (1, 3, None, None)}) specialise symbolic dims; without them one compile
    serves every size. `threads` limits the threads of a call (default: all this process may use). Raises ModelError,
    UnsupportedError, ShapeError or TargetError.
    """
    options = Options(target, dims, shapes, threads, precision)
    check_runs_here(resolve_target(target))
    found = ModelCache.default().find(model, options)
    if found is not None:
        return executable_of(found, model, options)
    # Only now is the compiler itself needed: importing it takes longer than loading a model.
    from .driver import compile_model

    return compile_model(model, options)


def load(path: str | os.PathLike[str], *, threads: int | None = None, verify: bool = True) -> Executable:
    """Loads what `Executable.save` or `onnxc compile` wrote as `*.onnxc`; nothing is compiled, weights are mapped.

    An artifact is machine code: load only what you would run. `verify=False` leaves the weights' checksum unread.
    Raises ModelError for a damaged file, UnsupportedError for another version's, TargetError where this machine lacks
    what the code uses.
    """
    return Executable(read(path, verify), usable_threads(threads))


__all__ = ["Executable", "compile", "load"]
