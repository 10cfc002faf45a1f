"""Mutants of a model on the command line: an exit code and one line, never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.mutations import mutated
from onnxc.tools import cli
from onnxc.tools.cli import BAD_MODEL, BAD_USAGE, UNSUPPORTED

DEMO = Path(cli.__file__).parent / "digits.onnx"


@pytest.mark.parametrize("first", [0, 20])
def test_mutants_end_with_one_line(
    first: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXC_MODEL_CACHE_BYTES", "0")
    path, codes = tmp_path / "mutant.onnx", []
    for seed in range(first, first + 20):
        path.write_bytes(mutated(DEMO.read_bytes(), seed))
        codes.append(cli.run(["dump" if seed % 2 else "run", str(path), "--threads", "1", "--max-memory", "500M"]))
        told = capfd.readouterr().err
        # A size that `run` has to guess may be one that the mutant does not take: there --dim is missing.
        assert codes[-1] in (0, BAD_USAGE, BAD_MODEL, UNSUPPORTED), f"seed {seed}: exit code {codes[-1]}, {told}"
        if codes[-1]:
            errors = [line for line in told.splitlines() if not line.startswith("image: ")]
            assert len(errors) == 1, f"seed {seed}: {told}"
            assert errors[0].startswith("error: "), f"seed {seed}: {told}"
    assert BAD_MODEL in codes


def test_a_model_that_asks_for_more_memory_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["run"], ["dump", "--stage", "kernels"], ["plan"]):
        assert cli.run([*command, str(DEMO), "--max-memory", "1K"]) == UNSUPPORTED
        assert "the limit is 1 KB: max_memory= (--max-memory) sets another" in capfd.readouterr().err
    assert cli.run(["run", str(DEMO), "--max-memory", "lots"]) == 2


def test_a_model_that_contradicts_itself_is_a_bad_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import onnx
    from small_models import model_of_text

    onnx.save(model_of_text("g (float[2, 3] x) => (float[2, 2] y) { y = MatMul (x, x) }"), tmp_path / "m.onnx")
    assert cli.run(["run", str(tmp_path / "m.onnx")]) == BAD_MODEL
    assert "MatMul" in capfd.readouterr().err
