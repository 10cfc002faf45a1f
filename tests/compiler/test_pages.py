"""Constants in large pages: the same values, one copy, and no page of a file is kept for them."""

from __future__ import annotations

import gc
import mmap
import re
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxc
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxc.compiler import pages
from onnxc.compiler.pages import PAGE_BYTES, LargePages, in_large_pages, room_for

linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large pages are asked for on Linux only")


@linux
def test_constants_are_copied_once() -> None:
    random = np.random.default_rng(0)
    arrays = {
        "a": random.standard_normal((700, 1000)).astype(np.float32),
        "b": np.arange(7, dtype=np.int64),
        "empty": np.zeros((0, 3), np.float16),
        "scalar": np.array(2.5),
        "transposed": random.standard_normal((300, 200)).T,
    }
    placed = in_large_pages(arrays)
    assert list(placed) == list(arrays)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype and array.shape == arrays[name].shape
        assert array.ctypes.data % pages.ALIGNMENT == 0 or not array.size
    assert placed["a"].ctypes.data % PAGE_BYTES == 0
    assert not np.shares_memory(placed["a"], arrays["a"])
    assert in_large_pages({"a": placed["a"], "b": placed["b"]})["a"] is placed["a"]


@linux
def test_small_constants_stay_where_they_are() -> None:
    arrays = {"a": np.ones(1000, np.float32)}
    assert in_large_pages(arrays) is arrays and room_for([]) is None


def test_small_constants_begin_with_a_line_of_the_caches() -> None:
    """Not in large pages, and not where numpy puts them: at 16 bytes behind such a line."""
    room = np.zeros(4096, np.uint8)
    for start in range(0, 80, 16):
        array = room[start : start + 400].view(np.float32).reshape(10, 10).T
        placed = pages.aligned(array)
        assert placed.ctypes.data % pages.ALIGNMENT == 0 and placed.flags.writeable
        np.testing.assert_array_equal(placed, array)
    path = Path(__file__).parents[2] / "tools" / "digits.onnx"
    model = onnxc.compile(path.read_bytes())
    assert all(array.ctypes.data % pages.ALIGNMENT == 0 for array in model.compiled.constants.values())


@linux
def test_memory_is_free_when_the_last_array_goes() -> None:
    room = room_for([PAGE_BYTES])
    assert room is not None
    gone = weakref.ref(room)
    array = room.put(np.ones(PAGE_BYTES, np.uint8))
    del room
    gc.collect()
    assert gone() is not None and array.sum() == PAGE_BYTES
    del array
    gc.collect()
    assert gone() is None


def resident_bytes(address: int) -> int:
    """Of the mapping that holds an address."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, last = (int(part, 16) for part in block.split(" ", 1)[0].split("-"))
        if first <= address < last:
            return int(re.search(r"Rss:\s+(\d+)", block)[1]) << 10  # type: ignore[index]
    raise AssertionError(f"{address:x} is not mapped")


@linux
def test_pages_of_a_file_are_let_go(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (1 << 14))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(memoryview(mapped)[100:], np.uint8)
    placed = in_large_pages({"w": array})["w"]
    assert resident_bytes(array.ctypes.data) < 1 << 20
    np.testing.assert_array_equal(placed, array)  # read again from the file


@linux
def test_files_are_let_go_while_they_are_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of mapped files, memmaps among them, and arrays that are no file's."""
    monkeypatch.setattr(pages, "LET_GO", 2 << 20)
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (1 << 14))
    array = np.memmap(path, np.uint8, "r")[100:].reshape(2, -1)
    files = pages.MappedFiles([array, array[1], np.ones(3)])
    total = int(array.sum())
    assert resident_bytes(array.ctypes.data) > 2 << 20
    files.used(1 << 20)
    assert resident_bytes(array.ctypes.data) > 2 << 20
    files.used(1 << 20)
    assert resident_bytes(array.ctypes.data) < 1 << 20
    assert int(array.sum()) == total


def product(path: Path) -> Path:
    """y = x @ w, with w of 4 MB."""
    weights = numpy_helper.from_array(np.random.default_rng(1).standard_normal((1024, 1024)).astype(np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1024]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@linux
def test_models_have_their_constants_in_large_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When compiled; when found in the cache or loaded from the first run on, but for `verify=False`, which maps it."""
    monkeypatch.setenv("ONNXC_CACHE_DIR", str(tmp_path / "cache"))
    path = product(tmp_path / "model.onnx")
    model = onnxc.compile(path)
    model.save(tmp_path / "model.onnxc")
    found = [model, onnxc.compile(path), onnxc.load(tmp_path / "model.onnxc")]
    lazy = onnxc.load(tmp_path / "model.onnxc", verify=False)
    x = np.random.default_rng(2).standard_normal((3, 1024)).astype(np.float32)
    for other in (*found[1:], lazy):
        np.testing.assert_array_equal(other(x), model(x))
    owners = [pages._owner(max(m.compiled.constants.values(), key=lambda a: a.nbytes)) for m in (*found, lazy)]
    assert [isinstance(owner, LargePages) for owner in owners] == [True, True, True, False]


def test_without_large_pages_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    arrays = {"a": np.ones(1 << 20, np.float32)}
    assert in_large_pages(arrays) is arrays
    assert sys.platform != "linux" or room_for([1 << 23]) is None
