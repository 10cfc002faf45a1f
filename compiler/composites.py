"""All composite operators, by name."""

from . import microsoft_attention, microsoft_fused, microsoft_nchwc, microsoft_quantized
from .expand import joined

COMPOSITES = joined(
    microsoft_attention.declare, microsoft_quantized.declare, microsoft_fused.declare, microsoft_nchwc.declare
)
