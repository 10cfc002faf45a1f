"""All composite operators, by name; every family that declares some is listed here."""

from ..expand import joined
from . import (
    classical,
    microsoft_attention,
    microsoft_experts,
    microsoft_fused,
    microsoft_nchwc,
    microsoft_numeric,
    microsoft_quantized,
    microsoft_recurrent,
    ngrams,
    training,
    trees,
)

COMPOSITES = joined(
    classical.declare,
    microsoft_attention.declare,
    microsoft_experts.declare,
    microsoft_fused.declare,
    microsoft_nchwc.declare,
    microsoft_numeric.declare,
    microsoft_quantized.declare,
    microsoft_recurrent.declare,
    ngrams.declare,
    training.declare,
    trees.declare,
)
