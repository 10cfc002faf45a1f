"""What users call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..ir.target import Target
from .artifact import read
from .cache import ModelCache
from .compiled import here
from .executable import Executable
from .interface import Interface
from .loading import executable_of, loaded
from .options import Model, Options, resolve_target

if TYPE_CHECKING:
    from .deferred import Deferred


def compile(
    model: Model,
    *,
    target: str | Target | None = None,
    dims: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
    threads: int | None = None,
    precision: str = "f32",
    max_memory: int | str | None = None,
    winograd: str = "auto",
    strassen: str = "auto",
    exact: bool = False,
    donate: bool | Sequence[str] = (),
) -> Interface | Deferred:
    """Compiles a model: a path, the bytes of one, or a ModelProto.

    `target` is the CPU of this machine, or "cuda" for its GPU.
    `dims` ({"batch": 1}) and `shapes` ({"x": (1, 3, None, None)}) specialise symbolic dims; without them one compile
    serves every size. `threads` limits the threads of a call (default: all this process may use). `precision` "f16" or
    "bf16" keeps weights and what lies between kernels in 16 bits, "tf32" forms products on a GPU of rounded operands;
    sums are f32 in all of them. `max_memory` (bytes, or "2G") limits what the model's constants may take, and what a
    run may for intermediate values and outputs; without it the limit is this machine's memory. `winograd` "auto" lets
    CPUs compute convolutions by minimal filtering where that is faster: errors are up to 6e-6 of the largest output of
    a layer, one to three times those of the definition (of 5x5 kernels six times), which "off" asks for. `strassen`
    "auto" lets CPUs form products by constant matrices of seven half as large instead of eight where that is faster,
    "two" do so twice: the packed weights become 1.75 or 3.1 times larger, errors are up to 3e-6 of a layer's largest
    output, some two times those of the definition.
    Products of dequantized tensors are products of integers, so that a result that is quantized again differs from that
    of sums in f32 now and then, by one step; `exact` keeps them products of reals, formed as the definition has it
    (`winograd` and `strassen` are then "off").
    `donate` names inputs that the model does nothing with but append to, the caches of a decoder's step (True: all such
    inputs). They are arrays with room for more along that axis; a run writes only what is new into them, and they are
    the outputs too. How much of them is filled is told by a further input, named after the symbol of that size, as an
    int, where no other input tells it.
    Raises ModelError, UnsupportedError, ShapeError, TargetError, or LimitError for a model that asks for more memory.
    """
    options = Options(
        here(resolve_target(target)),
        dims,
        shapes,
        threads,
        precision,
        max_memory=max_memory,
        winograd=winograd,
        strassen=strassen,
        exact=exact,
        donate=("*",) if donate is True else tuple(donate or ()),
    )
    found = ModelCache.default().find(model, options)
    if found is not None:
        return executable_of(found, model, options)
    # Only now is the compiler itself needed: importing it takes longer than loading a model.
    from .driver import compile_model

    return compile_model(model, options)


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    verify: bool = True,
    max_memory: int | str | None = None,
) -> Interface:
    """Loads what `Executable.save` or `onnxc compile` wrote as `*.onnxc`; nothing is compiled.

    An artifact is machine code: load only what you would run. `verify=False` maps the weights, which are read when a
    run needs them and their checksum not at all; else they are read into pages that are faster to run from.
    Raises ModelError for a damaged file, UnsupportedError for another version's, TargetError where this machine lacks
    what the code uses.
    """
    return loaded(read(path, verify), threads, max_memory, mapped=not verify)


__all__ = ["Executable", "compile", "load"]
