"""The models that `onnxc bench` knows by name."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnxc.ir.errors import OnnxcError
from onnxc.tools.bench import catalogue, exported, light
from onnxc.tools.bench.packages import ARCHIVES
from onnxc.tools.cli import cli


def test_each_model_has_a_source() -> None:
    for name, subject in catalogue.CATALOGUE.items():
        if subject.source == "torch":
            assert name in exported.EXPORTS
        elif subject.source == "light":
            assert (subject.member or name) in light.NAMES
        else:
            assert subject.member in ARCHIVES[subject.source].members
    exports = {name for name, subject in catalogue.CATALOGUE.items() if subject.source == "torch"}
    assert exports == set(exported.EXPORTS)


def test_a_light_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXC_MODEL_CACHE", str(tmp_path))
    path = catalogue.model_path("squeezenet")
    onnx.checker.check_model(str(path))
    weights = onnx.load(path).graph.initializer
    assert sum(np.prod(tensor.dims) for tensor in weights) > 1e6
    made = path.stat().st_mtime_ns
    assert catalogue.model_path("squeezenet").stat().st_mtime_ns == made
    assert [found.name for found in path.parent.iterdir()] == [path.name]


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
