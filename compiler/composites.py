"""All composite operators, by name."""

from . import (
    classical,
    microsoft_attention,
    microsoft_experts,
    microsoft_fused,
    microsoft_nchwc,
    microsoft_quantized,
    ngrams,
    training,
    trees,
)
from .expand import joined

COMPOSITES = joined(
    classical.declare,
    microsoft_attention.declare,
    microsoft_experts.declare,
    microsoft_fused.declare,
    microsoft_nchwc.declare,
    microsoft_quantized.declare,
    ngrams.declare,
    training.declare,
    trees.declare,
)
