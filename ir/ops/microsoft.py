"""Operators of the domain com.microsoft that optimised models hold: fused activations."""

from __future__ import annotations

import math

from ..functions import erf, logistic, tanh
from ..scalars import Scalar
from .declare import Registry

declare = Registry()


@declare.pointwise("com.microsoft.Gelu")
def gelu(x: Scalar) -> Scalar:
    return x * 0.5 * (erf(x * math.sqrt(0.5)) + 1)


@declare.pointwise("com.microsoft.BiasGelu")
def bias_gelu(x: Scalar, bias: Scalar) -> Scalar:
    return gelu(x + bias)


@declare.pointwise("com.microsoft.FastGelu")
def fast_gelu(x: Scalar, bias: Scalar | None = None) -> Scalar:
    x = x if bias is None else x + bias
    return x * 0.5 * (tanh((x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)) + 1)


@declare.pointwise("com.microsoft.QuickGelu")
def quick_gelu(x: Scalar, *, alpha: float = 1.702) -> Scalar:
    return x * logistic(x * alpha)
