"""Passes and the pipeline that runs them: a text such as "canonicalize,fold,fuse{max_inputs=8}"."""

from __future__ import annotations

import ast
import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from ..ir.errors import OnnxcError
from ..ir.graph import Graph
from ..ir.verify import verify_graph


@dataclass(frozen=True)
class Pass:
    """A graph-to-graph rewrite; a frozen dataclass whose fields are its options."""

    name: ClassVar[str]

    def run(self, graph: Graph) -> Graph:
        raise NotImplementedError

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + (f"{{{', '.join(changed)}}}" if changed else "")


_PASSES: dict[str, type[Pass]] = {}
PassType = TypeVar("PassType", bound=type[Pass])


def register(kind: PassType) -> PassType:
    """Makes a pass known by its name."""
    _PASSES[kind.name] = kind
    return kind


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes that a pipeline text names; OnnxcError for an unknown name or option."""
    found: list[Pass] = []
    for match in re.finditer(r"\s*([\w-]+)\s*(?:\{([^}]*)\})?\s*(?:,|$)", text):
        name, options = match.group(1), match.group(2) or ""
        kind = _PASSES.get(name)
        if kind is None:
            raise OnnxcError(f"no pass is called {name!r}; there are {', '.join(sorted(_PASSES))}")
        values = {}
        for item in filter(None, (part.strip() for part in options.split(","))):
            key, _, value = item.partition("=")
            values[key.strip().replace("-", "_")] = ast.literal_eval(value.strip())
        try:
            found.append(kind(**values))
        except TypeError as error:
            raise OnnxcError(f"pass {name!r} has no such option: {error}") from error
    return tuple(found)


def run_pipeline(
    graph: Graph, passes: Sequence[Pass], after: Callable[[Pass, Graph, float], None] | None = None
) -> Graph:
    """The graph after all passes; the verifier runs after each, then `after(pass, graph, seconds)`."""
    for item in passes:
        start = time.perf_counter()
        graph = item.run(graph)
        seconds = time.perf_counter() - start
        verify_graph(graph)
        if after is not None:
            after(item, graph, seconds)
    return graph
