"""The command line on models that Python runs in part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxc.tools import cli
from small_models import model_of_text

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process: exit code, what it prints, what it complains of."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Doubles words, and negates the numbers of those that are empty."""
    model = model_of_text("""words (string[n] words, float[n] x, optional(float[n]) more)
            => (float[n] y, seq(string[n]) all) {
        doubled = StringConcat (words, words)
        same = Equal (doubled, words)
        negated = Neg (x)
        y = Where (same, negated, x)
        all = SequenceConstruct (words, doubled)
    }""")
    onnx.save(model, tmp_path / "words.onnx")
    return tmp_path / "words.onnx"


def test_run_takes_text_and_prints_and_saves_sequences(command: Command, path: Path, tmp_path: Path) -> None:
    code, out, _ = command(
        "run", path, "--input", "words=a,,Bc", "--input", "x=1,2,3", "--save", tmp_path / "found", "--json"
    )
    assert code == 0
    outputs = json.loads(out)["outputs"]
    assert outputs["y"]["first"] == [1.0, -2.0, 3.0]
    assert outputs["all[1]"]["first"] == ["aa", "", "BcBc"]
    assert np.load(tmp_path / "found" / "all_1_.npy").tolist() == ["aa", "", "BcBc"]
    code, _, err = command("run", path, "--input", "x=1,2")
    assert code != 0 and "words: string[n] cannot be made up" in err


def test_run_reads_sequences_and_encoded_images(command: Command, tmp_path: Path) -> None:
    from PIL import Image

    model = model_of_text("""inputs (seq(float[n]) parts, uint8[n] file) => (float[m] y, uint8[h, w, c] image) {
        y = ConcatFromSequence <axis = 0> (parts)
        image = ImageDecoder (file)
    }""")
    onnx.save(model, tmp_path / "inputs.onnx")
    parts = onnx.numpy_helper.from_list([np.float32([1, 2]), np.float32([3])], "parts")
    (tmp_path / "parts.pb").write_bytes(parts.SerializeToString())
    Image.fromarray(np.full((2, 3, 3), 7, np.uint8)).save(tmp_path / "grey.png")
    arguments = ("--input", f"parts={tmp_path / 'parts.pb'}", "--input", f"file={tmp_path / 'grey.png'}", "--json")
    code, out, err = command("run", tmp_path / "inputs.onnx", *arguments)
    assert code == 0, err
    outputs = json.loads(out)["outputs"]
    assert outputs["y"]["first"] == [1.0, 2.0, 3.0]
    assert (outputs["image"]["shape"], outputs["image"]["mean"]) == ([2, 3, 3], 7)
    code, _, err = command("run", tmp_path / "inputs.onnx", "--input", "parts=1,2")
    assert code != 0 and "only as a file (.pb)" in err


def test_dump_lists_the_steps(command: Command, path: Path) -> None:
    code, out, _ = command("dump", path, "--stage", "program")
    assert code == 0
    assert 'python   (words, words) -> (doubled): "StringConcat_0" (StringConcat)' in out
    assert 'compiled (negated, same, x) -> (y): "Where_3" (Where)' in out
    code, _, err = command("dump", path)
    assert code == 4 and "--stage program lists its steps" in err


def test_what_is_ahead_of_time_refuses_by_name(command: Command, path: Path, tmp_path: Path) -> None:
    for suffix in ("onnxc", "so", "o"):
        code, _, err = command("compile", path, "-o", tmp_path / f"model.{suffix}")
        assert code == 4
        assert 'Python runs 3 steps of this model: "StringConcat_0" (StringConcat), "Equal_1" (Equal)' in err
        assert not (tmp_path / f"model.{suffix}").exists()
    code, _, err = command("plan", path)
    assert code == 4 and "onnxc dump --stage program" in err
