"""Fused operators of the domain com.microsoft, and those that ONNX has under another name, as ONNX's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ir.dims import floordiv
from ...ir.dtypes import BOOL, F32, I32, I64
from ...ir.errors import UnsupportedError
from ...ir.graph import Attribute, Value
from ..expand import Expansions, Nodes
from .microsoft_quantized import by_channels

declare = Expansions()

ACTIVATIONS = {
    **dict.fromkeys(("Relu", "Tanh", "Sigmoid", "Softplus", "Softsign", "HardSwish", "Mish", "Gelu"), ()),
    **dict.fromkeys(("LeakyRelu", "Elu", "ThresholdedRelu", "Celu"), ("alpha",)),
    "HardSigmoid": ("alpha", "beta"),
    "Selu": ("alpha", "gamma"),
}
"""Activations by the attributes that their parameters are, in order."""


def activated(n: Nodes, x: Value, activation: str, parameters: Sequence[float]) -> Value:
    """An activation, by name, of a tensor."""
    if not activation:
        return x
    if activation == "Clip":
        low, high = parameters
        return n("Clip", x, low, high)
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"the activation {activation!r}")
    return n(activation, x, **dict(zip(ACTIVATIONS[activation], parameters, strict=False)))


def fused_convolution(
    n: Nodes,
    x: Value,
    w: Value,
    b: Value | None,
    z: Value | None,
    activation: str,
    parameters: Sequence[float],
    attributes: dict[str, Attribute],
) -> Value:
    """activation(Conv(x, w, b) + z)."""
    y = n("Conv", x, w, b, **attributes)
    y = y if z is None else n("Add", y, z)
    return activated(n, y, activation, parameters)


@declare("com.microsoft.FusedConv", "com.microsoft.NhwcFusedConv", "com.microsoft.NhwcConv")
def fused_conv(
    n: Nodes,
    x: Value,
    w: Value,
    b: Value | None = None,
    z: Value | None = None,
    *,
    activation: str = "",
    activation_params: Sequence[float] = (),
    **attributes: Attribute,
) -> Value:
    """activation(Conv(x, w, b) + z); the Nhwc forms have the channels of x, z and the result last."""
    last = n.call.op.startswith("com.microsoft.Nhwc")
    if last and z is not None:
        z = n.transpose(z, 0, z.tensor.rank - 1, *range(1, z.tensor.rank - 1))
    return by_channels(
        n, lambda image: fused_convolution(n, image, w, b, z, activation, activation_params, attributes), x, last
    )


@declare("com.microsoft.NhwcMaxPool")
def nhwc_max_pool(n: Nodes, x: Value, **attributes: Attribute) -> Value:
    """MaxPool of an image with the channels last."""
    return by_channels(n, lambda image: n("MaxPool", image, **attributes), x, True)


@declare("com.microsoft.FusedGemm", "com.microsoft.FusedMatMulActivation", "com.microsoft.GemmFastGelu")
def fused_product(
    n: Nodes,
    a: Value,
    b: Value,
    c: Value | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    activation_axis: int = -1,
    **attributes: Attribute,
) -> Value:
    """activation(product)."""
    op = n.call.op.rpartition(".")[2]
    if op == "GemmFastGelu":
        return n("com.microsoft.FastGelu", n("MatMul", a, b), c)
    y = n("Gemm", a, b, c, **attributes) if op == "FusedGemm" else n("com.microsoft.FusedMatMul", a, b, **attributes)
    if activation == "Softmax":
        return n("Softmax", y, axis=activation_axis)
    given = {"alpha": activation_alpha, "beta": activation_beta, "gamma": activation_gamma}
    parameters = {name: value for name, value in given.items() if value is not None}
    names = ACTIVATIONS.get(activation, ())
    if activation and activation not in ACTIVATIONS:
        raise UnsupportedError(f"the activation {activation!r}")
    return n(activation, y, **{name: parameters[name] for name in names if name in parameters}) if activation else y


@declare("com.microsoft.TransposeMatMul")
def transpose_matmul(n: Nodes, a: Value, b: Value, **attributes: Attribute) -> Value:
    return n("com.microsoft.FusedMatMul", a, b, **attributes)


# Normalisations and activations.


@declare("com.microsoft.BiasSoftmax")
def bias_softmax(n: Nodes, data: Value, bias: Value, *, is_inner_broadcast: int, axis: int = 1) -> Value:
    """Softmax of data + bias over all axes from `axis` on; the bias is spread over inner or over outer axes."""
    rank = data.tensor.rank
    axis %= rank
    if not is_inner_broadcast or bias.tensor.rank == rank:
        total = n("Add", data, bias)
    else:
        split = bias.tensor.rank - (rank - axis)
        between = (1,) * (rank - bias.tensor.rank)
        total = n("Add", data, n.reshape(bias, *bias.shape[:split], *between, *bias.shape[split:]))
    if axis == rank - 1:
        return n("Softmax", total, axis=-1)
    return n.reshape(n("Softmax", n("Flatten", total, axis=axis), axis=-1), *data.shape)


@declare("com.microsoft.BiasSplitGelu")
def bias_split_gelu(n: Nodes, x: Value, bias: Value) -> Value:
    """left * gelu(right) of the halves of x + bias along the last axis."""
    half = floordiv(x.shape[-1], 2)
    left, right = n.split(n("Add", x, bias), [half, half], x.tensor.rank - 1)
    return n("Mul", left, n("Gelu", right))


@declare("com.microsoft.BiasAdd")
def bias_add(n: Nodes, x: Value, bias: Value, skip: Value) -> Value:
    return n("Add", n("Add", x, bias), skip)


@declare("com.microsoft.BiasDropout")
def bias_dropout(
    n: Nodes,
    data: Value,
    bias: Value,
    residual: Value | None = None,
    ratio: Value | None = None,
    training_mode: Value | None = None,
    *,
    seed: int = 0,
) -> tuple[Value, Value | None]:
    """data + bias + residual, at inference."""
    training = n.known(training_mode)
    if training_mode is not None and (training is None or training.any()):
        raise UnsupportedError("training_mode")
    total = n("Add", data, bias)
    total = total if residual is None else n("Add", total, residual)
    mask = n.expand(n.constant(np.ones(1, np.bool_)), *data.shape) if n.wanted(1) else None
    return total, mask


@declare("com.microsoft.GroupNorm", "com.microsoft.SkipGroupNorm")
def group_norm(
    n: Nodes,
    x: Value,
    gamma: Value,
    beta: Value,
    skip: Value | None = None,
    bias: Value | None = None,
    *,
    groups: int,
    activation: int,
    channels_last: int = 1,
    epsilon: float = 1e-5,
) -> tuple[Value, Value]:
    """GroupNormalization of x + skip + bias [N, H, W, C], then x * sigmoid(x) where `activation` is 1; that sum."""
    total = x
    if skip is not None:
        if skip.tensor.rank == 2:
            batch, channels = skip.shape
            skip = n.reshape(skip, batch, 1, 1, channels) if channels_last else n.reshape(skip, batch, channels, 1, 1)
        total = n("Add", total, skip)
    if bias is not None:
        total = n("Add", total, bias if channels_last else n.reshape(bias, 1, bias.shape[0], 1, 1))

    def normal(image: Value) -> Value:
        wide = n.cast(image, gamma.dtype)
        y = n("GroupNormalization", wide, gamma, beta, num_groups=groups, epsilon=epsilon)
        return n.cast(n("Mul", y, n("Sigmoid", y)) if activation else y, image.dtype)

    return by_channels(n, normal, total, bool(channels_last)), total


@declare("SimplifiedLayerNormalization", "com.microsoft.SimplifiedLayerNormalization")
def simplified_layer_normalization(
    n: Nodes, x: Value, scale: Value, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Value, Value | None]:
    """RMSNormalization, and 1 / sqrt(mean of x^2 + epsilon); ONNX Runtime has it in ONNX's domain."""
    y = n("RMSNormalization", x, scale, axis=axis, epsilon=epsilon)
    axes = range(axis % x.tensor.rank, x.tensor.rank)
    return y, root_mean_square(n, x, epsilon, axes) if n.wanted(1) else None


