"""Models that ONNX Runtime writes itself: optimized at every level, and quantized in every format."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxc
import pytest
from against_kernel import assert_close
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime_models import WORDS, Graph, bert, decoder, network, optimized, outputs_of, own_operators
from single_node import Array

MODELS: Mapping[str, Callable[[], tuple[onnx.ModelProto, dict[str, Array]]]] = {"bert": bert, "network": network}


def run(model: onnx.ModelProto, feeds: Mapping[str, Array], target: str | None = None) -> list[Array]:
    return list(onnxc.compile(model, target=target).run(feeds).values())


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        ("bert", "ENABLE_BASIC", ()),
        ("bert", "ENABLE_ALL", ("FusedMatMul", "SkipLayerNormalization", "Gelu")),
        ("network", "ENABLE_EXTENDED", ("FusedConv",)),
        ("network", "ENABLE_ALL", ("nchwc.Conv", "nchwc.MaxPool", "nchwc.ReorderOutput", "nchwc.Upsample")),
    ],
)
def test_optimized_models(name: str, level: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    model, feeds = MODELS[name]()
    written = optimized(model.SerializeToString(), level, tmp_path / "optimized.onnx")
    assert set(expected) <= set(own_operators(written)), own_operators(written)
    assert_close(run(written, feeds), outputs_of(model.SerializeToString(), feeds), 2e-6)


def test_blocked_model_on_gpu(gpu: None, tmp_path: Path) -> None:
    model, feeds = network()
    written = optimized(model.SerializeToString(), "ENABLE_ALL", tmp_path / "optimized.onnx")
    assert "nchwc.Conv" in own_operators(written)
    assert_close(run(written, feeds, "cuda"), outputs_of(model.SerializeToString(), feeds), 5e-6)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Gives one sample."""

    def __init__(self, feeds: dict[str, Array]) -> None:
        self.samples = iter([feeds])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.samples, None)


def dynamic(source: str, target: str, feeds: dict[str, Array]) -> None:
    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)


def operators(source: str, target: str, feeds: dict[str, Array]) -> None:
    quantize_static(source, target, Reader(feeds), QuantFormat.QOperator, per_channel=True)


def pairs(source: str, target: str, feeds: dict[str, Array]) -> None:
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(source, target, Reader(feeds), QuantFormat.QDQ, **types)


def wide_pairs(source: str, target: str, feeds: dict[str, Array]) -> None:
    types = {"activation_type": QuantType.QUInt16, "weight_type": QuantType.QInt8}
    quantize_static(source, target, Reader(feeds), QuantFormat.QDQ, **types)


@pytest.mark.parametrize(
    ("name", "quantize", "expected"),
    [
        ("bert", dynamic, ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")),
        ("bert", operators, ("QLinearAdd", "QLinearMul", "QLinearSoftmax")),
        ("bert", pairs, ("QLinearAdd", "QLinearMul", "QLinearSoftmax")),
        ("bert", wide_pairs, ()),
        ("network", dynamic, ("DynamicQuantizeMatMul",)),
        ("network", operators, ("QLinearConv", "QLinearGlobalAveragePool", "QLinearConcat", "QGemm")),
        ("network", pairs, ("QLinearConv", "NhwcMaxPool", "QLinearAveragePool", "QLinearLeakyRelu")),
    ],
)
def test_quantized_models(name: str, quantize: Callable[..., None], expected: tuple[str, ...], tmp_path: Path) -> None:
    """The quantizer's file, and what the optimizer makes of it on this machine, which knows some operators by another
    layout or not at all; integers that lie between two steps may fall to either side."""
    logging.getLogger().setLevel(logging.ERROR)  # the quantizer advises to preprocess
    model, feeds = MODELS[name]()
    source, target = str(tmp_path / "model.onnx"), str(tmp_path / "quantized.onnx")
    onnx.save(model, source)
    quantize(source, target, feeds)
    wanted = outputs_of(target, feeds)
    assert_close(run(onnx.load(target), feeds), wanted, 0.03)
    written = optimized(target, "ENABLE_ALL", tmp_path / "optimized.onnx")
    assert set(expected) <= set(own_operators(written)), own_operators(written)
    assert_close(run(written, feeds), wanted, 0.03)


def test_transformers_optimizer(tmp_path: Path) -> None:
    """What `onnxruntime.transformers.optimizer` fuses, which needs sympy."""
    pytest.importorskip("sympy")
    from onnxruntime.transformers import optimizer

    model, feeds = bert()
    onnx.save(model, tmp_path / "bert.onnx")
    settings = {"model_type": "bert", "num_heads": 4, "hidden_size": 32, "opt_level": 0}
    written = optimizer.optimize_model(str(tmp_path / "bert.onnx"), **settings).model
    assert {"Attention", "BiasGelu"} <= set(own_operators(written))
    assert_close(run(written, feeds), outputs_of(model.SerializeToString(), feeds), 2e-6)


def test_decoder() -> None:
    """A prompt, then words one by one with the cache that the step before gave; one compile for all of them."""
    model = decoder()
    text = model.SerializeToString()
    executable = onnxc.compile(model)
    names = [value.name for value in model.graph.input][2:]
    random = np.random.default_rng(6)
    caches = [np.zeros((2, 2, 0, 16), np.float32) for _ in names]
    for length in (5, 1, 1):
        past = caches[0].shape[2]
        feeds = dict(zip(names, caches, strict=True))
        feeds["input_ids"] = random.integers(0, WORDS, (2, length))
        feeds["attention_mask"] = np.ones((2, past + length), np.int64)
        wanted = outputs_of(text, feeds)
        assert_close(list(executable.run(feeds).values()), wanted, 5e-6)
        caches = wanted[1:]
    assert caches[0].shape == (2, 2, 7, 16)


def test_decoder_with_a_buffer() -> None:
    """Where the cache is longer than what it holds, the rest of it stays, as where past and present share memory."""
    model = decoder()
    names = [value.name for value in model.graph.input][2:]
    random = np.random.default_rng(7)
    caches = [random.standard_normal((1, 2, 4, 16)).astype(np.float32) for _ in names]
    step = {"input_ids": np.array([[3]]), "attention_mask": np.ones((1, 5), np.int64)}
    logits, *_ = outputs_of(model.SerializeToString(), {**step, **dict(zip(names, caches, strict=True))})
    long = [np.concatenate([cache, np.full((1, 2, 6, 16), 9, np.float32)], 2) for cache in caches]
    found, *present = onnxc.compile(model).run({**step, **dict(zip(names, long, strict=True))}).values()
    assert_close([found], [logits], 5e-6)
    for before, after in zip(long, present, strict=True):
        np.testing.assert_array_equal(after[:, :, :4], before[:, :, :4])
        np.testing.assert_array_equal(after[:, :, 5:], before[:, :, 5:])


def test_layer_normalization_before_its_opset() -> None:
    """The optimizer writes it into models of older opsets than the one that has it."""
    g = Graph()
    y = g.normal("x", 8)
    model = g.model({"x": (onnx.TensorProto.FLOAT, ["n", 8])}, {y: ["n", 8]})
    model.opset_import[0].version = 12
    feeds = {"x": np.random.default_rng(8).standard_normal((3, 8)).astype(np.float32)}
    assert_close(run(model, feeds), outputs_of(model.SerializeToString(), feeds), 2e-6)
