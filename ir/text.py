"""The graph language as text, both ways."""

from .parse import parse_graph
from .print import print_graph

__all__ = ["parse_graph", "print_graph"]
