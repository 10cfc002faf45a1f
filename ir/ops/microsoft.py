"""Operators of the domain com.microsoft that optimised models hold: fused activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..dtypes import DType
from ..errors import UnsupportedError
from ..functions import cast, erf, logistic, tanh
from ..scalars import Scalar
from ..tensors import Tensor, elementwise
from . import elementwise as pointwise
from .contraction import conv
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


_ACTIVATIONS: dict[str, Callable[..., Scalar]] = {
    "Relu": pointwise.relu,
    "Tanh": tanh,
    "Sigmoid": logistic,
    "LeakyRelu": lambda x, alpha: pointwise.leaky_relu(x, alpha=alpha),
    "HardSigmoid": lambda x, alpha, beta: pointwise.hard_sigmoid(x, alpha=alpha, beta=beta),
    "Clip": lambda x, low, high: pointwise.clip(x, x * 0 + low, x * 0 + high),
}


@declare.op("com.microsoft.FusedConv", heavy=True, products=("x", "w"))
def fused_conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    z: Tensor | None = None,
    *,
    activation: str = "",
    activation_params: Sequence[float] = (),
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    result: DType | None = None,
) -> Tensor:
    """activation(Conv(x, w, b) + z)."""
    total = conv(
        x, w, b, auto_pad=auto_pad, dilations=dilations, group=group, kernel_shape=kernel_shape, pads=pads,
        strides=strides, result=result,
    )  # fmt: skip
    total = total if z is None else total + cast(z, total.dtype)
    if not activation:
        return total
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(f"the activation {activation!r}")
    return elementwise(lambda value: _ACTIVATIONS[activation](value, *activation_params), total)
