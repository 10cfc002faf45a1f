"""Calibration data from files, folders and functions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxc.compiler.binding import Port
from onnxc.tools.quantize.data import Samples
from onnxc.tools.quantize.settings import QuantizationError

X = Port("x", "f32", ("batch", 3))
ONE = Port("x", "f32", (1, 3))
FLAG = Port("flag", "i64", ())
STATE = Port("state", "f32", (2, "batch", 4))


def portions(data: Any, *ports: Port, **options: Any) -> list[dict[str, Any]]:
    return list(Samples(data, ports, **options))


def rows(count: int) -> Any:
    return np.arange(count * 3, dtype=np.float32).reshape(count, 3)


def test_an_open_first_axis_is_divided_into_batches() -> None:
    found = portions({"x": rows(5)}, X, batch=2)
    assert [feed["x"].shape for feed in found] == [(2, 3), (2, 3), (1, 3)]
    assert np.array_equal(np.concatenate([feed["x"] for feed in found]), rows(5))


def test_a_fixed_batch_takes_one_after_another() -> None:
    for array in (rows(5), rows(5)[:, None]):  # as many batches, or a further axis
        found = portions({"x": array, "flag": np.array(7)}, ONE, FLAG)
        assert [feed["x"].shape for feed in found] == [(1, 3)] * 5
        assert all(feed["flag"] == 7 for feed in found)
        assert np.array_equal(found[3]["x"], rows(5)[3:4])


def test_each_sample_may_have_its_own_scalar() -> None:
    found = portions({"x": rows(3)[:, None], "flag": np.array([1, 2, 3])}, ONE, FLAG)
    assert [int(feed["flag"]) for feed in found] == [1, 2, 3]


def test_a_batch_that_stands_elsewhere_too_stays_whole() -> None:
    feed = {"x": rows(5), "state": np.zeros((2, 5, 4), np.float32)}
    (found,) = portions(feed, X, STATE)
    assert found["x"].shape == (5, 3) and found["state"].shape == (2, 5, 4)


def test_samples_are_drawn_by_the_seed() -> None:
    first, again = (portions({"x": rows(100)}, X, limit=10, seed=1, batch=10)[0]["x"] for _ in range(2))
    other = portions({"x": rows(100)}, X, limit=10, seed=2, batch=10)[0]["x"]
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(first) == 10 and np.all(np.diff(first[:, 0]) > 0)


def test_integers_become_the_floats_that_are_wanted() -> None:
    (found,) = portions({"x": np.ones((1, 3), np.uint8)}, ONE)
    assert found["x"].dtype == np.float32


def test_files_and_folders(tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", rows(2))
    np.savez(tmp_path / "a.npz", x=rows(1) + 100)
    (tmp_path / "notes.txt").write_text("not data")
    found = portions(tmp_path, X, batch=4)
    assert [len(feed["x"]) for feed in found] == [1, 2]  # in the order of names
    assert found[0]["x"][0, 0] == 100
    assert [len(feed["x"]) for feed in portions(str(tmp_path / "b.npy"), X, batch=4)] == [2]
    assert len(portions(tmp_path, X, limit=1)) in (1, 2)


def test_the_only_array_is_for_the_only_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=rows(2))
    assert portions(tmp_path / "a.npz", X, batch=2)[0]["x"].shape == (2, 3)


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mydata.py").write_text(
        "import numpy as np\n"
        "def batches():\n    for k in range(4):\n        yield {'x': np.full((1, 3), k, np.float32)}\n"
        "def plain():\n    return [np.zeros((1, 3), np.float32)]\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mydata", raising=False)
    assert [feed["x"][0, 0] for feed in portions("mydata:batches", X)] == [0, 1, 2, 3]
    assert len(portions("mydata:batches", X, limit=2)) == 2
    assert portions("mydata:plain", X)[0]["x"].shape == (1, 3)
    for name, message in (("missing", "no attribute"), ("number", "is no function")):
        with pytest.raises(QuantizationError, match=message):
            portions(f"mydata:{name}", X)
    with pytest.raises(QuantizationError, match="No module named"):
        portions("nosuchmodule:f", X)


@pytest.mark.parametrize(
    ("data", "ports", "message"),
    [
        ({"y": rows(1)}, (X,), "no array for the input x.*it has y"),
        ({"x": np.zeros((2, 4), np.float32)}, (X,), r"has the shape \[2, 4\]"),
        ({"x": np.zeros((1, 3), complex)}, (X,), "convert it"),
        ({"x": rows(3)[:, None], "flag": np.array([1, 2])}, (ONE, FLAG), "as many samples"),
        ({"x": np.zeros((0, 3), np.float32)}, (X,), "no sample"),
        ({"x": rows(1), "flag": np.array(1.5)}, (X, FLAG), "convert it"),
        ([rows(1)], (X, FLAG), "which input"),
        ("no/such/file.npz", (X,), "no such file"),
    ],
    ids=["missing", "shape", "complex", "counts", "empty", "type", "unnamed", "path"],
)
def test_data_that_does_not_suit(data: Any, ports: tuple[Port, ...], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        portions(data, *ports)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"nonsense")
    with pytest.raises(QuantizationError, match="cannot be read"):
        portions(tmp_path / "a.npz", X)
    (tmp_path / "folder").mkdir()
    with pytest.raises(QuantizationError, match="no file that is read"):
        portions(tmp_path / "folder", X)
    (tmp_path / "a.csv").write_text("1")
    with pytest.raises(QuantizationError, match="data is read from"):
        portions(tmp_path / "a.csv", X)