@declare("com.microsoft.SkipSimplifiedLayerNormalization")
def skip_simplified_layer_normalization(
    n: Nodes,
    x: Value,
    skip: Value,
    gamma: Value,
    bias: Value | None = None,
    *,
    epsilon: float = 1e-5,
) -> tuple[Value | None, ...]:
    """RMSNormalization of x + skip + bias over the last axis; that sum is the fourth output."""
    total = n("Add", x, skip)
    total = total if bias is None else n("Add", total, bias)
    y = n("RMSNormalization", total, gamma, axis=-1, epsilon=epsilon)
    inverse = root_mean_square(n, total, epsilon, (-1,)) if n.wanted(2) else None
    return y, None, inverse, total


def root_mean_square(n: Nodes, x: Value, epsilon: float, axes: Sequence[int]) -> Value:
    """1 / sqrt(mean of x^2 + epsilon) over some axes, in f32."""
    wide = n.cast(x, F32)
    mean = n("ReduceMean", n("Mul", wide, wide), n.dims(*axes), keepdims=1)
    return n("Reciprocal", n("Sqrt", n("Add", mean, epsilon)))


@declare("com.microsoft.GatedRMSNorm")
def gated_rms_norm(
    n: Nodes, x: Value, scale: Value, gate: Value, *, activation: str = "silu", epsilon: float = 1e-5
) -> Value:
    """RMSNormalization of each run of channels as long as `scale`, times an activation of the gate, in f32."""
    width = scale.shape[0]
    runs = n.reshape(n.cast(x, F32), *x.shape[:-1], floordiv(x.shape[-1], width), width)
    normal = n.reshape(n("RMSNormalization", runs, n.cast(scale, F32), axis=-1, epsilon=epsilon), *x.shape)
    wide = n.cast(gate, F32)
    factor = n("Sigmoid", wide)
    if activation in ("silu", "swish"):
        factor = n("Mul", wide, factor)
    elif activation != "sigmoid":
        raise UnsupportedError(f"the activation {activation!r}")
    return n.cast(n("Mul", normal, factor), x.dtype)


