"""Channels-last images: convolutions choose their layout together with the orders in which tensors are stored.

A convolution with the attribute layout = "channels_last" reads and makes [N, *spatial, C]; its weights and attributes
mean the same. Poolings and other operators on images follow their neighbours (`passes.storage` weighs all of it), so
that inside a network of convolutions nothing is left to transpose.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Graph
from .pipeline import Pass, register
from .transposes import reordered


@register
@dataclass(frozen=True)
class Layout(Pass):
    """Chooses layouts where that pays, transposes included."""

    name = "layout"

    def run(self, graph: Graph) -> Graph:
        return reordered(graph, choose_layouts=True)
