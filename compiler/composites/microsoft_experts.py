"""Mixtures of experts of the domain com.microsoft: every expert works on every token, the router weighs the results.

A product with all experts is one batched product; what the router does not choose has the weight 0. That is more work
than the chosen experts alone, and the same result.
"""

from __future__ import annotations

from ...ir.dims import Dim, floordiv, product
from ...ir.errors import UnsupportedError
from ...ir.graph import Value
from ..expand import Expansions, Nodes
from .microsoft_quantized import unpacked_weights

declare = Expansions()


def routed(n: Nodes, scores: Value, weights: Value | None, count: int, normalize: int) -> Value:
    """What each expert's result counts, [experts, tokens, 1]: softmax of the `count` best scores [tokens, experts].

    `weights`, where given, stand for what the scores of those count. Where `normalize` is 0 the scores that were not
    chosen count in the softmax too.
    """
    tokens, experts = scores.shape
    _, chosen = n.several("TopK", (scores, n.dims(count)), 2, axis=-1)
    zeros = n.expand(n.like(0, scores), tokens, experts)
    ones = n.expand(n.like(1, scores), tokens, count)
    mask = n("ScatterElements", zeros, chosen, ones, axis=1)
    share = n("Mul", weights if weights is not None else n("Softmax", scores, axis=-1), mask)
    if normalize:
        share = n("Div", share, n("ReduceSum", share, n.dims(1), keepdims=1))
    return n.reshape(n.transpose(share, 1, 0), experts, tokens, 1)


def activated(
    n: Nodes, x: Value, kind: str, fusion: int, alpha: float, beta: float, limit: float | None, other: Value | None
) -> Value:
    """An expert's activation of x [experts, tokens, width]; swiglu is g * sigmoid(alpha * g) * (l + beta) of two halves
    in turns (`fusion` 1) or side by side (2), or of x and `other` (0)."""
    if kind != "swiglu":
        if kind == "silu":
            y = n("Mul", x, n("Sigmoid", x))
        elif kind == "relu":
            y = n("Relu", x)
        elif kind == "gelu":
            y = n("Gelu", x, approximate="tanh")
        elif kind == "identity":
            y = x
        else:
            raise UnsupportedError(f"the activation {kind!r}")
        return y if other is None else n("Mul", y, other)
    gate, linear = x, other
    if linear is None:
        experts, tokens, width = x.shape
        half = floordiv(width, 2)
        shape: tuple[Dim, ...] = (experts, tokens, half, 2) if fusion == 1 else (experts, tokens, 2, half)
        axis = 3 if fusion == 1 else 2
        halves = n.split(n.reshape(x, *shape), [1, 1], axis)
        gate, linear = (n.reshape(part, experts, tokens, half) for part in halves)
    if limit is not None:
        gate, linear = n("Min", gate, limit), n("Clip", linear, -limit, limit)
    gate = n("Mul", gate, n("Sigmoid", n("Mul", gate, alpha)))
    return n("Mul", gate, n("Add", linear, beta))


def mixture(
    n: Nodes,
    x: Value,
    share: Value,
    layers: tuple[tuple[Value, Value | None] | None, ...],
    activation_type: str,
    swiglu_fusion: int,
    alpha: float,
    beta: float,
    limit: float | None,
) -> Value:
    """The sum over experts of share * fc2(activation(fc1(x), fc3(x))); a layer is its weights [experts, out, in] and
    its bias [experts, out]."""
    width = x.shape[-1]
    tokens = n.reshape(x, 1, product(x.shape[:-1]), width)

    def layer(values: Value, parameters: tuple[Value, Value | None]) -> Value:
        weights, bias = parameters
        y = n("com.microsoft.FusedMatMul", values, weights, transB=1)
        return y if bias is None else n("Add", y, n.reshape(bias, bias.shape[0], 1, bias.shape[1]))

    first, second, third = layers
    assert first is not None and second is not None
    other = None if third is None else layer(tokens, third)
    inner = activated(n, layer(tokens, first), activation_type, swiglu_fusion, alpha, beta, limit, other)
    total = n("ReduceSum", n("Mul", layer(inner, second), share), n.dims(0), keepdims=0)
    return n.reshape(total, *x.shape)


