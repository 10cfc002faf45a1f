"""Models compiled for a GPU, in processes that need none: their artifacts are loaded by the one that has it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .counts import Work

if TYPE_CHECKING:
    from ...ir.target import Target

PRECISIONS = {"f32": 1e-4, "tf32": 2e-3, "f16": 2e-2, "bf16": 2e-2}
"""Precisions, and how far results may be from the reference's, as a part of its largest value."""


@dataclass(frozen=True)
class Prepared:
    """A compiled model: its artifact, the calls of kernels (empty where they are not counted), the seconds it took."""

    artifact: str
    work: tuple[Work, ...]
    seconds: float


def prepared(model: str | bytes, target: Target, precision: str, artifact: str, counted: bool = False) -> Prepared:
    """Compiles a model, a path or its bytes. `counted` takes a model of fixed sizes."""
    import time

    from ...compiler.artifact import save
    from ...compiler.driver import compiled_model
    from ...compiler.options import Options
    from ...ir.graph import Graph
    from .counts import work_of

    start = time.perf_counter()
    graphs: list[Graph] = []

    def after(item: object, graph: Graph, seconds: float) -> None:
        graphs[:] = [graph]

    compiled = compiled_model(model, Options(target=target, precision=precision, after=after))
    assert compiled.program is not None
    work = tuple(work_of(compiled.program(), graphs[0])) if counted else ()
    save(compiled, Path(artifact))
    return Prepared(artifact, work, time.perf_counter() - start)
