"""All composite operators, by name."""

from . import (
    microsoft_attention,
    microsoft_experts,
    microsoft_fused,
    microsoft_nchwc,
    microsoft_numeric,
    microsoft_quantized,
    microsoft_recurrent,
)
from .expand import joined

COMPOSITES = joined(
    microsoft_attention.declare,
    microsoft_quantized.declare,
    microsoft_experts.declare,
    microsoft_recurrent.declare,
    microsoft_fused.declare,
    microsoft_nchwc.declare,
    microsoft_numeric.declare,
)
