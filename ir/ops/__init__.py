"""The operators: one file per family, joined here into one registry."""

from collections.abc import Mapping
from types import MappingProxyType

from . import contraction, elementwise, movement, normalisation, pooling, reduction
from .declare import Operator

_FAMILIES = (elementwise, movement, reduction, contraction, normalisation, pooling)

REGISTRY: Mapping[str, Operator] = MappingProxyType(
    {name: operator for family in _FAMILIES for name, operator in family.declare.operators.items()}
)
