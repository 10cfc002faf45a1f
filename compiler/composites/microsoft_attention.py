"""Attention of the domain com.microsoft: projections, masks, caches and rotary positions around one softmax.

Shapes are [batch, heads, queries, width] inside: B, N, S, H; keys are T = P + L, those of the past P and new ones L.
The meaning of masks follows ONNX Runtime's CPU kernels, as does everything that its documentation leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...ir.dims import Dim, floordiv
from ...ir.dtypes import I8, I64
from ...ir.errors import UnsupportedError
from ...ir.graph import Value
from ..expand import Expansions, Nodes

declare = Expansions()


def split_heads(n: Nodes, x: Value, heads: int) -> Value:
    """[B, S, N*H] as [B, N, S, H]."""
    batch, length, width = x.shape
    return n.transpose(n.reshape(x, batch, length, heads, floordiv(width, heads)), 0, 2, 1, 3)


def merge_heads(n: Nodes, x: Value) -> Value:
    """[B, N, S, H] as [B, S, N*H]."""
    batch, heads, length, width = x.shape
    return n.reshape(n.transpose(x, 0, 2, 1, 3), batch, length, heads * width)


def appended(n: Nodes, past: Value | None, new: Value) -> Value:
    """Keys or values [B, N, P, H] followed by new ones."""
    return new if past is None else n.concat([past, new], 2)


def sum_of(n: Nodes, *terms: Value | None) -> Value | None:
    """The sum of what is there."""
    total: Value | None = None
    for term in terms:
        total = term if total is None else total if term is None else n("Add", total, term)
    return total


def chosen(n: Nodes, condition: Value, like: Value, otherwise: float) -> Value:
    """What is added to scores: 0 where a condition holds."""
    return n("Where", condition, n.like(0, like), n.like(otherwise, like))


def padding(n: Nodes, mask: Value | None, like: Value, queries: Dim, keys: Dim, filter_value: float) -> Value | None:
    """What a mask adds to the scores [B, N, S, T].

    A mask is [B, T], [B, S, T] or [B, 1, M, M], 1 for what may be read; or it is lengths: [B] ends, or [2*B] ends and
    starts, or [3*B + 2] that begin with the ends.
    """
    if mask is None:
        return None
    batch, rank = like.shape[0], mask.tensor.rank
    if rank == 1:
        column = n.positions(keys, 1, 1, 1, keys)

        def limits(part: Value) -> Value:
            return n.cast(n.reshape(part, batch, 1, 1, 1), I64)

        double = mask.shape[0] == batch * 2
        ends = n.slice(mask, 0, 0, batch) if double or mask.shape[0] == batch * 3 + 2 else mask
        within = n("Less", column, limits(ends))
        if double:
            within = n("And", within, n("GreaterOrEqual", column, limits(n.slice(mask, 0, batch, batch * 2))))
        return chosen(n, within, like, filter_value)
    if rank == 4:
        mask = n.slice(n.slice(mask, 2, keys - queries, keys), 3, 0, keys)
    shapes = {2: (mask.shape[0], 1, 1, mask.shape[-1]), 3: (mask.shape[0], 1, *mask.shape[-2:]), 4: mask.shape}
    if rank not in shapes:
        raise UnsupportedError(f"a mask {mask.type}")
    return chosen(n, n("Greater", n.reshape(mask, *shapes[rank]), 0), like, filter_value)


def causal(n: Nodes, like: Value, queries: Dim, keys: Dim, past: Dim) -> Value:
    """What hides later keys from a query: [1, 1, S, T]."""
    row = n("Add", n.positions(queries, 1, 1, queries, 1), n.size(past))
    return chosen(n, n("LessOrEqual", n.positions(keys, 1, 1, 1, keys), row), like, -math.inf)


def attend(
    n: Nodes,
    query: Value,
    key: Value,
    value: Value,
    bias: Value | None,
    scale: float = 0.0,
    softcap: float = 0.0,
    sink: Value | None = None,
) -> tuple[Value, Value, Value]:
    """(weights @ value [B, S, N*H], the scores, the weights), keys and values shared by groups of heads.

    `bias` is added to the scores; `sink` [1, N or 1, 1, 1] is one more score, whose weight goes nowhere.
    """
    batch, heads, queries, width = query.shape
    key, value = (repeated(n, x, heads) for x in (key, value))
    scores = n("MatMul", query, n.transpose(key, 0, 1, 3, 2))
    if scale or isinstance(width, int):
        scores = n("Mul", scores, scale or 1 / math.sqrt(width))  # type: ignore[arg-type]
    else:
        scores = n("Div", scores, n("Sqrt", n.cast(n.size(width), query.dtype)))
    if softcap:
        scores = n("Mul", n("Tanh", n("Div", scores, softcap)), softcap)
    if bias is not None:
        scores = n("Add", scores, bias)
    if sink is None:
        weights = n("Softmax", scores, axis=-1)
    else:
        keys = scores.shape[-1]
        whole = n("Softmax", n.concat([scores, n.expand(sink, batch, heads, queries, 1)], 3), axis=-1)
        weights = n.slice(whole, 3, 0, keys)
    return merge_heads(n, n("MatMul", weights, value)), scores, weights


def repeated(n: Nodes, x: Value, heads: Dim) -> Value:
    """[B, G, T, H] for N = heads, each of the G heads N/G times in a row."""
    batch, groups, length, width = x.shape
    if groups == heads:
        return x
    times = floordiv(heads, groups)
    wide = n.expand(n.reshape(x, batch, groups, 1, length, width), batch, groups, times, length, width)
    return n.reshape(wide, batch, groups * times, length, width)


@declare("com.microsoft.Attention")
def attention(
    n: Nodes,
    input: Value,
    weights: Value,
    bias: Value | None = None,
    mask_index: Value | None = None,
    past: Value | None = None,
    attention_bias: Value | None = None,
    past_sequence_length: Value | None = None,
    *,
    num_heads: int,
    unidirectional: int = 0,
    qkv_hidden_sizes: Sequence[int] = (),
    mask_filter_value: float = -10000.0,
    scale: float = 0.0,
    do_rotary: int = 0,
    rotary_embedding_dim: int = 0,
    past_present_share_buffer: int = 0,
) -> tuple[Value, ...]:
    """Self attention with the projections of queries, keys and values in one matrix."""
    packed = n("MatMul", input, weights)
    packed = packed if bias is None else n("Add", packed, bias)
    return from_packed(
        n, packed, mask_index, past, attention_bias, num_heads, qkv_hidden_sizes, unidirectional, mask_filter_value,
        scale, do_rotary or past_present_share_buffer,
    )  # fmt: skip


def from_packed(
    n: Nodes,
    packed: Value,
    mask: Value | None,
    past: Value | None,
    attention_bias: Value | None,
    heads: int,
    sizes: Sequence[int],
    unidirectional: int,
    filter_value: float,
    scale: float,
    refused: int,
) -> tuple[Value, ...]:
    """Attention of projected queries, keys and values side by side [B, S, sizes]; `past` is [2, B, N, P, H]."""
    if refused:
        raise UnsupportedError("do_rotary and past_present_share_buffer of Attention have kernels for CUDA only")
    if not sizes:
        sizes = (floordiv(packed.shape[-1], 3),) * 3  # type: ignore[assignment]
    query, key, value = (split_heads(n, part, heads) for part in n.split(packed, sizes, 2))
    length = query.shape[2]
    present: Value | None = None
    before: Dim = 0
    if past is not None:
        halves = n.several("Split", (past,), 2, axis=0, num_outputs=2)
        old_key, old_value = (n.reshape(half, *past.shape[1:]) for half in halves)
        before = past.shape[3]
        key, value = appended(n, old_key, key), appended(n, old_value, value)
    if n.wanted(1):
        present = n.concat([n.reshape(x, 1, *x.shape) for x in (key, value)], 0)
    keys = key.shape[2]
    bias = sum_of(
        n,
        padding(n, mask, query, length, keys, filter_value),
        causal(n, query, length, keys, before) if unidirectional else None,
        attention_bias,
    )
    output, *_ = attend(n, query, key, value, bias, scale)
    return (output,) if present is None else (output, present)


@declare("com.microsoft.MultiHeadAttention")
def multi_head_attention(
    n: Nodes,
    query: Value,
    key: Value | None = None,
    value: Value | None = None,
    bias: Value | None = None,
    key_padding_mask: Value | None = None,
    attention_bias: Value | None = None,
    past_key: Value | None = None,
    past_value: Value | None = None,
    past_sequence_length: Value | None = None,
    cache_indirection: Value | None = None,
    *,
    num_heads: int,
    unidirectional: int = 0,
    mask_filter_value: float = -10000.0,
    scale: float = 0.0,
) -> tuple[Value | None, ...]:
    """Attention of projected queries, keys and values: apart, keys and values packed, or all three packed."""
    if past_sequence_length is not None or cache_indirection is not None:
        raise UnsupportedError("its past_sequence_length and cache_indirection (buffers shared by beams)")
    parts = separated(n, query, key, value, num_heads)
    biases: Sequence[Value | None] = (None, None, None)
    if bias is not None:
        widths = [part.shape[1] * part.shape[3] for part in parts]
        biases = n.split(bias, widths, 0)

    def biased(part: Value, addend: Value | None) -> Value:
        return part if addend is None else n("Add", part, n.reshape(addend, part.shape[1], 1, part.shape[3]))

    # Keys and values that come as heads are a cache, made before: they have their bias.
    cached = key is not None and key.tensor.rank == 4
    q, k, v = (
        part if cached and place else biased(part, b) for place, (part, b) in enumerate(zip(parts, biases, strict=True))
    )
    before: Dim = 0 if past_key is None else past_key.shape[2]
    k, v = appended(n, past_key, k), appended(n, past_value, v)
    length, keys = q.shape[2], k.shape[2]
    total = sum_of(
        n,
        padding(n, key_padding_mask, q, length, keys, mask_filter_value),
        causal(n, q, length, keys, before) if unidirectional else None,
        attention_bias,
    )
    output, scores, _ = attend(n, q, k, v, total, scale)
    return output, k, v, scores


def separated(n: Nodes, query: Value, key: Value | None, value: Value | None, heads: int) -> tuple[Value, Value, Value]:
    """Queries, keys and values as [B, N, length, H], however they come."""

    def unpacked(x: Value) -> list[Value]:
        """[B, L, N, count, H] as `count` times [B, N, L, H]."""
        batch, length, own, count, width = x.shape
        if not isinstance(count, int):
            raise UnsupportedError(f"the packed operand {x.type}")
        pieces = n.split(x, [1] * count, 3)
        return [n.transpose(n.reshape(piece, batch, length, own, width), 0, 2, 1, 3) for piece in pieces]

    if key is None:
        if query.tensor.rank == 5:
            q, k, v = unpacked(query)
            return q, k, v
        third = floordiv(query.shape[-1], 3)
        q, k, v = (split_heads(n, part, heads) for part in n.split(query, [third] * 3, 2))
        return q, k, v
    first = split_heads(n, query, heads)
    if value is None:
        k, v = unpacked(key)
        return first, k, v
    k, v = (x if x.tensor.rank == 4 else split_heads(n, x, heads) for x in (key, value))
    return first, k, v


@declare("com.microsoft.DecoderMaskedMultiHeadAttention")
def decoder_masked_attention(
    n: Nodes,
    query: Value,
    key: Value | None = None,
    value: Value | None = None,
    mask_index: Value | None = None,
    attention_bias: Value | None = None,
    past_key: Value | None = None,
    past_value: Value | None = None,
    past_sequence_length: Value | None = None,
    beam_width: Value | None = None,
    cache_indirection: Value | None = None,
    bias: Value | None = None,
    *,
    num_heads: int,
    output_qk: int = 0,
    mask_filter_value: float = -10000.0,
    scale: float = 0.0,
    past_present_share_buffer: int = 0,
) -> tuple[Value | None, ...]:
    """One step of a decoder: attention of one query; a buffer that past and present share holds more than the past."""
    beams = n.known(beam_width)
    if cache_indirection is not None and (beams is None or beams.max() > 1):
        raise UnsupportedError("caches that are shared by beams")
    if past_present_share_buffer and past_key is not None and past_value is not None:
        if past_sequence_length is None or bias is not None:
            raise UnsupportedError("a shared buffer without past_sequence_length, or with a bias")
        q, k, v = separated(n, query, key, value, num_heads)
        before = n.cast(n.reshape(past_sequence_length, 1), I64)
        total, starts = n("Add", before, n.dims(k.shape[2])), n.expand(before, q.shape[0])
        k, v = (n("onnxc.AppendToCache", past, x, starts, total) for past, x in ((past_key, k), (past_value, v)))
        keys, values = (n("Slice", x, n.dims(0), total, n.dims(2)) for x in (k, v))
        addend = sum_of(n, padding(n, mask_index, q, 1, keys.shape[2], mask_filter_value), attention_bias)
        output, scores, _ = attend(n, q, keys, values, addend, scale)
        return output, k, v, scores
    return multi_head_attention(
        n, query, key, value, bias, mask_index, attention_bias, past_key, past_value, num_heads=num_heads,
        mask_filter_value=mask_filter_value, scale=scale,
    )  # fmt: skip


@declare("com.microsoft.GroupQueryAttention")
def group_query_attention(
    n: Nodes,
    query: Value,
    key: Value | None,
    value: Value | None,
    past_key: Value | None,
    past_value: Value | None,
    seqlens_k: Value,
    total_sequence_length: Value,
    cos_cache: Value | None = None,
    sin_cache: Value | None = None,
    position_ids: Value | None = None,
    attention_bias: Value | None = None,
    head_sink: Value | None = None,
    k_scale: Value | None = None,
    v_scale: Value | None = None,
    q_norm_weight: Value | None = None,
    k_norm_weight: Value | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    local_window_size: int = -1,
    softcap: float = 0.0,
    smooth_softmax: int = 0,
    scale: float = 0.0,
    causal: int = 1,
    sliding_window_cache: int = 0,
    qk_output: int = 0,
    qk_norm_epsilon: float = 1e-6,
    kv_cache_bit_width: int = 0,
    k_quant_type: str = "NONE",
    v_quant_type: str = "NONE",
) -> tuple[Value | None, ...]:
    """Causal attention whose keys and values go into a cache, at places that differ by batch entry.

    seqlens_k [B] is the number of keys of an entry less one, the new ones included; the cache may be longer. It may
    hold integers of 8 bits, with a scale for all or (the scale's elements are [kv_num_heads, channels]) for each
    channel.
    """
    quantized = (k_quant_type, v_quant_type) != ("NONE", "NONE")
    if quantized and (kv_cache_bit_width not in (0, 8) or k_scale is None or v_scale is None):
        raise UnsupportedError("a quantized cache of keys and values, of other than 8 bits or without scales")
    if sliding_window_cache:
        raise UnsupportedError("sliding_window_cache")
    if key is None or value is None:
        width = floordiv(query.shape[-1], num_heads + 2 * kv_num_heads)
        query, key, value = n.split(query, [width * num_heads, width * kv_num_heads, width * kv_num_heads], 2)
    q, k, v = (
        split_heads(n, x, heads)
        for x, heads in ((query, num_heads), (key, kv_num_heads), (value, kv_num_heads))
    )  # fmt: skip
    if q_norm_weight is not None and k_norm_weight is not None:
        q, k = (
            n("RMSNormalization", x, weight, epsilon=qk_norm_epsilon)
            for x, weight in ((q, q_norm_weight), (k, k_norm_weight))
        )
    batch, _, length, _ = q.shape
    ends = n("Add", n.cast(seqlens_k, I64), n.constant(np.int64(1)))
    starts = n("Max", n("Sub", n.reshape(ends, batch), n.size(length)), n.constant(np.int64(0)))
    if do_rotary:
        if cos_cache is None or sin_cache is None:
            raise UnsupportedError("do_rotary without cos_cache and sin_cache")
        new = n("Add", n.reshape(starts, batch, 1), n.positions(length, 1, length))
        if position_ids is not None:
            # A prompt has positions that follow the first one; a later step says all.
            follow = n("Add", n.slice(n.reshape(position_ids, -1), 0, 0, 1), n.positions(length))
            prompt = n("Equal", n.cast(n.reshape(total_sequence_length, 1), I64), n.dims(length))
            new = n("Where", prompt, follow, n.expand(position_ids, batch, length))
        q, k = (rotated(n, x, new, cos_cache, sin_cache, rotary_interleaved) for x in (q, k))
    scales: tuple[Value | None, Value | None] = (None, None)
    if quantized and k_scale is not None and v_scale is not None:
        pairs = ((k_scale, k_quant_type), (v_scale, v_quant_type))
        scales = tuple(  # type: ignore[assignment]
            n.reshape(x, *((1,) * 4 if kind == "PER_TENSOR" else (1, kv_num_heads, 1, q.shape[-1])))
            for x, kind in pairs
        )
    k, v = (x if scale is None else in_bytes(n, x, scale) for x, scale in zip((k, v), scales, strict=True))
    present_key, present_value = k, v
    if past_key is not None and past_value is not None:
        total = n.cast(n.reshape(total_sequence_length, 1), I64)
        present_key, present_value = (
            n("onnxc.AppendToCache", past, x, starts, total) for past, x in ((past_key, k), (past_value, v))
        )
        first, axis = n.dims(0), n.dims(2)
        k, v = (n("Slice", x, first, total, axis) for x in (present_key, present_value))
    k, v = (
        x if scale is None else n("Mul", n.cast(x, scale.dtype), scale) for x, scale in zip((k, v), scales, strict=True)
    )
    seen = n("onnxc.VisibleKeys", q, k, starts, None if causal else ends, window=max(0, local_window_size))
    bias = sum_of(n, chosen(n, seen, q, -math.inf), attention_bias)
    sink = None
    if head_sink is not None:
        sink = n.reshape(head_sink, 1, num_heads, 1, 1)
    elif smooth_softmax == 1:
        sink = n.reshape(n.like(0, q), 1, 1, 1, 1)
    output, scores, weights = attend(n, q, k, v, bias, scale, softcap, sink)
    return output, present_key, present_value, {1: scores, 2: weights}.get(qk_output)


def in_bytes(n: Nodes, x: Value, scale: Value) -> Value:
    """x / scale, rounded to even, as integers of 8 bits."""
    steps = n("Round", n("Div", n.cast(x, scale.dtype), scale))
    return n.cast(n("Clip", steps, n.like(-128, scale), n.like(127, scale)), I8)


def rotated(n: Nodes, x: Value, positions: Value, cos: Value, sin: Value, interleaved: int) -> Value:
    """x [B, N, S, H] turned by the angles of positions [B, S]; channels that the caches do not cover stay."""
    half, width = cos.shape[-1], x.shape[-1]
    part = 0 if half * 2 == width else half * 2
    if not isinstance(part, int):
        raise UnsupportedError(f"cosines {cos.type} for heads of the width {width}")
    return n("RotaryEmbedding", x, cos, sin, positions, interleaved=interleaved, rotary_embedding_dim=part)


@declare("com.microsoft.RotaryEmbedding")
def rotary_embedding(
    n: Nodes,
    input: Value,
    position_ids: Value,
    cos_cache: Value,
    sin_cache: Value,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    is_packed_batching: int = 0,
    scale: float = 1.0,
) -> Value:
    """Pairs of channels turned by the angles of their positions; one position is that of the first element.

    The kernels ignore `scale`.
    """
    x = input
    batch, length = x.shape[0], x.shape[-2]
    if x.tensor.rank == 3:
        half = cos_cache.shape[1]
        width = floordiv(x.shape[2], num_heads) if rotary_embedding_dim and num_heads else half * 2
        x = n.transpose(n.reshape(x, batch, length, floordiv(x.shape[2], width), width), 0, 2, 1, 3)
    ids = position_ids
    if ids.tensor.rank == 1:
        ids = n("Add", n.reshape(ids, 1, 1), n.positions(length, 1, length))
        ids = n.expand(ids, batch, length)
    turned = rotated(n, x, ids, cos_cache, sin_cache, interleaved)
    return merge_heads(n, turned) if input.tensor.rank == 3 else turned


@declare("com.microsoft.GemmaRotaryEmbedding")
def gemma_rotary_embedding(n: Nodes, emb: Value, q: Value, q_rot: Value, k: Value, k_rot: Value) -> tuple[Value, Value]:
    """(q * cos + q_rot * sin, k * cos + k_rot * sin) of the angles `emb` [B, S, H] of states [B, N, S, H]."""
    batch, length, width = emb.shape
    cos, sin = (n.reshape(n.cast(n(op, emb), q.dtype), batch, 1, length, width) for op in ("Cos", "Sin"))
    first, second = (
        n("Add", n("Mul", x, cos), n("Mul", turned, sin)) for x, turned in ((q, q_rot), (k, k_rot))
    )  # fmt: skip
    return first, second


@declare("com.microsoft.EmbedLayerNormalization")
def embed_layer_normalization(
    n: Nodes,
    input_ids: Value,
    segment_ids: Value | None,
    word_embedding: Value,
    position_embedding: Value,
    segment_embedding: Value | None,
    gamma: Value,
    beta: Value,
    mask: Value | None = None,
    position_ids: Value | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
) -> tuple[Value | None, ...]:
    """The normalised sum of the embeddings of words, positions and segments; the number of words; that sum."""
    length = input_ids.shape[1]
    if position_ids is None:
        places = n.slice(position_embedding, 0, 0, length)
    else:
        places = n("Gather", position_embedding, position_ids, axis=0)
    total = n("Add", n("Gather", word_embedding, input_ids, axis=0), places)
    if segment_ids is not None and segment_embedding is not None:
        total = n("Add", total, n("Gather", segment_embedding, segment_ids, axis=0))
    normal = n.several("LayerNormalization", (total, gamma, beta), 1, axis=-1, epsilon=epsilon)[0]
    index: Value | None = None
    if n.wanted(1):
        if mask is None:
            zeros = np.zeros(1, np.int32)
            index = n.expand(n.constant(zeros), input_ids.shape[0])
        else:
            index = n("ReduceSum", n.cast(n("Greater", mask, 0), mask.dtype), n.dims(1), keepdims=0)
    return normal, index, total
