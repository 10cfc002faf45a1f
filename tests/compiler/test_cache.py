"""The second compile of a model file is a load; whatever changed makes it a compile again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxc
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxc.compiler import driver
from onnxc.compiler.options import Model, Options


@pytest.fixture
def compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The models that were really compiled, in a cache of the test's own."""
    monkeypatch.setenv("ONNXC_CACHE_DIR", str(tmp_path / "cache"))
    found: list[object] = []
    compiled_model = driver._compiled_model

    def recorded(model: Model, options: Options) -> object:
        found.append(model)
        return compiled_model(model, options)

    monkeypatch.setattr(driver, "_compiled_model", recorded)
    return found


def write(path: Path, factor: float, external: bool = False) -> Path:
    """y = x * w, w a constant of 300 equal elements."""
    weights = numpy_helper.from_array(np.full(300, factor, np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 300]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


def result(path: Path, **options: object) -> float:
    return float(onnxc.compile(path, **options)(np.ones((2, 300), np.float32))[1, 299])


def test_the_second_compile_is_a_load(tmp_path: Path, compiles: list[object]) -> None:
    path = write(tmp_path / "m.onnx", 3)
    assert [result(path) for _ in range(3)] == [3, 3, 3]
    assert len(compiles) == 1
    assert result(path, dims={"n": 2}) == 3
    assert len(compiles) == 2


def test_a_changed_file_is_compiled_anew(tmp_path: Path, compiles: list[object]) -> None:
    path = write(tmp_path / "m.onnx", 3)
    assert result(path) == 3
    write(path, 4)
    assert result(path) == 4


def test_a_damaged_entry_is_absent(tmp_path: Path, compiles: list[object]) -> None:
    path = write(tmp_path / "m.onnx", 3)
    assert result(path) == 3
    (entry,) = (tmp_path / "cache" / "models").iterdir()
    entry.write_bytes(entry.read_bytes()[:-100])
    assert result(path) == 3
    assert len(compiles) == 2


def test_external_data_is_read_each_time(tmp_path: Path, compiles: list[object]) -> None:
    path = write(tmp_path / "m.onnx", 3, external=True)
    assert result(path) == 3
    data = tmp_path / "weights.bin"
    data.write_bytes(np.full(300, 5, np.float32).tobytes())
    assert result(path) == 5


def test_entries_used_longest_ago_go(tmp_path: Path, compiles: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "a.onnx", 3)
    result(first)
    (entry,) = (tmp_path / "cache" / "models").iterdir()
    os.utime(entry, (0, 0))
    monkeypatch.setenv("ONNXC_MODEL_CACHE_BYTES", str(entry.stat().st_size + 10))
    result(write(tmp_path / "b.onnx", 4))
    assert not entry.exists()
    monkeypatch.setenv("ONNXC_MODEL_CACHE_BYTES", "0")
    result(first)
    assert len(compiles) == 3


def test_a_folder_beside_the_entries_keeps_none(
    tmp_path: Path, compiles: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no entry is neither removed nor in the way of removing those that are."""
    result(write(tmp_path / "a.onnx", 3))
    (entry,) = (tmp_path / "cache" / "models").iterdir()
    other = tmp_path / "cache" / "models" / "fetched"
    other.mkdir()
    os.utime(other, (0, 0))
    os.utime(entry, (1, 1))
    monkeypatch.setenv("ONNXC_MODEL_CACHE_BYTES", str(entry.stat().st_size + 10))
    result(write(tmp_path / "b.onnx", 4))
    assert not entry.exists()
    assert other.exists()
