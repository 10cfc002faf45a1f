"""All composite operators, by name."""

from . import classical, microsoft_attention, trees
from .expand import joined

COMPOSITES = joined(classical.declare, microsoft_attention.declare, trees.declare)
