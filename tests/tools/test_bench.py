"""`onnxc bench`: what is measured, compared and told; no test depends on how long anything takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnxc.tools.bench.rounds import Result, Setting, difference, measure
from onnxc.tools.bench.subjects import inputs_of, leading_symbols
from onnxc.tools.cli import cli
from small_models import model_of_text

DIGITS = str(Path(__file__).parents[2] / "tools" / "digits.onnx")


def test_ratio_is_the_median_of_the_rounds() -> None:
    own, other = Result("onnxc", [1.0, 2.0, 4.0]), Result("x", [2.0, 6.0, 8.0])
    assert other.ratio(own) == 2.0
    assert own.median == 2.0
    assert Result("x", [1.0, 1.0, 1.0, 1.0, 9.0]).spread < 9


def test_difference_of_outputs() -> None:
    one = [np.array([1.0, -4.0])]
    assert difference(one, one) == 0
    assert difference([np.array([1.0, -3.0])], one) == 0.25
    assert difference([np.array([1.0])], one) == difference([], one) == float("inf")


def test_sizes_and_inputs() -> None:
    assert leading_symbols(DIGITS) == ["batch"]
    sizes, inputs = inputs_of(DIGITS, {"batch": 5}, {}, (), 0)
    assert sizes == {"batch": 5}
    assert inputs["image"].shape == (5, 1, 8, 8)


def test_engines_in_turns() -> None:
    sizes, inputs = inputs_of(DIGITS, {"batch": 2}, {}, (), 0)
    own, other = measure(Setting(DIGITS, sizes, inputs), ["onnxc", "onnxruntime"], 2, 0.001)
    assert not own.error and not other.error
    assert len(own.rounds) == len(other.rounds) == 2
    assert own.difference is not None and own.difference < 1e-5
    assert own.cold is not None and own.code_bytes and own.memory


def test_inputs_without_axes_stay_so(tmp_path: Path) -> None:
    path = tmp_path / "scaled.onnx"
    onnx.save(model_of_text("scaled (float[n] x, float factor) => (float[n] y) { y = Mul (x, factor) }"), path)
    sizes, inputs = inputs_of(str(path), {"n": 5}, {}, (), 0)
    assert inputs["factor"].shape == ()
    own, other = measure(Setting(str(path), sizes, inputs), ["onnxc", "onnxruntime"], 1, 0.001, cold=False)
    assert (own.error, other.error, own.difference) == ("", "", 0.0)


@pytest.fixture
def reduced(tmp_path: Path) -> str:
    """A model whose code depends on the value of an input."""
    path = tmp_path / "reduced.onnx"
    text = "reduced (float[a, b] x, int64[1] axis) => (float[n] y) { y = ReduceSum <keepdims = 0> (x, axis) }"
    onnx.save(model_of_text(text), path)
    return str(path)


def test_a_model_compiled_for_given_values(reduced: str) -> None:
    assert leading_symbols(reduced) == []
    sizes, inputs = inputs_of(reduced, {}, {"x": (4, 6)}, ["axis=1"], 0)
    assert inputs["x"].shape == (4, 6) and inputs["axis"].tolist() == [1]
    own, other = measure(Setting(reduced, sizes, inputs), ["onnxc", "onnxruntime"], 1, 0.001, cold=False)
    assert (own.error, other.error) == ("", "")
    assert own.difference is not None and own.difference < 1e-6


def test_profile_of_a_model_compiled_for_given_values(reduced: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    arguments = ["bench", reduced, "--shape", "x=4x6", "--input", "axis=0", "--profile", "--json", str(file)]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    (setting,) = json.loads(file.read_text())["settings"]
    assert len(setting["kernels"]) == 1


def test_an_engine_that_fails_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"nothing")
    (result,) = measure(Setting(str(broken), {}, {}), ["onnxruntime"], 1, 0.001)
    assert "onnx" in result.error.lower() or "protobuf" in result.error.lower()
    assert not result.rounds


def test_command(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    arguments = ["bench", DIGITS, "--batch", "1,3", "--rounds", "1", "--seconds", "0.001", "--no-cold"]
    result = CliRunner().invoke(cli, [*arguments, "--json", str(file)], catch_exceptions=False)
    assert result.exit_code == 0
    record = json.loads(file.read_text())
    assert [setting["sizes"] for setting in record["settings"]] == [{"batch": 1}, {"batch": 3}]
    assert set(record["settings"][0]["engines"]) == set(record["versions"]) == {"onnxc", "onnxruntime"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--against", "abacus"], "no engine is called 'abacus'"), (["--threads", "0"], "no list of numbers")],
)
def test_bad_usage(arguments: list[str], text: str) -> None:
    from onnxc.ir.errors import OnnxcError

    result = CliRunner().invoke(cli, ["bench", DIGITS, *arguments])
    assert text in (str(result.exception) if isinstance(result.exception, OnnxcError) else result.output)
