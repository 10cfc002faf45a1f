"""The models that `onnxc bench` knows by name."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnxc.ir.errors import OnnxcError
from onnxc.tools.bench import catalogue, exported, light, quantized
from onnxc.tools.bench.packages import ARCHIVES
from onnxc.tools.cli import cli
from small_models import small_cnn


def test_each_model_has_a_source() -> None:
    for name, subject in catalogue.CATALOGUE.items():
        if subject.source == "torch":
            assert name in exported.EXPORTS
        elif subject.source == "quantized":
            assert name in quantized.QUANTIZED
        elif subject.source == "light":
            assert (subject.member or name) in light.NAMES
        else:
            assert subject.member in ARCHIVES[subject.source].members
    exports = {name for name, subject in catalogue.CATALOGUE.items() if subject.source == "torch"}
    assert exports == set(exported.EXPORTS)
    made = {name for name, subject in catalogue.CATALOGUE.items() if subject.source == "quantized"}
    assert made == set(quantized.QUANTIZED)


def test_a_light_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXC_MODEL_CACHE", str(tmp_path))
    path = catalogue.model_path("squeezenet")
    onnx.checker.check_model(str(path))
    weights = onnx.load(path).graph.initializer
    assert sum(np.prod(tensor.dims) for tensor in weights) > 1e6
    made = path.stat().st_mtime_ns
    assert catalogue.model_path("squeezenet").stat().st_mtime_ns == made
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_packed_blocks_are_within_half_a_step_of_the_weights() -> None:
    """Their bytes as MatMulNBits is defined: (nibble - 8) * scale, the low nibble first."""
    weights = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    weights[:32, 1] = 0
    packed, scales = quantized.packed_blocks(weights)
    assert (packed.shape, scales.shape) == ((3, 2, 16), (6,))
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(3, 2, 32).astype(np.float32)
    unpacked = ((nibbles - 8) * scales.reshape(3, 2, 1)).reshape(3, 64).T
    step = np.abs(scales).reshape(3, 2, 1).repeat(32, 2).reshape(3, 64).T
    # 15 stands for what is a step further on, of the sign that the furthest element has not.
    assert np.all(np.abs(unpacked - weights) <= 1.0001 * step)
    assert np.mean(np.abs(unpacked - weights) <= 0.5001 * step) > 0.9
    assert not unpacked[:32, 1].any()


def test_an_int8_model_is_made_of_a_float_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ONNX Runtime's quantizer: weights of the convolutions per channel in i8, activations in u8."""
    monkeypatch.setenv("ONNXC_MODEL_CACHE", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    small = tmp_path / "models" / "small.onnx"
    small.parent.mkdir()
    onnx.save(small_cnn(), small)
    monkeypatch.setattr(catalogue, "model_path", lambda name: small)
    made = tmp_path / "made.onnx"
    quantized.quantized_pairs(made, "any")
    model = onnx.load(made)
    onnx.checker.check_model(model)
    types = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4}
    assert types == {onnx.TensorProto.INT8}
    assert {node.op_type for node in model.graph.node} >= {"QuantizeLinear", "DequantizeLinear", "Conv"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.onnx", "models"]


def test_what_is_missing_to_make_a_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONNXC_MODEL_CACHE", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(OnnxcError, match=r"torch makes this model: pip install 'onnxc\[bench\]'"):
        catalogue.model_path("mlp")


def test_the_command_lists_them_and_refuses_other_names() -> None:
    listed = CliRunner().invoke(cli, ["bench", "--list"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in catalogue.CATALOGUE)
    refused = CliRunner().invoke(cli, ["bench", "no_such_model"])
    assert refused.exit_code != 0
    assert "neither a file nor the name of a model" in refused.output + str(refused.exception or "")