@declare("com.microsoft.GatedAdd")
def gated_add(n: Nodes, x: Value, y: Value, gate: Value) -> Value:
    return n("Add", x, n("Mul", y, gate))


@declare("com.microsoft.ScaledSiLU")
def scaled_silu(n: Nodes, x: Value, scale: Value | None = None, *, alpha: float = 1.0) -> Value:
    """z * sigmoid(z) of z = scale * x."""
    factor = n.like(alpha, x) if scale is None else n.reshape(n.cast(scale, x.dtype))
    scaled = n("Mul", x, factor)
    return n("Mul", scaled, n("Sigmoid", scaled))


# What ONNX has, or nearly.


def _same(name: str, op: str, **fixed: Attribute) -> None:
    """Declares an operator that ONNX has too."""

    @declare(f"com.microsoft.{name}")
    def define(n: Nodes, *operands: Value | None, **attributes: Attribute) -> tuple[Value, ...]:
        return n.several(op, operands, len(n.call.outputs), **{**fixed, **attributes})


for _name in ("Trilu", "Range", "GatherND"):
    _same(_name, _name)


@declare("com.microsoft.ExpandDims")
def expand_dims(n: Nodes, x: Value, axis: Value) -> Value:
    return n("Unsqueeze", x, n.reshape(n.cast(axis, I64), 1))


@declare("com.microsoft.Unique")
def unique(n: Nodes, x: Value) -> tuple[Value, ...]:
    """(values in the order in which they first occur, where each element lies in them, how often each occurs)."""
    values, _, inverse, counts = n.several("Unique", (x,), 4, sorted=0)
    return values, inverse, counts


@declare("com.microsoft.Pad")
def pad(n: Nodes, x: Value, pads: Value, value: Value | None = None, *, mode: str = "constant") -> Value:
    fill = None if value is None else n.reshape(value)
    return n("Pad", x, n.reshape(pads, x.tensor.rank * 2), fill, mode=mode)


@declare("com.microsoft.GridSample")
def grid_sample(
    n: Nodes, x: Value, grid: Value, *, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: int = 0
) -> Value:
    """ONNX's operator with the names that modes had before opset 20."""
    newer = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    return n("GridSample", x, grid, mode=newer, padding_mode=padding_mode, align_corners=align_corners)


