"""Graphs that come as text: printed by a dump, edited by a person, compiled again."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..ir.dims import Dim
from ..ir.errors import ModelError, ShapeError, VerifierError
from ..ir.graph import Constant, Graph
from ..ir.infer import Inference
from ..ir.text import parse_graph
from ..ir.verify import verify_graph
from ..passes.pipeline import parse_pipeline, run_pipeline
from ..passes.rewriting import substitute_graph
from .binding import bind_symbols
from .importer import import_model

_AFTER = re.compile(r"^// after: *(.*)$", re.MULTILINE)
_HANDLE = re.compile(r"expected one of the constants that were given, found `(.*)`")


def after_line(passes: Sequence[object]) -> str:
    """The comment that tells a reader, and `read_graph`, which passes a printed graph has seen."""
    return f"// after: {','.join(map(str, passes))}\n"


def read_graph(path: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None) -> Graph:
    """The graph of a text file, checked; `weights` is the ONNX model that holds its large constants.

    A first line `// after: PASSES` says which passes made the constants that the text names. Raises ModelError with the
    file, the line and what is wrong there.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{os.fspath(path)}: cannot be read as text ({error})") from error
    try:
        graph = parse_graph(text, {} if weights is None else _constants(text, weights))
        inference = Inference(probing=True)
        verify_graph(graph, check_types=lambda node: inference.node(node)[: len(node.outputs)])
    except (ModelError, VerifierError) as error:
        missing = _HANDLE.search(str(error))
        if missing and weights is None:
            advice = "its array is in the ONNX model that was dumped: give that with --weights MODEL.onnx"
            raise ModelError(f"{os.fspath(path)}: the text names the constant {missing[1]}; {advice}") from error
        raise ModelError(f"{os.fspath(path)}: {error}") from error
    return graph


def _constants(text: str, weights: str | os.PathLike[str]) -> Mapping[str, Constant]:
    """The handles of the model, at the point of the pipeline that the text was printed at."""
    graph = import_model(weights)
    after = _AFTER.search(text)
    return (run_pipeline(graph, parse_pipeline(after[1])) if after else graph).constants


def specialised(graph: Graph, dims: Mapping[str, int], shapes: Mapping[str, Sequence[int | None]]) -> Graph:
    """The graph with symbols of its inputs as numbers; None in a shape leaves an axis as it is.

    Raises ShapeError for names that it does not have.
    """
    known = {symbol.name for symbol in graph.symbols()}
    if not set(dims) <= known:
        raise ShapeError(
            f"{', '.join(sorted(set(dims) - known))}: no such symbol; there are {', '.join(sorted(known))}"
        )
    inputs = {value.name: value for value in graph.inputs}
    if not set(shapes) <= set(inputs):
        raise ShapeError(
            f"{', '.join(sorted(set(shapes) - set(inputs)))}: no such input; there are {', '.join(inputs)}"
        )
    values: dict[str, Dim] = {**dims, **bind_symbols([inputs[name] for name in shapes], list(shapes.values()))}
    return substitute_graph(graph, values) if values else graph
