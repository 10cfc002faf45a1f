"""The recorded times and the README's table of them."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from onnxc.tools.bench import table
from onnxc.tools.bench.catalogue import CATALOGUE

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_tells_what_is_recorded() -> None:
    record = json.loads(table.RECORD.read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    assert table.PART.renewed(text, table.markdown(record)) == text, "run `make bench`, or the table with --only-write"
    known = {row.key for row in table.rows(list(CATALOGUE), (1, 2))}
    assert set(record["rows"]) <= known


def test_rows_are_threads_batches_and_precisions() -> None:
    found = [row.key for row in table.rows(["resnet50", "mlp"], (1, 2))]
    assert found == [
        "resnet50 threads=1", "resnet50 threads=2", "resnet50 threads=1 batch=8", "resnet50 threads=1 bf16",
        "mlp threads=1", "mlp threads=2",
    ]  # fmt: skip


def test_a_model_is_measured_recorded_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model that needs no PyTorch, against ONNX Runtime alone."""
    document, record = tmp_path / "README.md", tmp_path / "record.json"
    document.write_text(f"before\n{table.PART.begin}\nold\n{table.PART.end}\nafter\n")
    monkeypatch.setattr(table, "RECORD", record)
    monkeypatch.setattr(table, "OTHERS", ("onnxruntime",))
    monkeypatch.setenv("ONNXC_MODEL_CACHE", str(tmp_path))
    arguments = [str(document), "squeezenet", "--rounds", "1", "--seconds", "0.01", "--threads", "1,2"]
    result = CliRunner().invoke(table.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    row, two = json.loads(record.read_text())["rows"].values()
    own, other = row["engines"]["onnxc"], row["engines"]["onnxruntime"]
    assert own["ms"] > 0 and other["ratio"] == pytest.approx(other["ms"] / own["ms"], rel=1e-3)
    compiled = two["engines"]["onnxc"]
    assert own["differs"] < 5e-4 and compiled["cold"] > compiled["load"] > 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert f"| SqueezeNet | {own['ms']:.3g} | {other['ratio']:.2f} |" in text
    assert f"| {compiled['cold']:.1f} | {compiled['load']:.2f} |" in text
