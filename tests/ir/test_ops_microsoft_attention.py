"""Attention of com.microsoft against ONNX Runtime's CPU kernels, and by formula where there is none.

B, S, N, H: batch, queries, heads, channels a head; L: keys of cross attention; P: keys of the past.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxc
import pytest
from against_kernel import assert_as_onnxruntime, assert_close, by_onnxruntime, operator_model
from onnxc.compiler.driver import imported
from onnxc.compiler.options import Options
from onnxc.passes import PIPELINES
from onnxc.passes.pipeline import parse_pipeline, run_pipeline
from single_node import Array

B, S, L, P, N, H = 2, 3, 5, 7, 4, 6
D = N * H
SYMBOLS = {B: "batch", S: "queries", L: "keys"}

Case = tuple[str, dict[str, Array | None], dict[str, Any], tuple[str, ...]]


def normal(seed: int) -> Callable[..., Array]:
    source = np.random.default_rng(seed)
    return lambda *shape: source.standard_normal(shape).astype(np.float32)


def integers(*rows: Any) -> Array:
    return np.array(rows if len(rows) > 1 else rows[0], np.int32)


def attention_cases() -> dict[str, Case]:
    f = normal(1)
    plain: dict[str, Array | None] = {"input": f(B, S, 10), "weights": f(10, 3 * D), "bias": f(3 * D)}
    bits = np.random.default_rng(2).integers(0, 2, (B, S, S + P)).astype(np.int32)
    masks = {"ends": integers([2, 3]), "keys": bits[:, 0, :S], "each": bits[:, :, :S], "none": bits[:, 0, :S] * 0}
    found: dict[str, Case] = {
        "attention": ("Attention", plain, {}, ("y",)),
        "attention causal": ("Attention", plain, {"unidirectional": 1, "scale": 0.3}, ("y", "present")),
        "attention other values": (
            "Attention", {**plain, "weights": f(10, 2 * D + 8), "bias": f(2 * D + 8)},
            {"qkv_hidden_sizes": [D, D, 8]}, ("y",),
        ),
        "attention past": (
            "Attention", {**plain, "mask": None, "past": f(2, B, N, P, H)}, {"unidirectional": 1}, ("y", "present"),
        ),
        "attention past mask": (
            "Attention", {**plain, "mask": bits[:, 0], "past": f(2, B, N, P, H)},
            {"mask_filter_value": -3.4e38}, ("y", "present"),
        ),
        "attention bias": ("Attention", {**plain, "mask": None, "past": None, "added": f(B, N, S, S)}, {}, ("y",)),
    }  # fmt: skip
    for name, mask in masks.items():
        for one_way in (0, 1):
            attributes = {"unidirectional": one_way, "mask_filter_value": -2.5}
            found[f"attention {name} {one_way}"] = ("Attention", {**plain, "mask": mask}, attributes, ("y",))
    return found


def multi_head_cases() -> dict[str, Case]:
    f, op = normal(3), "MultiHeadAttention"
    bits = np.random.default_rng(4).integers(0, 2, (B, S, S + P)).astype(np.int32)
    plain: dict[str, Array | None] = {"q": f(B, S, D), "k": f(B, L, D), "v": f(B, L, 8)}
    self_attention = {"q": f(B, S, D), "k": f(B, S, D), "v": f(B, S, D), "bias": f(3 * D)}
    past = {"past_key": f(B, N, P, H), "past_value": f(B, N, P, H)}
    cache = {"q": f(B, S, D), "k": f(B, N, L, H), "v": f(B, N, L, H)}
    kept = ("y", "key", "value")
    return {
        "multi-head": (op, plain, {}, ("y",)),
        "multi-head present": (op, {**plain, "bias": f(2 * D + 8)}, {"scale": 0.2}, kept),
        "multi-head ends": (op, {**plain, "bias": None, "mask": integers([2, 4])}, {}, ("y",)),
        "multi-head keys": (op, {**plain, "bias": None, "mask": bits[:, 0, :L]}, {}, ("y",)),
        "multi-head each": (op, {**plain, "bias": None, "mask": bits[:, :, :L]}, {"mask_filter_value": -2.0}, ("y",)),
        "multi-head added": (op, {**plain, "bias": None, "mask": None, "added": f(B, N, S, L)}, {}, ("y",)),
        "multi-head causal": (op, self_attention, {"unidirectional": 1}, ("y",)),
        "multi-head past": (op, {**self_attention, "mask": None, "added": None, **past}, {"unidirectional": 1}, kept),
        "multi-head past mask": (
            op, {**self_attention, "mask": bits[:, 0], "added": f(B, N, S, S + P), **past}, {}, kept,
        ),
        "multi-head cache": (op, cache, {}, ("y",)),
        "multi-head cache bias": (op, {**cache, "bias": f(3 * D)}, {}, ("y",)),
    }  # fmt: skip


def decoder_cases() -> dict[str, Case]:
    f, op = normal(5), "DecoderMaskedMultiHeadAttention"
    step = {"q": f(B, 1, D), "k": f(B, 1, D), "v": f(B, 1, D), "mask": None, "added": None}
    buffers = {"past_key": f(B, N, P, H), "past_value": f(B, N, P, H), "length": integers([3])}
    shared, kept = {"past_present_share_buffer": 1}, ("y", "key", "value")
    return {
        "decoder cache": (op, {"q": f(B, 1, D), "k": f(B, N, L, H), "v": f(B, N, L, H)}, {}, ("y",)),
        "decoder step": (op, {**step, **buffers}, shared, kept),
        "decoder mask": (op, {**step, "mask": integers([0, 1, 1, 1], [1, 1, 1, 1]), **buffers}, shared, kept),
    }


TABLE = {**attention_cases(), **multi_head_cases(), **decoder_cases()}


@pytest.mark.parametrize("name", TABLE)
def test_heads(name: str) -> None:
    op, operands, attributes, outputs = TABLE[name]
    assert_as_onnxruntime(op, operands, {"num_heads": N, **attributes}, outputs, symbols=SYMBOLS)


def grouped(
    queries: int = 1, past: int | None = None, *, batch: int = B, packed: bool = False, lengths: Any = None,
    total: int = 0, rotary: bool = True, dtype: Any = np.float32, **others: Array,
) -> dict[str, Array | None]:  # fmt: skip
    """Operands of GroupQueryAttention: 4 heads that share 2 of keys and values, 16 channels wide."""
    f, width = normal(6), 16
    total = total or queries + (past or 0)
    ends = np.array(lengths or [total - 1] * batch, np.int32)
    operands: dict[str, Array | None] = {
        "q": f(batch, queries, (8 if packed else 4) * width),
        "k": None if packed else f(batch, queries, 2 * width),
        "v": None if packed else f(batch, queries, 2 * width),
        "past_key": None if past is None else f(batch, 2, past, width),
        "past_value": None if past is None else f(batch, 2, past, width),
    }
    for cache in (operands["past_key"], operands["past_value"]):
        for entry, end in enumerate(ends):
            if cache is not None:
                cache[entry, :, max(0, end + 1 - queries) :] = 0  # ONNX Runtime clears what is not used
    angles = f(16, width // 2)
    operands |= {"ends": ends, "total": np.array(total, np.int32)}
    operands |= {"cos": np.cos(angles), "sin": np.sin(angles)} if rotary else {"cos": None, "sin": None}
    operands |= {"positions": None, "added": None, "sink": None, **others}
    return {
        name: array if array is None or array.dtype != np.float32 else array.astype(dtype)
        for name, array in operands.items()
    }


POSITIONS = np.array([[2, 3, 4], [2, 3, 4]], np.int64)
GROUPED: dict[str, tuple[dict[str, Array | None], dict[str, Any]]] = {
    "prompt": (grouped(3, rotary=False), {}),
    "prompt packed": (grouped(3, packed=True), {"do_rotary": 1, "rotary_interleaved": 1}),
    "prompt rotary": (grouped(3), {"do_rotary": 1}),
    "prompt empty past": (grouped(3, 0), {"do_rotary": 1}),
    "prompt window": (grouped(3, rotary=False), {"local_window_size": 2}),
    "prompt positions": (grouped(3, positions=POSITIONS), {"do_rotary": 1}),
    "prompt both ways": (grouped(3, rotary=False), {"causal": 0}),
    "prompt buffer": (grouped(3, 10, total=3), {"do_rotary": 1}),
    "step": (grouped(1, 5), {"do_rotary": 1, "scale": 0.4}),
    "step window": (grouped(1, 5), {"do_rotary": 1, "local_window_size": 3}),
    "step positions": (grouped(1, 5, positions=np.array([[4], [3]], np.int64)), {"do_rotary": 1}),
    "step buffer": (grouped(1, 10, total=6), {"do_rotary": 1}),
    "step ragged": (grouped(1, 10, total=6, lengths=[5, 3]), {"do_rotary": 1}),
    "steps": (grouped(3, 5, batch=1), {"do_rotary": 1}),
    "softcap": (grouped(3, rotary=False), {"softcap": 1.5}),
    "smooth": (grouped(3, rotary=False), {"smooth_softmax": 1}),
    "sink": (grouped(3, rotary=False, sink=normal(7)(4)), {}),
    "added": (grouped(3, rotary=False, added=normal(8)(B, 4, 3, 3)), {}),
    "f16": (grouped(1, 5, dtype=np.float16), {"do_rotary": 1}),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_heads(name: str) -> None:
    operands, attributes = GROUPED[name]
    attributes = {"num_heads": 4, "kv_num_heads": 2, **attributes}
    tolerance = 2e-3 if name == "f16" else 2e-6
    symbols = {B: "batch", 3: "queries", 5: "past"}
    assert_as_onnxruntime(
        "GroupQueryAttention", operands, attributes, ("y", "key", "value"), tolerance=tolerance, symbols=symbols
    )


def rotary_cases() -> dict[str, tuple[dict[str, Array | None], dict[str, Any]]]:
    f = normal(9)
    angles, ids = f(16, 4), np.array([[0, 4, 2], [1, 3, 5]], np.int64)
    rest: dict[str, Array | None] = {"ids": ids, "cos": np.cos(angles), "sin": np.sin(angles)}
    return {
        "rows": ({"x": f(B, S, 32), **rest}, {}),
        "interleaved": ({"x": f(B, S, 32), **rest}, {"interleaved": 1, "scale": 0.5}),
        "first": ({"x": f(B, S, 32), **rest, "ids": np.array([4])}, {}),
        "heads": ({"x": f(B, N, S, 8), **rest}, {}),
        "part": ({"x": f(B, S, 48), **rest}, {"rotary_embedding_dim": 8, "num_heads": 4}),
    }


@pytest.mark.parametrize("name", rotary_cases())
def test_rotary(name: str) -> None:
    operands, attributes = rotary_cases()[name]
    assert_as_onnxruntime("RotaryEmbedding", operands, attributes, symbols={B: "batch", S: "queries"})


def embedding_cases() -> dict[str, dict[str, Array | None]]:
    f = normal(10)
    ids = np.random.default_rng(11).integers(0, 9, (B, S)).astype(np.int32)
    plain: dict[str, Array | None] = {
        "ids": ids, "segments": ids % 2, "words": f(9, 8), "places": f(7, 8), "segment": f(2, 8), "gamma": f(8),
        "beta": f(8),
    }  # fmt: skip
    return {
        "plain": plain,
        "mask": {**plain, "mask": integers([1, 1, 0], [1, 0, 0])},
        "words only": {**plain, "segments": None, "segment": None},
        "positions": {**plain, "mask": None, "positions": integers([1, 2, 3], [0, 1, 2])},
    }


@pytest.mark.parametrize("name", embedding_cases())
def test_embeddings(name: str) -> None:
    operands = embedding_cases()[name]
    symbols = {B: "batch", S: "words"} if name != "words only" else {S: "words"}
    assert_as_onnxruntime(
        "EmbedLayerNormalization", operands, {"epsilon": 1e-5}, ("y", "count", "sum"), symbols=symbols
    )


# What ONNX Runtime has for GPUs only, after docs/ContribOperators.md.


def run(
    op: str, operands: dict[str, Array | None], outputs: tuple[str, ...] = ("y",), **attributes: Any
) -> list[Array]:
    model, inputs = operator_model(op, operands, attributes, outputs)
    return list(onnxc.compile(model).run(inputs).values())


def test_packed_heads() -> None:
    """(batch, sequence, heads, 3, width) and (batch, sequence, heads, 2, width) say the same as apart."""
    f = normal(12)
    q, k, v = f(B, S, D), f(B, S, D), f(B, S, D)
    heads = [x.reshape(B, S, N, 1, H) for x in (q, k, v)]
    wanted = run("MultiHeadAttention", {"q": q, "k": k, "v": v}, num_heads=N)
    assert_close(run("MultiHeadAttention", {"q": np.concatenate(heads, 3)}, num_heads=N), wanted, 1e-6)
    assert_close(run("MultiHeadAttention", {"q": q, "k": np.concatenate(heads[1:], 3)}, num_heads=N), wanted, 1e-6)


def test_square_mask() -> None:
    """A mask (batch, 1, max, max) is read from the row of the first query on."""
    f = normal(13)
    operands: dict[str, Array | None] = {"x": f(B, S, 10), "w": f(10, 3 * D), "b": f(3 * D)}
    square = np.random.default_rng(14).integers(0, 2, (B, 1, 12, 12)).astype(np.int32)
    past = f(2, B, N, P, H)
    found = run("Attention", {**operands, "mask": square, "past": past}, num_heads=N)
    rows = np.ascontiguousarray(square[:, 0, P : P + S, : P + S])
    assert_close(found, run("Attention", {**operands, "mask": rows, "past": past}, num_heads=N), 1e-6)


def test_starts_and_ends() -> None:
    """Lengths [2*B] are ends and starts; which they are a symbolic batch cannot tell."""
    operands = TABLE["attention"][1]
    for mask in (integers([2, 3, 1, 0]), integers([2, 3, 0, 3, 6, 0, 3, 6])):
        attributes = {"num_heads": N, "mask_filter_value": -2.5}
        assert_as_onnxruntime("Attention", {**operands, "mask": mask}, attributes, symbols=None)


def test_no_bias() -> None:
    operands = TABLE["attention"][1]
    none = {**operands, "bias": np.zeros(3 * D, np.float32)}
    assert_close(run("Attention", {**operands, "bias": None}, num_heads=N), run("Attention", none, num_heads=N), 1e-6)


def test_scores() -> None:
    """The fourth output: scores before the softmax, masked."""
    op, operands, attributes, _ = TABLE["multi-head keys"]
    attributes = {"num_heads": N, **attributes}
    model, inputs = operator_model(op, operands, attributes, ("y", "", "", "qk"), typed=1)
    assert_close(list(onnxc.compile(model).run(inputs).values()), by_onnxruntime(model, inputs), 2e-6)


def test_gemma_rotary() -> None:
    f = normal(15)
    angles, states = f(B, S, H), [f(B, N, S, H) for _ in range(4)]
    q, q_rot, k, k_rot = states
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    operands: dict[str, Array | None] = dict(zip(("a", "q", "q_rot", "k", "k_rot"), (angles, *states), strict=True))
    found = run("GemmaRotaryEmbedding", operands, ("y", "z"))
    assert_close(found, [q * cos + q_rot * sin, k * cos + k_rot * sin], 1e-6)


def test_normalised_heads() -> None:
    """q_norm_weight and k_norm_weight: each head divided by its root mean square, before all else."""
    f = normal(16)
    operands = grouped(3, rotary=False)
    scales = {"q_norm": f(16), "k_norm": f(16)}
    attributes: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2}
    found = run("GroupQueryAttention", {**operands, "k_scale": None, "v_scale": None, **scales}, **attributes)

    def scaled(x: Array | None, scale: Array) -> Array:
        assert x is not None
        heads = x.reshape(B, 3, -1, 16)
        return (heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6) * scale).reshape(x.shape)

    direct = {"q": scaled(operands["q"], scales["q_norm"]), "k": scaled(operands["k"], scales["k_norm"])}
    assert_close(found, run("GroupQueryAttention", {**operands, **direct}, **attributes), 2e-6)


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [("Attention", {"do_rotary": 1}, "do_rotary"), ("Attention", {"unknown": 1}, "its attribute 'unknown'")],
)
def test_refused(op: str, attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(onnxc.UnsupportedError, match=message):
        run(op, TABLE["attention"][1], num_heads=N, **attributes)


@pytest.mark.parametrize("name", ["attention past", "multi-head keys", "decoder step"])
def test_heads_on_gpu(name: str, gpu: None) -> None:
    op, operands, attributes, outputs = TABLE[name]
    assert_as_onnxruntime(op, operands, {"num_heads": N, **attributes}, outputs, target="cuda", tolerance=5e-6)


@pytest.mark.parametrize("name", ["step buffer", "sink", "f16"])
def test_grouped_heads_on_gpu(name: str, gpu: None) -> None:
    operands, attributes = GROUPED[name]
    attributes = {"num_heads": 4, "kv_num_heads": 2, **attributes}
    tolerance = 4e-3 if name == "f16" else 5e-6
    outputs = ("y", "key", "value")
    assert_as_onnxruntime("GroupQueryAttention", operands, attributes, outputs, target="cuda", tolerance=tolerance)


@pytest.mark.parametrize("name", ["multi-head keys", "attention ends 1", "grouped"])
def test_attention_stores_no_scores(name: str) -> None:
    """The expansion is what the attention pass looks for."""
    op, operands, attributes, _ = TABLE.get(name, ("GroupQueryAttention", *GROUPED["step"], ("y",)))
    heads = {"num_heads": N, "kv_num_heads": 2} if name == "grouped" else {"num_heads": N}
    model, _ = operator_model(op, operands, {**attributes, **heads}, ("y",))
    graph = run_pipeline(imported(model, Options()), parse_pipeline(PIPELINES["cuda"]))
    assert [node.op for node in graph.walk() if node.op in ("onnxc.Attention", "Softmax")] == ["onnxc.Attention"]
