"""Quantized models in integers: what stands between DequantizeLinear and QuantizeLinear is computed without reals where
that gives the same.

Operators of quantized tensors are spelt out (`passes.quantized_operators`). DequantizeLinear and QuantizeLinear move
towards each other and cancel (`passes.quantized_moves`). Functions of one tensor of bytes are looked up
(`passes.quantized_tables`). Products become products of integers, with a remark at those that cannot
(`passes.quantized_products`), and take in the scales by which their results are quantized (`passes.quantized_scales`).
With `exact` only what gives the bits of ONNX's definition is done: products of reals stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Graph
from .cleanup import without_dead_code
from .pipeline import Pass, register
from .quantized_moves import Moves
from .quantized_operators import OPERATORS, Operators
from .quantized_products import Products
from .quantized_scales import Scales
from .quantized_tables import CONVERSIONS, Tables
from .rewriting import until_stable

SUMS = ("MatMulInteger", "ConvInteger")


@register
@dataclass(frozen=True)
class Quantization(Pass):
    """Computes with the integers that quantized tensors hold; see the module."""

    name = "quantization"
    exact: bool = False

    def run(self, graph: Graph) -> Graph:
        if not any(node.op in OPERATORS or node.op in CONVERSIONS or node.op in SUMS for node in graph.walk()):
            return graph
        graph = until_stable(self.sweep, graph)
        return graph if self.exact else without_dead_code(Scales(graph).run())

    def sweep(self, graph: Graph) -> Graph:
        """One sweep of each kind."""
        graph = without_dead_code(Moves(Operators(graph).run()).run())
        graph = without_dead_code(Tables(graph).run())
        return graph if self.exact else without_dead_code(Products(graph).run())