@declare("com.microsoft.ConvTransposeWithDynamicPads")
def conv_transpose(
    n: Nodes, x: Value, w: Value, pads: Value | None = None, b: Value | None = None, **attributes: Attribute
) -> Value:
    """ConvTranspose with pads as an operand, which must be a constant here."""
    known = n.known(pads)
    if pads is not None and known is None:
        raise UnsupportedError("pads that only the run tells")
    given = {} if known is None else {"pads": tuple(int(size) for size in known.reshape(-1))}
    return n("ConvTranspose", x, w, b, **{**attributes, **given})


@declare("com.microsoft.IsAllFinite")
def is_all_finite(n: Nodes, *inputs: Value, isinf_only: int = 0, isnan_only: int = 0) -> Value:
    """Whether no element of any operand is infinite or NaN."""
    tests = [op for op, skipped in (("IsNaN", isinf_only), ("IsInf", isnan_only)) if not skipped]
    total: Value | None = None
    for x in inputs:
        for op in tests:
            found = n("ReduceMax", n.cast(n(op, x), I32), keepdims=0)
            total = found if total is None else n("Max", total, found)
    return n("Not", n.cast(total, BOOL)) if total is not None else n.constant(np.array(True))


@declare("com.microsoft.ComplexMul", "com.microsoft.ComplexMulConj")
def complex_mul(n: Nodes, a: Value, b: Value) -> Value:
    """Products of complex numbers [..., 2], the second ones conjugated by ComplexMulConj."""
    parts = [n.split(x, [1, 1], x.tensor.rank - 1) for x in (a, b)]
    (re, im), (real, imaginary) = parts
    if n.call.op.endswith("Conj"):
        imaginary = n("Neg", imaginary)
    first = n("Sub", n("Mul", re, real), n("Mul", im, imaginary))
    second = n("Add", n("Mul", re, imaginary), n("Mul", im, real))
    return n.concat([first, second], first.tensor.rank - 1)


@declare("com.microsoft.Rfft")
def rfft(n: Nodes, x: Value, *, signal_ndim: int = 1, normalized: int = 0, onesided: int = 1) -> Value:
    """The one-sided spectrum [..., n/2 + 1, 2] of real signals of `signal_ndim` axes."""
    refuse_normalised(normalized, onesided)
    rank = x.tensor.rank
    y = n("DFT", n.reshape(x, *x.shape, 1), None, n.size(rank - 1), onesided=1)
    for axis in range(rank - signal_ndim, rank - 1):
        y = n("DFT", y, None, n.size(axis))
    return y


@declare("com.microsoft.Irfft")
def irfft(n: Nodes, x: Value, *, signal_ndim: int, normalized: int = 0, onesided: int = 1) -> Value:
    """The real signals [..., n] of one-sided spectra [..., n/2 + 1, 2], n even."""
    refuse_normalised(normalized, onesided)
    rank = x.tensor.rank - 1
    for axis in range(rank - signal_ndim, rank - 1):
        x = n("DFT", x, None, n.size(axis), inverse=1)
    count = x.shape[rank - 1]
    inner = n("Slice", x, n.dims(count - 2), n.dims(0), n.dims(rank - 1), n.dims(-1))
    mirrored = n("Mul", inner, n.constant(np.array([1, -1]).astype(x.dtype.numpy)))
    whole = n("DFT", n.concat([x, mirrored], rank - 1), None, n.size(rank - 1), inverse=1)
    return n.reshape(n.slice(whole, rank, 0, 1), *whole.shape[:-1])


def refuse_normalised(normalized: int, onesided: int) -> None:
    """Raises UnsupportedError for what no kernel does either."""
    if normalized or not onesided:
        raise UnsupportedError("normalized or two-sided spectra")


# Searches, which run a decoder again and again.

SEARCHES = tuple(f"com.microsoft.{name}" for name in ("BeamSearch", "WhisperBeamSearch", "GreedySearch", "Sampling"))


@declare(*SEARCHES)
def search(n: Nodes, *operands: Value | None, **attributes: Attribute) -> Value:
    """Raises UnsupportedError."""
    raise UnsupportedError(
        "it is a search that runs whole decoders; compile the decoder itself and search outside of it"
    )  # fmt: skip
