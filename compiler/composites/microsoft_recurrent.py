"""Linear attention and causal convolutions of the domain com.microsoft, whose state goes from call to call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ir.dims import Dim, floordiv
from ...ir.dtypes import F32
from ...ir.errors import UnsupportedError
from ...ir.graph import Attribute, Graph, Type, Value
from ..calls import Call
from ..expand import Expansions, Nodes
from .microsoft_attention import merge_heads, split_heads

declare = Expansions()


@declare("com.microsoft.CausalConvWithState")
def causal_convolution(
    n: Nodes,
    input: Value,
    weight: Value,
    bias: Value | None = None,
    past_state: Value | None = None,
    *,
    activation: str = "none",
    channels_last: int = 0,
    dilation: int = 1,
    ndim: int = 1,
    state_window: int = 0,
) -> tuple[Value, Value]:
    """Each channel of [B, C, L] convolved with the last (K - 1) * dilation positions before; those at the end are the
    state [B, C, (K - 1) * dilation] for the next call."""
    if ndim != 1 or state_window or (channels_last and input.tensor.rank != 3):
        raise UnsupportedError("more than one spatial axis, or states of several positions")
    channels, _, width = weight.shape
    if not isinstance(width, int) or not isinstance(channels, int):
        raise UnsupportedError(f"weights {weight.type}")
    kept = (width - 1) * dilation

    def turned(x: Value) -> Value:
        return n.transpose(x, 0, 2, 1) if channels_last else x

    x = turned(input)
    if past_state is None:
        past = n.expand(n.like(0, x), x.shape[0], channels, kept)
    else:
        past = turned(past_state)
    whole = n.concat([past, x], 2)
    y = n("Conv", whole, weight, bias, group=channels, dilations=(dilation,))
    if activation in ("silu", "swish"):
        y = n("Mul", y, n("Sigmoid", y))
    elif activation != "none":
        raise UnsupportedError(f"the activation {activation!r}")
    state = n.slice(whole, 2, x.shape[2], x.shape[2] + kept)
    return turned(y), turned(state)


@declare("com.microsoft.LinearAttentionGate")
def linear_attention_gate(
    n: Nodes, a: Value, dt_bias: Value, decay_scale: Value, b: Value | None = None
) -> tuple[Value, Value | None]:
    """(decay_scale * softplus(a + dt_bias), sigmoid(b)), formed in f32."""
    decay = n("Mul", n("Softplus", n("Add", n.cast(a, F32), dt_bias)), decay_scale)
    rate = None if b is None else n.cast(n("Sigmoid", n.cast(b, F32)), b.dtype)
    return n.cast(decay, a.dtype), rate


@declare("com.microsoft.LinearAttention")
def linear_attention(
    n: Nodes,
    query: Value,
    key: Value,
    value: Value,
    past_state: Value | None = None,
    decay: Value | None = None,
    beta: Value | None = None,
    *,
    q_num_heads: int,
    kv_num_heads: int,
    update_rule: str = "gated_delta",
    scale: float = 0.0,
    chunk_size: int = 0,
    state_window: int = 0,
) -> tuple[Value, Value]:
    """A state [B, N, K, V] for each head, to which each position adds the outer product of its key and value.

    Before, the state fades by exp(decay) where the rule is gated, and where it is a delta rule what the key finds in it
    is taken from the value, which then counts `beta`. The result is scale * query @ state.
    """
    if state_window:
        raise UnsupportedError("states of several positions (state_window)")
    batch, _, total = key.shape
    width = floordiv(total, kv_num_heads)
    if not isinstance(width, int):
        raise UnsupportedError(f"keys {key.type}")
    times = max(1, q_num_heads // kv_num_heads)
    gated, corrected = "gated" in update_rule, "delta" in update_rule

    def steps(x: Value, heads: int) -> Value:
        """[B, L, N*W] as [L, B, N, W] in f32."""
        rows, length, columns = x.shape
        parts = n.reshape(n.cast(x, F32), rows, length, heads, floordiv(columns, heads))
        return n.transpose(parts, 1, 0, 2, 3)

    scanned = [steps(query, q_num_heads), steps(key, kv_num_heads), steps(value, kv_num_heads)]
    for x, needed in ((decay, gated), (beta, corrected)):
        if needed and x is None:
            raise UnsupportedError(f"the rule {update_rule!r} without decay or beta")
        if needed and x is not None:
            one_for_all = x.shape[2] == 1 and kv_num_heads > 1
            scanned.append(steps(x, 1 if one_for_all else kv_num_heads))
    values = floordiv(value.shape[2], kv_num_heads)
    shape: tuple[Dim, ...] = (batch, kv_num_heads, width, values)
    state = n.expand(n.constant(np.float32(0)), *shape) if past_state is None else n.cast(past_state, F32)
    factor = scale or width**-0.5

    def step(inputs: tuple[Value, ...]) -> Sequence[Value]:
        before, q, k, v, *rest = inputs
        if gated:
            fade = n("Exp", rest.pop(0))
            before = n("Mul", before, n.reshape(fade, *fade.shape, 1))
        column = n.reshape(k, batch, kv_num_heads, width, 1)
        row = n.reshape(v, batch, kv_num_heads, 1, values)
        if corrected:
            found = n("MatMul", n.reshape(k, batch, kv_num_heads, 1, width), before)
            rate = rest.pop(0)
            row = n("Mul", n("Sub", row, found), n.reshape(rate, *rate.shape, 1))
        after = n("Add", before, n("Mul", column, row))
        if q_num_heads >= kv_num_heads:
            rows = n.reshape(q, batch, kv_num_heads, times, width)
        else:
            share = kv_num_heads // q_num_heads
            wide = n.expand(n.reshape(q, batch, q_num_heads, 1, width), batch, q_num_heads, share, width)
            rows = n.reshape(wide, batch, kv_num_heads, 1, width)
        y = n("Mul", n("MatMul", rows, after), factor)
        return after, n.reshape(y, batch, kv_num_heads * times * values)

    def body(types: Sequence[Type]) -> Graph:
        return n.build.region("step", types, step)

    attributes: dict[str, Attribute] = {"num_scan_inputs": len(scanned)}
    call = Call("Scan", (state, *scanned), attributes, ("", ""), bodies={"body": body}, origin=n.call.origin)
    last, outputs = n.build.emit(call)
    y = n.cast(n.transpose(outputs, 1, 0, 2), query.dtype)
    return y, last if past_state is None else n.cast(last, past_state.dtype)


@declare("com.microsoft.MRotaryEmbedding")
def multimodal_rotary_embedding(
    n: Nodes,
    input: Value,
    position_ids: Value,
    cos_cache: Value,
    sin_cache: Value,
    *,
    mrope_section: Sequence[int],
    mrope_layout: int = 0,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    is_packed_batching: int = 0,
    scale: float = 1.0,
) -> Value:
    """RotaryEmbedding by three positions a word [3, B, S]: each pair of channels turns by one of them."""
    half = sum(mrope_section)
    streams = np.repeat(np.arange(3), mrope_section)
    if mrope_layout:
        streams = np.zeros(half, np.int64)
        for stream in (1, 2):
            streams[stream : mrope_section[stream] * 3 : 3] = stream
    _, batch, length = position_ids.shape

    def angles(cache: Value) -> Value:
        """[B, S, half] of the positions that the channels follow."""
        parts = n.split(n("Gather", cache, position_ids, axis=0), [1, 1, 1], 0)
        found, second, third = (n.reshape(part, batch, length, half) for part in parts)
        for stream, part in ((1, second), (2, third)):
            found = n("Where", n.constant(streams == stream), part, found)
        return found

    x, rank = input, input.tensor.rank
    if rank == 3:
        if not num_heads:
            raise UnsupportedError("an input of three axes without num_heads")
        x = split_heads(n, x, num_heads)
    part = 0 if x.shape[3] == half * 2 else half * 2
    turned = n(
        "RotaryEmbedding", x, angles(cos_cache), angles(sin_cache), interleaved=interleaved, rotary_embedding_dim=part
    )  # fmt: skip
    return merge_heads(n, turned) if rank == 3 else turned
