"""What the tests of graph passes share: text in, CHECK lines out; and what the graph computes before and after."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import onnxruntime
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser, pattern_for_opts
from onnx.reference import ReferenceEvaluator
from onnxc.ir.dims import evaluate
from onnxc.ir.dtypes import BOOL
from onnxc.ir.export import to_onnx
from onnxc.ir.graph import Constant, Graph
from onnxc.ir.infer import Inference
from onnxc.ir.text import parse_graph, print_graph
from onnxc.ir.verify import verify_graph
from onnxc.passes.pipeline import parse_pipeline, run_pipeline

FAULTY = ("ConvTranspose", "Loop")
"""Operators that `onnx.reference` computes wrongly: it knows neither groups nor loops without a condition."""

Arrays = Mapping[str, np.ndarray]


def parsed(text: str, constants: Arrays | None = None, *, verified: bool = True) -> Graph:
    """The graph of a text; `constants` gives the arrays of its handles."""
    handles = {name: Constant(name, array) for name, array in (constants or {}).items()}
    graph = parse_graph(text, handles)
    if verified:
        verify(graph)
    return graph


def verify(graph: Graph) -> None:
    """Raises where the graph breaks a rule, or its types those of the operators."""
    inference = Inference()
    verify_graph(graph, check_types=lambda node: inference.node(node)[: len(node.outputs)])


def transformed(pipeline: str, graph: Graph, *, verified: bool = True) -> Graph:
    """The graph after the passes, which change nothing when they run once more."""
    passes = parse_pipeline(pipeline)
    once = run_pipeline(graph, passes)
    if verified:
        verify(once)
    again = run_pipeline(once, passes)
    assert print_graph(again) == print_graph(once), "the passes change what they made"
    assert again == once
    return once


def filecheck(checks: str, text: str) -> None:
    """Asserts that the `// CHECK` lines of `checks` match `text`."""
    options = Options(match_filename="checks", comment_prefixes=["COM"])
    matcher = Matcher(options, FInput("graph", text), Parser(options, io.StringIO(checks), *pattern_for_opts(options)))
    messages = matcher.stderr = io.StringIO()
    assert matcher.run() == 0, f"{messages.getvalue()}\nin\n{text}"


def check(pipeline: str, text: str, constants: Arrays | None = None, sizes: Mapping[str, int] | None = None) -> Graph:
    """Runs the passes on the graph of a text and compares with the CHECK lines in it, then what both compute.

    `sizes` gives numbers to symbolic dimensions, 3 where it does not.
    """
    before = parsed(text, constants)
    after = transformed(pipeline, before)
    filecheck(text, print_graph(after))
    agree(before, after, sizes)
    return after


def random_inputs(graph: Graph, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays for the inputs: floats around 0, small integers."""
    random = np.random.default_rng(seed)
    bindings = {symbol.name: 3 for symbol in graph.symbols()} | dict(sizes or {})
    found = {}
    for value in graph.inputs:
        shape = tuple(evaluate(extent, bindings) for extent in value.shape)
        if value.dtype == BOOL:
            found[value.name] = random.random(shape) < 0.5
        elif value.dtype.is_float:
            found[value.name] = random.normal(size=shape).astype(value.dtype.numpy)
        else:
            found[value.name] = random.integers(0, 5, shape).astype(value.dtype.numpy)
    return found


def reference(graph: Graph, inputs: Arrays) -> list[np.ndarray]:
    """The outputs of a graph by ONNX's reference, or by ONNX Runtime where that has faults."""
    if any(node.op in FAULTY for node in graph.walk()):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString(), options)
        return [np.asarray(result) for result in session.run(None, dict(inputs))]
    return [np.asarray(result) for result in ReferenceEvaluator(to_onnx(graph)).run(None, dict(inputs))]


def agree(
    before: Graph,
    after: Graph,
    sizes: Mapping[str, int] | None = None,
    tolerance: float = 1e-5,
    inputs: Arrays | None = None,
) -> None:
    """Asserts that both graphs compute the same by ONNX's reference, relative to the largest value."""
    assert [value.name for value in after.inputs] == [value.name for value in before.inputs]
    inputs = inputs or random_inputs(before, sizes)
    for expected, actual in zip(reference(before, inputs), reference(after, inputs), strict=True):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        if expected.dtype.kind == "f" and expected.size:
            scale = np.abs(expected[np.isfinite(expected)]).max(initial=1e-30)
            np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)
        else:
            np.testing.assert_array_equal(actual, expected)