@declare("com.microsoft.MoE")
def mixture_of_experts(
    n: Nodes,
    input: Value,
    router_probs: Value,
    fc1: Value,
    fc1_bias: Value | None,
    fc2: Value,
    fc2_bias: Value | None = None,
    fc3: Value | None = None,
    fc3_bias: Value | None = None,
    *,
    k: int = 1,
    activation_type: str = "relu",
    normalize_routing_weights: int = 0,
    use_sparse_mixer: int = 0,
    swiglu_fusion: int = 0,
    swiglu_limit: float | None = None,
    activation_alpha: float = 1.0,
    activation_beta: float = 0.0,
) -> Value:
    """The results of the `k` best of a number of two-layer networks, weighed by the router."""
    if use_sparse_mixer:
        raise UnsupportedError("use_sparse_mixer")
    share = routed(n, router_probs, None, k, normalize_routing_weights)
    layers = ((fc1, fc1_bias), (fc2, fc2_bias), None if fc3 is None else (fc3, fc3_bias))
    return mixture(
        n, input, share, layers, activation_type, swiglu_fusion, activation_alpha, activation_beta, swiglu_limit
    )  # fmt: skip


@declare("com.microsoft.QMoE")
def quantized_mixture(
    n: Nodes,
    input: Value,
    router_probs: Value,
    fc1: Value,
    fc1_scales: Value,
    fc1_bias: Value | None,
    fc2: Value,
    fc2_scales: Value,
    fc2_bias: Value | None = None,
    fc3: Value | None = None,
    fc3_scales: Value | None = None,
    fc3_bias: Value | None = None,
    fc1_zero: Value | None = None,
    fc2_zero: Value | None = None,
    fc3_zero: Value | None = None,
    router_weights: Value | None = None,
    *,
    k: int = 1,
    expert_weight_bits: int = 4,
    fc1_expert_weight_bits: int = 0,
    fc2_expert_weight_bits: int = 0,
    fc3_expert_weight_bits: int = 0,
    block_size: int = 0,
    quant_type: str = "int",
    activation_type: str = "relu",
    normalize_routing_weights: int = 0,
    use_sparse_mixer: int = 0,
    swiglu_fusion: int = 0,
    swiglu_limit: float | None = None,
    activation_alpha: float = 1.0,
    activation_beta: float = 0.0,
    accuracy_level: int = 0,
    weights_prepacked: int = -1,
) -> Value:
    """MoE with weights of a few bits, a scale for each row or for each block of a row."""
    if use_sparse_mixer or quant_type != "int" or weights_prepacked == 1:
        raise UnsupportedError("use_sparse_mixer, floats of 4 or 8 bits, or weights packed for a certain machine")

    def weights(packed: Value | None, scales: Value | None, zero: Value | None, own: int) -> Value | None:
        if packed is None or scales is None:
            return None
        bits = own or expert_weight_bits
        width = packed.shape[2] * (8 // bits)
        whole = scales.tensor.rank == 2
        if not isinstance(width, int):
            raise UnsupportedError(f"weights {packed.type}")
        if whole and zero is not None:
            if bits != 8:
                raise UnsupportedError("zero points of rows of fewer than 8 bits")
            zero = n.reshape(zero, *scales.shape, 1)
        blocks = n.reshape(scales, *scales.shape, 1) if whole else scales
        wide = unpacked_weights(n, packed, blocks, zero, bits, width if whole else block_size)
        return n.cast(wide, input.dtype)

    first = weights(fc1, fc1_scales, fc1_zero, fc1_expert_weight_bits)
    second = weights(fc2, fc2_scales, fc2_zero, fc2_expert_weight_bits)
    third = weights(fc3, fc3_scales, fc3_zero, fc3_expert_weight_bits)
    assert first is not None and second is not None
    # The kernels take the softmax of the chosen scores alone.
    normalize = normalize_routing_weights or router_weights is None
    share = routed(n, router_probs, router_weights, k, int(normalize))
    layers = ((first, fc1_bias), (second, fc2_bias), None if third is None else (third, fc3_bias))
    return mixture(
        n, input, share, layers, activation_type, swiglu_fusion, activation_alpha, activation_beta, swiglu_limit
    )  # fmt: skip
