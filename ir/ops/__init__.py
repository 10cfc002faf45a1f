"""The operators: one file per family, joined here into one registry."""

from collections.abc import Mapping
from types import MappingProxyType

from . import (
    attention,
    contraction,
    control,
    elementwise,
    generators,
    indexing,
    microsoft,
    microsoft_attention,
    microsoft_quantization,
    movement,
    normalisation,
    packed_weights,
    pooling,
    quantization,
    random,
    reduction,
    resize,
    sampling,
    special,
    spectral,
    trees,
)
from .declare import Operator

_FAMILIES = (
    elementwise,
    movement,
    indexing,
    generators,
    reduction,
    contraction,
    attention,
    normalisation,
    pooling,
    resize,
    sampling,
    spectral,
    quantization,
    microsoft,
    microsoft_attention,
    microsoft_quantization,
    packed_weights,
    random,
    special,
    trees,
    control,
)

REGISTRY: Mapping[str, Operator] = MappingProxyType(
    {name: operator for family in _FAMILIES for name, operator in family.declare.operators.items()}
)
