"""All composite operators, by name."""

from . import microsoft_attention, trees
from .expand import joined

COMPOSITES = joined(microsoft_attention.declare, trees.declare)
