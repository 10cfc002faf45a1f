"""States that go from call to call, distances and inverses of com.microsoft, against ONNX Runtime's CPU kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxc
import pytest
from against_kernel import assert_as_onnxruntime, assert_close, by_onnxruntime, operator_model
from single_node import Array

random = np.random.default_rng(0)


def real(*shape: int) -> Array:
    return random.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("last", [0, 1])
def test_causal_convolution(last: int, past: bool, dilation: int) -> None:
    kept = 3 * dilation
    image, state = ((2, 3, 6), (2, kept, 6)) if last else ((2, 6, 3), (2, 6, kept))
    operands = {"x": real(*image), "w": real(6, 1, 4), "b": real(6), "past": real(*state) if past else None}
    attributes = {"activation": "silu", "channels_last": last, "dilation": dilation}
    assert_as_onnxruntime("CausalConvWithState", operands, attributes, ("y", "state"), symbols={2: "batch"})


@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (2, 4)])
@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
def test_linear_attention(rule: str, heads: tuple[int, int]) -> None:
    queries, keys = heads
    width = keys * 8 if queries == 4 else keys  # decay for each channel, or for each head
    operands = {
        "q": real(2, 3, queries * 8), "k": real(2, 3, keys * 8) * 0.3, "v": real(2, 3, keys * 5),
        "past": real(2, keys, 8, 5) if queries != keys else None,
        "decay": -np.abs(real(2, 3, width)) if "gated" in rule else None,
        "beta": np.abs(real(2, 3, keys if queries != keys else 1)) if "delta" in rule else None,
    }  # fmt: skip
    attributes = {"q_num_heads": queries, "kv_num_heads": keys, "update_rule": rule}
    symbols = {3: "words"}
    assert_as_onnxruntime("LinearAttention", operands, attributes, ("y", "state"), tolerance=1e-5, symbols=symbols)


def test_linear_attention_gate() -> None:
    operands = {"a": real(2, 3, 4), "bias": real(4), "scale": real(4), "b": real(2, 3, 4)}
    assert_as_onnxruntime("LinearAttentionGate", operands, outputs=("y", "z"), symbols={3: "words"})


@pytest.mark.parametrize("layout", [0, 1])
def test_rotary_positions_of_three_kinds(layout: int) -> None:
    angles = real(16, 6)
    rest = {"ids": random.integers(0, 16, (3, 2, 5)), "cos": np.cos(angles), "sin": np.sin(angles)}
    for x, attributes in (
        (real(2, 5, 48), {"num_heads": 4}),
        (real(2, 5, 48), {"num_heads": 4, "interleaved": 1}),
        (real(2, 4, 5, 16), {"num_heads": 4, "rotary_embedding_dim": 12}),
    ):
        given = {**attributes, "mrope_section": [2, 2, 2], "mrope_layout": layout}
        assert_as_onnxruntime("MRotaryEmbedding", {"x": x, **rest}, given, symbols={5: "words"})


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_distances(metric: str) -> None:
    assert_as_onnxruntime("CDist", {"a": real(3, 4), "b": real(5, 4)}, {"metric": metric}, symbols={3: "m", 5: "n"})


@pytest.mark.parametrize(("axis", "size", "step"), [(1, 3, 2), (0, 2, 1), (-1, 2, 1)])
def test_windows(axis: int, size: int, step: int) -> None:
    attributes = {"dim": axis, "size": size, "step": step}
    assert_as_onnxruntime("UnfoldTensor", {"x": real(3, 9, 4)}, attributes, symbols={9: "n"})


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_inverse(size: int) -> None:
    assert_as_onnxruntime("Inverse", {"x": real(3, size, size)}, tolerance=1e-4, symbols={3: "batch"})


def test_inverse_exchanges_rows() -> None:
    assert_as_onnxruntime("Inverse", {"x": np.float32([[0, 2, 0], [1, 0, 0], [0, 0, 4]])}, symbols=None)


def test_integers() -> None:
    a, b = random.integers(-99, 99, (3, 4)).astype(np.int16), random.integers(-99, 99, (4, 5)).astype(np.int16)
    assert_as_onnxruntime("MatMulInteger16", {"a": a, "b": b}, symbols={3: "rows"})
    model, inputs = operator_model("ReduceSumInteger", {"x": a.astype(np.int8)}, {"axes": [1], "keepdims": 0}, ("y",))
    found = list(onnxc.compile(model).run(inputs).values())  # no kernel for CPUs
    assert_close(found, [a.astype(np.int32).sum(1, dtype=np.int32)], 0)


@pytest.mark.parametrize(
    ("shape", "scale", "attributes"),
    [((3, 12), (4,), {"num_branches": 3}), ((3, 12), (12,), {"num_branches": 3}), ((5, 3, 4), (3, 4), {})],
)
def test_branches(shape: tuple[int, ...], scale: tuple[int, ...], attributes: dict[str, Any]) -> None:
    operands = {"x": real(*shape), "scale": real(*scale)}
    assert_as_onnxruntime("BranchwiseRMSNorm", operands, {"epsilon": 1e-5, **attributes}, symbols={5: "n"})


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("Affine", {"alpha": 0.5, "beta": 0.2}),
        ("Scale", {"scale": 0.5}),
        ("ScaledTanh", {"alpha": 0.5, "beta": 0.2}),
        ("ParametricSoftplus", {"alpha": 0.5, "beta": 0.2}),
        ("ImageScaler", {"scale": 0.5, "bias": [0.1, 0.2, 0.3]}),
        ("ThresholdedRelu", {"alpha": 0.5}),
    ],
)
def test_first_operators(op: str, attributes: dict[str, Any]) -> None:
    """ONNX Runtime knows them in ONNX's own domain, from opset 1 on."""
    model, inputs = operator_model(op, {"x": real(2, 3, 4, 5)}, attributes, ("y",))
    model.graph.node[0].domain = ""
    model.opset_import[0].version = 9
    found = list(onnxc.compile(model).run(inputs).values())
    assert_close(found, by_onnxruntime(model, inputs), 2e-6)


def test_states_and_inverses_on_gpu(gpu: None) -> None:
    operands = {"x": real(2, 6, 3), "w": real(6, 1, 4), "b": real(6), "past": real(2, 6, 3)}
    assert_as_onnxruntime("CausalConvWithState", operands, {}, ("y", "state"), tolerance=1e-5, target="cuda")
    assert_as_onnxruntime("Inverse", {"x": real(2, 3, 3)}, tolerance=1e-4, target="cuda")
    operands = {"q": real(2, 3, 16), "k": real(2, 3, 16) * 0.3, "v": real(2, 3, 10), "past": None}
    operands |= {"decay": -np.abs(real(2, 3, 2)), "beta": np.abs(real(2, 3, 2))}
    attributes = {"q_num_heads": 2, "kv_num_heads": 2}
    assert_as_onnxruntime("LinearAttention", operands, attributes, ("y", "state"), tolerance=1e-5, target="cuda")
