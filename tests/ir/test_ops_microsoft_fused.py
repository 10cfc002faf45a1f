"""Fused operators and mixtures of experts of com.microsoft against ONNX Runtime's CPU kernels, or by the formulas of
docs/ContribOperators.md where it has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxc
import pytest
from against_kernel import assert_as_onnxruntime, assert_close, by_onnxruntime, operator_model
from single_node import Array

Case = tuple[str, dict[str, Array | None], dict[str, Any]]
random = np.random.default_rng(0)


def real(*shape: int) -> Array:
    return random.standard_normal(shape).astype(np.float32)


def u8(*shape: int) -> Array:
    return random.integers(0, 256, shape).astype(np.uint8)


def steps(*shape: int) -> Array:
    return (random.random(shape) * 0.1 + 0.01).astype(np.float32)


IMAGE: dict[str, Array | None] = {"x": real(2, 3, 6, 5), "w": real(4, 3, 3, 3), "b": real(4)}
WINDOW = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
SKIPPED: dict[str, Array | None] = {"x": real(2, 3, 8), "skip": real(2, 3, 8), "gamma": real(8)}
PARAMETERS = {"LeakyRelu": [0.1], "Clip": [-0.5, 0.5], "HardSigmoid": [0.2, 0.5]}

TABLE: dict[str, Case] = {
    **{
        f"conv {name}": (
            "FusedConv", {**IMAGE, "z": real(2, 4, 6, 5)},
            {"activation": name, **({"activation_params": PARAMETERS[name]} if name in PARAMETERS else {}), **WINDOW},
        )
        for name in ("Relu", "Tanh", "Sigmoid", *PARAMETERS)
    },
    "conv": ("FusedConv", IMAGE, WINDOW),
    "pool": ("NhwcMaxPool", {"x": u8(2, 6, 5, 3)}, {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "strides": [2, 1]}),
    "gemm": (
        "FusedGemm", {"a": real(3, 4), "b": real(5, 4), "c": real(5)},
        {"activation": "LeakyRelu", "transB": 1, "alpha": 0.5, "activation_alpha": 0.2},
    ),
    "gemm tanh": ("FusedGemm", {"a": real(3, 4), "b": real(4, 5), "c": real(5)}, {"activation": "Tanh"}),
    "silu": ("ScaledSiLU", {"x": real(2, 8)}, {"alpha": 2.0}),
    "gated norm": ("GatedRMSNorm", {"x": real(2, 8), "scale": real(4), "gate": real(2, 8)}, {}),
    "range": ("Range", {"first": np.array(1), "end": np.array(9), "step": np.array(2)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_fused(name: str) -> None:
    op, operands, attributes = TABLE[name]
    symbols: Mapping[int, str] = {2: "batch", 6: "height"} if "conv" in name else {}
    symbols = {8: "n"} if name in ("gated norm", "range") else symbols
    assert_as_onnxruntime(op, operands, attributes, tolerance=1e-5, symbols=symbols)


def test_simplified_normalization() -> None:
    """ONNX Runtime has it in ONNX's own domain."""
    operands = {"x": real(2, 3, 8), "scale": real(8)}
    attributes = {"axis": -1, "epsilon": 1e-4, "stash_type": 1}
    model, inputs = operator_model("SimplifiedLayerNormalization", operands, attributes, ("y", "inverse"))
    model.graph.node[0].domain = ""
    assert_close(list(onnxc.compile(model).run(inputs).values()), by_onnxruntime(model, inputs), 2e-6)


@pytest.mark.parametrize("others", [{}, {"bias": real(8)}])
def test_skip_simplified_normalization(others: dict[str, Array]) -> None:
    outputs = ("y", "", "inverse", "sum")
    operands = {**SKIPPED, **others}
    assert_as_onnxruntime("SkipSimplifiedLayerNormalization", operands, {"epsilon": 1e-4}, outputs)


