"""How to compile, and what can be compiled. Imports little: a model that is in the cache needs no compiler."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from ..backends.cpu.runtime import available_threads
from ..ir.errors import UnsupportedError
from ..ir.target import PRECISIONS, Target

if TYPE_CHECKING:
    import onnx

    from ..ir.graph import Graph
    from ..passes.pipeline import Pass

WINOGRAD = ("off", "auto")
USUAL_THREADS = 4
"""To plan for where nobody tells how many threads another machine will use; fewer or more share the work too."""
STRASSEN = {"off": 0, "auto": 1, "two": 2}
"""Levels that matrix products may use."""
Model: TypeAlias = "str | os.PathLike[str] | bytes | onnx.ModelProto | Graph"


@dataclass(frozen=True)
class Options:
    """How to compile: the target's name, sizes that specialise, threads, precision, and the pipeline of passes (empty:
    `passes.DEFAULT_PIPELINE`).

    `shapes` may leave axes open by None; those that stay symbols of their own are taken to be `smallest` or larger.
    `winograd` "auto" allows CPUs minimal filtering, `strassen` "auto" or "two" Strassen's method (see `compile`).
    `exact` keeps operators of reals between quantized tensors (`passes.quantization`), and turns both of these off.
    `donate` names inputs that the model appends to, whose memory becomes an output's (`passes.append`; "*": all).
    `max_memory` is a limit in bytes (or "2G") for constants, and for intermediate values with outputs (None: the memory
    that this machine has).
    `progress(what, done, total)` and `after(pass, graph, seconds)` are told how compiling goes on.
    """

    target: str | Target | None = None
    dims: Mapping[str, int] | None = None
    shapes: Mapping[str, Sequence[int | None]] | None = None
    threads: int | None = None
    precision: str = "f32"
    pipeline: str = ""
    folder: str | None = None
    smallest: int = 0
    max_memory: int | str | None = None
    winograd: str = "auto"
    strassen: str = "auto"
    exact: bool = False
    donate: tuple[str, ...] = ()
    progress: Callable[[str, int, int], None] | None = field(default=None, compare=False)
    after: Callable[[Pass, Graph, float], None] | None = field(default=None, compare=False)

    @property
    def decisive(self) -> tuple[object, ...]:
        """What decides the code, as values whose text is the same in every process."""
        target = resolve_target(self.target)
        sizes = sorted((self.dims or {}).items()), sorted((self.shapes or {}).items()), self.smallest
        threads = planned_threads(target, self.threads)
        machine = (target.name, target.triple, target.cpu, target.features, target.multiprocessors, threads)
        return (*machine, *sizes, self.precision, self.pipeline, self.winograd, self.strassen, self.exact, self.donate)


def resolve_target(target: str | Target | None) -> Target:
    return target if isinstance(target, Target) else Target.parse(target or "host")


def target_of(options: Options) -> Target:
    """The target, told in which type it may form products. UnsupportedError for a precision that it does not have."""
    target = resolve_target(options.target)
    known = [name for name in PRECISIONS if target.kind == "cuda" or name != "tf32"]
    if options.precision not in known:
        raise UnsupportedError(f"{target}: there is no precision {options.precision!r}, only {', '.join(known)}")
    if options.winograd not in WINOGRAD:
        raise UnsupportedError(f"winograd is {options.winograd!r}: it can be {' or '.join(WINOGRAD)}")
    if options.strassen not in STRASSEN:
        raise UnsupportedError(f"strassen is {options.strassen!r}: it can be {', '.join(STRASSEN)}")
    products = "tf32" if options.precision == "tf32" else target.products
    threads = planned_threads(target, options.threads)
    winograd, subnormals = options.winograd == "auto" and not options.exact, options.precision != "bf16"
    levels = 0 if options.exact else STRASSEN[options.strassen]
    made = replace(target, products=products, subnormals=subnormals, threads=threads)
    return replace(made, winograd=winograd, strassen=levels)


def planned_threads(target: Target, wanted: int | None) -> int:
    """The threads that schedules divide work for: on this machine those of a call, elsewhere those wanted or some."""
    if target.name.split("+")[0] in ("cpu", "host"):
        return usable_threads(wanted)
    return wanted or (USUAL_THREADS if target.kind == "cpu" and target.threads == 1 else target.threads)


def usable_threads(wanted: int | None) -> int:
    """As many threads as are wanted, at most those that this process may use."""
    limit = available_threads()
    return max(1, min(wanted or limit, limit))
