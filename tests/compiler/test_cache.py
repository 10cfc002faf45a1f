"""The second compile of a model file is a load; whatever changed makes it a compile again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxc
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxc.compiler import driver
from onnxc.compiler.cache import ModelCache
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
    """Of one thread: how many there are decides the code, and what a process may use can change."""
    return float(onnxc.compile(path, threads=1, **options)(np.ones((2, 300), np.float32))[1, 299])


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
    (entry,) = (tmp_path / "cache" / "models").glob("*.onnxc")
    entry.write_bytes(entry.read_bytes()[:-100])
    assert result(path) == 3
    assert len(compiles) == 2


def test_external_data_decides_too(tmp_path: Path, compiles: list[object]) -> None:
    path = write(tmp_path / "m.onnx", 3, external=True)
    assert [result(path) for _ in range(2)] == [3, 3]
    assert len(compiles) == 1
    data = tmp_path / "weights.bin"
    data.write_bytes(np.full(300, 5, np.float32).tobytes())
    assert [result(path) for _ in range(2)] == [5, 5]
    assert len(compiles) == 2
    data.unlink()
    with pytest.raises(onnxc.ModelError, match=r"weights\.bin"):
        onnxc.compile(path)


def test_a_model_given_as_bytes_is_known_by_its_content(tmp_path: Path, compiles: list[object]) -> None:
    content = write(tmp_path / "m.onnx", 3).read_bytes()
    other = write(tmp_path / "m.onnx", 4).read_bytes()
    for model, expected in ((content, 3), (other, 4), (content, 3), (bytearray(other), 4)):
        assert float(onnxc.compile(bytes(model), threads=1)(np.ones((1, 300), np.float32))[0, 0]) == expected
    assert len(compiles) == 2


def test_what_is_damaged_beside_an_entry(tmp_path: Path, compiles: list[object]) -> None:
    path = write(tmp_path / "m.onnx", 3)
    assert result(path) == 3
    (sources,) = (tmp_path / "cache" / "models").glob("*.files")
    for content in (b"", b"[1]", b"{", b'["../gone"]'):
        sources.write_bytes(content)
        assert result(path) == 3
    assert len(compiles) == 5
    assert sources.read_bytes() == b"[]"


def test_processes_share_the_folder(tmp_path: Path) -> None:
    """Some at once compile the same models while others throw away what is found."""
    paths = [write(tmp_path / f"{factor}.onnx", factor) for factor in (2, 3)]
    code = """
import sys, numpy as np, onnxc
from onnxc.compiler.cache import ModelCache
for turn in range(6):
    for factor, path in enumerate(sys.argv[2:], 2):
        assert onnxc.compile(path)(np.ones((1, 300), np.float32))[0, 0] == factor
    if sys.argv[1] == "prune":
        ModelCache.default().prune(0)
"""
    environment = os.environ | {"ONNXC_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    started = [
        subprocess.Popen([*command, kind, *map(str, paths)], env=environment, stderr=subprocess.PIPE, text=True)
        for kind in ("keep", "prune", "keep")
    ]
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors


def test_files_left_unfinished_go(tmp_path: Path, compiles: list[object]) -> None:
    cache = ModelCache(tmp_path / "models", 1 << 20)
    cache.folder.mkdir()
    old, young, foreign = (cache.folder / name for name in (".k.onnxc.ab", ".l.onnxc.cd", ".hidden"))
    for file in (old, young, foreign):
        file.write_bytes(bytes(10))
    os.utime(old, (0, 0))
    os.utime(foreign, (0, 0))
    assert cache.prune() == 10
    assert sorted(file.name for file in cache.folder.iterdir()) == [".hidden", ".l.onnxc.cd"]


def test_entries_used_longest_ago_go(tmp_path: Path, compiles: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "a.onnx", 3)
    result(first)
    (entry,) = (tmp_path / "cache" / "models").glob("*.onnxc")
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
    (entry,) = (tmp_path / "cache" / "models").glob("*.onnxc")
    other = tmp_path / "cache" / "models" / "fetched"
    other.mkdir()
    os.utime(other, (0, 0))
    os.utime(entry, (1, 1))
    monkeypatch.setenv("ONNXC_MODEL_CACHE_BYTES", str(entry.stat().st_size + 10))
    result(write(tmp_path / "b.onnx", 4))
    assert not entry.exists()
    assert other.exists()
