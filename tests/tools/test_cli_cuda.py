"""The command line with a GPU as the target: what works without one, and with the one that tests have."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxc
import pytest
from onnxc.backends.cuda import nvrtc
from onnxc.tools import cli, demo

DIGITS = str(demo.FILES / "digits.onnx")
needs_nvrtc = pytest.mark.skipif(not nvrtc.is_available(), reason="NVRTC is not installed")


def command(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What a command line prints, in this process."""
    found = cli.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert found == code, captured.err
    return captured.out if code == 0 else captured.err


def test_run(capsys: pytest.CaptureFixture[str], gpu: None) -> None:
    told = json.loads(command(capsys, "run", DIGITS, "--target", "cuda", "--input", "image=ones", "--json"))
    alone = json.loads(command(capsys, "run", DIGITS, "--input", "image=ones", "--json"))
    assert told["outputs"].keys() == alone["outputs"].keys()


def test_an_artifact_runs_without_compiling(
    capsys: pytest.CaptureFixture[str], gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "digits.onnxc"
    command(capsys, "compile", DIGITS, "-o", path, "--target", "cuda:sm_90,compute_90")
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "library", lambda: pytest.fail("loading an artifact asked for NVRTC"))
        model = onnxc.load(path)
    images = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
    np.testing.assert_allclose(model(images), onnxc.compile(DIGITS)(images), atol=1e-5)
    assert isinstance(model, onnxc.CudaExecutable) and "probability" in command(capsys, "run", path)


def test_dumps_that_need_no_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    text = command(capsys, "dump", DIGITS, "--target", "cuda:sm_90", "--stage", "cuda")
    assert 'extern "C" __global__' in text and "shuffle_xor" in text and '// from "softmax"' in text
    one = command(capsys, "dump", DIGITS, "--target", "cuda:sm_90", "--stage", "cuda", "--kernel", "classify")
    assert one.count("__global__") == 1 and "arena" in command(capsys, "plan", DIGITS, "--target", "cuda:sm_90")
    assert "resources" in command(capsys, "dump", DIGITS, "--target", "cuda:sm_90", "--stage", "llvm", code=2)


@needs_nvrtc
def test_dumps_of_machine_code(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = ["--target", "cuda:sm_80,sm_90"]
    assert ".target sm_80" in command(capsys, "dump", DIGITS, *target, "--stage", "ptx", "--kernel", "softmax")
    table = command(capsys, "dump", DIGITS, *target, "--stage", "resources")
    assert "// sm_80" in table and "// sm_90" in table and "occupancy" in table
    command(capsys, "dump", DIGITS, "--target", "cuda:sm_90", "--all", "-o", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"cuda", "kernels", "ptx", "program.txt"}


@needs_nvrtc
def test_compiling_ahead_needs_no_gpu(tmp_path: Path) -> None:
    path = tmp_path / "digits.onnxc"
    done = subprocess.run(
        [sys.executable, "-m", "onnxc", "compile", DIGITS, "-o", str(path), "--target", "cuda:sm_80,compute_80"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from onnxc.compiler.artifact import read

    code = read(path).device
    assert code is not None and set(code.images) == {"sm_80", "compute_80"}
    assert all(image[:4] == b"\x7fELF" for image in code.images["sm_80"].values())
    assert all(b".entry" in image for image in code.images["compute_80"].values())


def test_without_a_driver_it_says_what_to_install() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        arguments = [sys.executable, "-m", "onnxc", "run", DIGITS, "--target", "cuda"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 4 and "install" in done.stderr
    else:
        pytest.skip("a driver is there: its own or the one that other tests run on")


def test_what_cannot_be_written_is_refused_before_compiling(capsys: pytest.CaptureFixture[str]) -> None:
    assert ".onnxc" in command(capsys, "compile", DIGITS, "-o", "digits.so", "--target", "cuda", code=2)
    assert "sm_90" in command(capsys, "compile", DIGITS, "-o", "x.onnxc", "--target", "cuda:sm_12", code=4)
