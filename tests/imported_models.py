"""Models written as ONNX's text, and their graphs."""

from __future__ import annotations

from onnx import ModelProto, parser
from onnxc.compiler.importer import import_model
from onnxc.ir.graph import Graph
from onnxc.ir.verify import verify_graph

BRANCHES = """
    y = If(p) <then_branch = yes () => (float[2,3] out) { out = Neg(x) },
               else_branch = no () => (float[2,3] out) { h = Abs(x) out = Add(h, w) }>
"""
"""Branches that read values around them."""


def model_of(
    body: str, inputs: str = "float[2,3] x", outputs: str = "float[2,3] y", opset: int = 21, rest: str = ""
) -> ModelProto:
    """A model whose main graph has the given nodes."""
    imports = f'"" : {opset}, "local" : 1, "com.microsoft" : 1'
    return parser.parse_model(
        f"<ir_version: 10, opset_import: [{imports}]> main ({inputs}) => ({outputs}) {{ {body} }} {rest}"
    )


def imported(body: str, *arguments: str, **options: object) -> Graph:
    """The verified graph of `model_of`."""
    graph = import_model(model_of(body, *arguments, **options))  # type: ignore[arg-type]
    verify_graph(graph)
    return graph
