"""Rewriting every graph of a model, those inside If, Loop and Scan included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from onnx import NodeProto

from .graph import GraphDraft
from .model import Draft


@dataclass
class Scope:
    """One graph that is being rewritten, and names of what was made for its values.

    What is made of a constant is a constant of the graph that reads it: engines look for weights there.
    """

    graph: GraphDraft
    made: dict[tuple[str, ...], list[str]] = field(default_factory=dict)


Rewrite = Callable[[NodeProto, Scope], "list[NodeProto] | None"]
"""The nodes in place of one, None where it stays."""


def rewrite_graphs(draft: Draft, rewrite: Rewrite) -> None:
    """Rewrites the nodes of all graphs of a model."""
    if not draft.inner:
        draft.open_inner()
    for graph in draft.graphs():
        scope, nodes = Scope(graph), list[NodeProto]()
        for node in graph.graph.node:
            found = rewrite(node, scope)
            nodes += [node] if found is None else found
        graph.replace_nodes(nodes)
    draft.attach()


__all__ = ["Scope", "rewrite_graphs"]