@pytest.mark.parametrize(
    "others",
    [{"beta": real(8), "bias": real(8)}, {"skip": real(3, 8), "beta": None, "bias": real(8)}, {"skip": real(1, 3, 8)}],
)
def test_skip_normalization(others: dict[str, Array | None]) -> None:
    outputs = ("y", "", "", "sum")
    operands = {**SKIPPED, **others}
    assert_as_onnxruntime("SkipLayerNormalization", operands, {"epsilon": 1e-4}, outputs, symbols={3: "words"})
    half = {name: array if array is None else array.astype(np.float16) for name, array in operands.items()}
    assert_as_onnxruntime("SkipLayerNormalization", half, {}, outputs, tolerance=3e-3, symbols=None)


SAME: dict[str, tuple[str, dict[str, Array | None], dict[str, Any], tuple[str, ...]]] = {
    "trilu": ("Trilu", {"x": real(3, 4), "k": np.array(1)}, {}, ("k",)),
    "gather": ("GatherND", {"x": real(3, 4, 5), "i": np.array([[0, 1], [2, 3]])}, {}, ()),
    "dims": ("ExpandDims", {"x": real(3, 4), "axis": np.array(1, np.int32)}, {}, ("axis",)),
    "product": ("TransposeMatMul", {"a": real(2, 4, 3), "b": real(2, 4, 5)}, {"transA": 1, "alpha": 0.3}, ()),
    "pad": ("Pad", {"x": real(3, 4), "p": np.array([1, 0, 0, 2]), "value": np.float32([1.5])}, {}, ("p",)),
    "pad reflected": ("Pad", {"x": real(3, 4), "p": np.array([1, 0, 0, 2])}, {"mode": "reflect"}, ("p",)),
    "transposed": (
        "ConvTransposeWithDynamicPads",
        {"x": real(1, 3, 5, 6), "w": real(3, 2, 3, 3), "p": np.array([1, 1, 1, 1]), "b": real(2)}, {}, ("p",),
    ),
    **{
        mode: (
            "GridSample", {"x": real(2, 3, 5, 6), "g": random.uniform(-1, 1, (2, 4, 3, 2)).astype(np.float32)},
            {"mode": mode, "padding_mode": "border"}, (),
        )
        for mode in ("bilinear", "nearest", "bicubic")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_those_that_onnx_has(name: str) -> None:
    op, operands, attributes, constant = SAME[name]
    assert_as_onnxruntime(op, operands, attributes, constant=constant, tolerance=1e-5, symbols={4: "n"})


def test_unique() -> None:
    operands: dict[str, Array | None] = {"x": np.float32([2, 1, 1, 3, 4, 3])}
    assert_as_onnxruntime("Unique", operands, outputs=("y", "places", "counts"))


EXPERTS, HIDDEN, INNER = 4, 16, 32


def experts(fused: int = 1) -> dict[str, Array | None]:
    rows = INNER * fused
    return {
        "x": real(3, HIDDEN), "scores": real(3, EXPERTS), "w1": real(EXPERTS, rows, HIDDEN) * 0.3,
        "b1": real(EXPERTS, rows), "w2": real(EXPERTS, HIDDEN, INNER) * 0.3, "b2": real(EXPERTS, HIDDEN),
    }  # fmt: skip


SWIGLU = {"activation_type": "swiglu", "swiglu_fusion": 1}
MIXTURES: list[tuple[dict[str, Array | None], dict[str, Any]]] = [
    *((experts(), {"k": 2, "activation_type": name}) for name in ("relu", "gelu", "silu", "identity")),
    (experts(), {"k": 2, "normalize_routing_weights": 1}),
    ({**experts(), "x": real(1, 3, HIDDEN)}, {"k": 1}),
    (experts(2), {"k": 2, **SWIGLU}),
    (experts(2), {"k": 2, **SWIGLU, "activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 0.5}),
]


@pytest.mark.parametrize("number", range(len(MIXTURES)))
def test_experts(number: int) -> None:
    operands, attributes = MIXTURES[number]
    assert_as_onnxruntime("MoE", operands, attributes, tolerance=1e-5, symbols={3: "tokens"})


def quantized_experts(bits: int, block: int, zeros: bool, fused: int = 1) -> dict[str, Array | None]:
    rows = INNER * fused

    def scales(count: int, width: int) -> Array:
        return steps(EXPERTS, count, width // block) if block else steps(EXPERTS, count)

    found: dict[str, Array | None] = {
        "x": real(3, HIDDEN), "scores": real(3, EXPERTS), "w1": u8(EXPERTS, rows, HIDDEN * bits // 8),
        "s1": scales(rows, HIDDEN), "b1": real(EXPERTS, rows), "w2": u8(EXPERTS, HIDDEN, INNER * bits // 8),
        "s2": scales(HIDDEN, INNER), "b2": real(EXPERTS, HIDDEN), "w3": None, "s3": None, "b3": None,
    }  # fmt: skip
    if zeros:
        found["z1"] = u8(EXPERTS, rows, -(-(HIDDEN // block) * bits // 8))
        found["z2"] = u8(EXPERTS, HIDDEN, -(-(INNER // block) * bits // 8))
    return found


@pytest.mark.parametrize(
    ("bits", "block", "zeros", "attributes"),
    [(4, 0, False, {}), (8, 0, False, {}), (4, 16, False, {}), (4, 16, True, {}), (4, 0, False, SWIGLU)],
)
def test_experts_of_few_bits(bits: int, block: int, zeros: bool, attributes: dict[str, Any]) -> None:
    operands = quantized_experts(bits, block, zeros, 2 if attributes else 1)
    attributes = {"k": 2, "expert_weight_bits": bits, **attributes, **({"block_size": block} if block else {})}
    assert_as_onnxruntime("QMoE", operands, attributes, tolerance=1e-4, symbols={3: "tokens"})


def test_experts_with_weights_of_their_own() -> None:
    others = {"z1": None, "z2": None, "z3": None, "share": steps(3, EXPERTS)}
    for normalize in (0, 1):
        attributes = {"k": 2, "normalize_routing_weights": normalize}
        operands = {**quantized_experts(4, 0, False), **others}
        assert_as_onnxruntime("QMoE", operands, attributes, tolerance=1e-4, symbols={3: "tokens"})


# What has kernels for GPUs only.


def run(
    op: str, operands: dict[str, Array | None], outputs: tuple[str, ...] = ("y",), **attributes: Any
) -> list[Array]:
    model, inputs = operator_model(op, operands, attributes, outputs)
    return list(onnxc.compile(model).run(inputs).values())


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def test_bias_softmax() -> None:
    data, inner, outer = real(2, 3, 4, 5), real(2, 1, 1, 5), real(4, 5)

    def softmax(x: Array, axes: tuple[int, ...]) -> Array:
        e = np.exp(x - x.max(axes, keepdims=True))
        return np.asarray(e / e.sum(axes, keepdims=True))

    found = run("BiasSoftmax", {"x": data, "b": inner}, axis=3, is_inner_broadcast=1)
    assert_close(found, [softmax(data + inner, (3,))], 1e-6)
    found = run("BiasSoftmax", {"x": data, "b": outer}, axis=2, is_inner_broadcast=0)
    assert_close(found, [softmax(data + outer, (2, 3))], 1e-6)
    found = run("BiasSoftmax", {"x": data, "b": inner.reshape(2, 5)}, axis=3, is_inner_broadcast=1)
    assert_close(found, [softmax(data + inner, (3,))], 1e-6)


@pytest.mark.parametrize("last", [0, 1])
def test_group_norm(last: int) -> None:
    x, gamma, beta, bias = real(2, 3, 4, 8), real(8), real(8), real(8)
    skip = real(2, 8)
    total = x + skip[:, None, None, :] + bias
    groups = total.reshape(2, 12, 4, 2)
    centred = groups - groups.mean((1, 3), keepdims=True)
    normal = centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-5)
    y = normal.reshape(x.shape) * gamma + beta
    y = y * sigmoid(y)
    wanted = [y, total] if last else [np.moveaxis(y, 3, 1), np.moveaxis(total, 3, 1)]
    operands = {"x": x if last else np.ascontiguousarray(np.moveaxis(x, 3, 1)), "g": gamma, "beta": beta}
    operands |= {"skip": skip, "bias": bias}
    attributes = {"groups": 4, "activation": 1, "channels_last": last}
    assert_close(run("SkipGroupNorm", operands, ("y", "sum"), **attributes), wanted, 2e-6)


def test_biases() -> None:
    x, bias, skip = real(2, 3, 8), real(8), real(2, 3, 8)
    assert_close(run("BiasAdd", {"x": x, "b": bias, "s": skip}), [x + bias + skip], 1e-6)
    dropped = run("BiasDropout", {"x": x, "b": bias, "s": skip}, ("y", "mask"))
    assert_close(dropped, [x + bias + skip, np.ones(x.shape, bool)], 1e-6)
    half = run("Gelu", {"x": (x + bias)[..., 4:]})[0]
    assert_close(run("BiasSplitGelu", {"x": x, "b": bias}), [(x + bias)[..., :4] * half], 1e-6)


def test_complex_numbers() -> None:
    a, b = real(3, 4), real(3, 4)
    x, y = a.view(np.complex64), b.view(np.complex64)
    assert_close(run_pairs("ComplexMul", a, b), [(x * y).view(np.float32)], 1e-6)
    assert_close(run_pairs("ComplexMulConj", a, b), [(x * y.conj()).view(np.float32)], 1e-6)


def run_pairs(op: str, a: Array, b: Array) -> list[Array]:
    """Products of complex numbers, as rows of pairs."""
    (found,) = run(op, {"a": a.reshape(3, 2, 2), "b": b.reshape(3, 2, 2)})
    return [found.reshape(3, 4)]


def test_spectra() -> None:
    x = real(2, 6, 8)
    for count, axes in ((1, (2,)), (2, (1, 2))):
        wanted = np.fft.rfftn(x, axes=axes)
        pairs = np.stack([wanted.real, wanted.imag], -1).astype(np.float32)
        assert_close(run("Rfft", {"x": x}, signal_ndim=count, normalized=0, onesided=1), [pairs], 2e-6)
        assert_close(run("Irfft", {"x": pairs}, signal_ndim=count, normalized=0, onesided=1), [x], 2e-6)


def test_finite() -> None:
    for values, wanted in (((1.0, 2.0), True), ((1.0, np.inf), False), ((np.nan, 2.0), False)):
        x, y = np.float32([0.0, values[0]]), np.float32([values[1]])
        (found,) = run("IsAllFinite", {"x": x, "y": y}, ("z",))
        assert bool(found) is wanted


def test_searches_are_refused() -> None:
    with pytest.raises(onnxc.UnsupportedError, match="compile the decoder itself"):
        run("GreedySearch", {"ids": np.zeros((1, 2), np.int32)}, eos_token_id=1)


@pytest.mark.parametrize("name", ["conv Relu", "gemm", "pool"])
def test_fused_on_gpu(name: str, gpu: None) -> None:
    op, operands, attributes = TABLE[name]
    assert_as_onnxruntime(op, operands, attributes, tolerance=1e-5, target="cuda")


def test_experts_on_gpu(gpu: None) -> None:
    operands, attributes = MIXTURES[0]
    assert_as_onnxruntime("MoE", operands, attributes, tolerance=1e-5, target="cuda")
    outputs = ("y", "", "", "sum")
    assert_as_onnxruntime("SkipSimplifiedLayerNormalization", SKIPPED, {}, outputs, tolerance=1e-5, target="cuda")
