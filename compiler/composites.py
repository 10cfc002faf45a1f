"""All composite operators, by name."""

from . import microsoft_attention
from .expand import joined

COMPOSITES = joined(microsoft_attention.declare)
