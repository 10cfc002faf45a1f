"""Random operators: other numbers in each run where a model gives no seed, the same where it does; in loops, in saved
artifacts, in native code, and the same number wherever a run computes one anew."""

from __future__ import annotations

import ctypes
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from onnx import TensorProto, helper
from onnxc.compiler.native import write_native
from single_node import model_of

SIZE = 64


def uniform(**attributes: Any) -> onnx.ModelProto:
    names = ["a", "b"]
    nodes = [helper.make_node("RandomUniform", [], [name], shape=[SIZE], **attributes) for name in names]
    return model_of(nodes, {}, {}, names)


@pytest.mark.parametrize("target", ("host", "cuda"))
def test_runs_differ(target: str, request: pytest.FixtureRequest) -> None:
    if target == "cuda":
        request.getfixturevalue("gpu")
    model = onnxc.compile(uniform(), target=target)
    runs = [model.run({}) for _ in range(4)]
    runs += [onnxc.compile(uniform(), target=target).run({})]  # another program, the same code
    vectors = [run[name] for run in runs for name in "ab"]
    for k, vector in enumerate(vectors):
        assert 0.3 < vector.mean() < 0.7
        assert all(np.mean(vector == other) < 0.1 for other in vectors[:k])


@pytest.mark.parametrize("target", ("host", "cuda"))
def test_seed(target: str, request: pytest.FixtureRequest) -> None:
    """One seed gives one vector, in each run and in each node."""
    if target == "cuda":
        request.getfixturevalue("gpu")
    model = onnxc.compile(uniform(seed=3.0), target=target)
    first, second = model.run({}), model.run({})
    for run in (first, second):
        np.testing.assert_array_equal(run["a"], first["a"])
        np.testing.assert_array_equal(run["b"], first["a"])


def test_saved(tmp_path: Path) -> None:
    onnxc.compile(uniform()).save(tmp_path / "model.onnxc")
    one, other = onnxc.load(tmp_path / "model.onnxc"), onnxc.load(tmp_path / "model.onnxc")
    vectors = [one.run({})["a"], one.run({})["a"], other.run({})["a"]]
    assert not np.array_equal(vectors[0], vectors[1]) and not np.array_equal(vectors[0], vectors[2])


def test_native(tmp_path: Path) -> None:
    """Calls of native code differ too: its words lie in the library's memory."""
    if which("cc") is None:
        pytest.skip("there is no cc")
    write_native(onnxc.compile(uniform()).compiled, tmp_path / "model.so")
    library = ctypes.CDLL(str(tmp_path / "model.so"))
    library.model_arena_bytes.restype = ctypes.c_int64
    outputs = [np.zeros(SIZE, np.float32) for _ in range(2)]
    table = (ctypes.c_void_p * 2)(*(array.ctypes.data for array in outputs))
    sizes = (ctypes.c_int64 * 1)()
    arena = np.zeros(library.model_arena_bytes(sizes) + 64, np.uint8)
    place = ctypes.c_void_p(-(-arena.ctypes.data // 64) * 64)
    found = []
    for _ in range(3):
        assert library.model_run(None, table, sizes, place, 1) == 0
        found += [array.copy() for array in outputs]
    assert all(0.3 < vector.mean() < 0.7 for vector in found)
    assert len({vector.tobytes() for vector in found}) == 6


@pytest.mark.parametrize("target", ("host", "cuda"))
def test_iterations_differ(target: str, request: pytest.FixtureRequest) -> None:
    if target == "cuda":
        request.getfixturevalue("gpu")
    body = helper.make_graph(
        [
            helper.make_node("RandomNormal", [], ["drawn"], shape=[SIZE]),
            helper.make_node("Add", ["state", "drawn"], ["next"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [SIZE]),
        ],
        [helper.make_empty_tensor_value_info(name) for name in ("on", "next", "drawn")],
    )
    nodes = [helper.make_node("Loop", ["trips", "", "x"], ["sum", "all"], body=body)]
    inputs = {"x": np.zeros(SIZE, np.float32)}
    model = onnxc.compile(model_of(nodes, inputs, {"trips": np.array(5)}, ["sum", "all"]), target=target)
    runs = [model.run(inputs) for _ in range(2)]
    for run in runs:
        np.testing.assert_allclose(run["all"].sum(0), run["sum"], rtol=1e-5, atol=1e-5)
    rows = np.concatenate([run["all"] for run in runs])
    correlation = np.corrcoef(rows) - np.eye(10)
    assert abs(correlation).max() < 6 / np.sqrt(SIZE)


def dropout(symbolic: bool, ratio: float, **attributes: Any) -> onnx.ModelProto:
    """Dropout whose result and mask are used by operators of their own, and by ones that need a whole row."""
    nodes = [
        helper.make_node("Dropout", ["x", "ratio", "training"], ["y", "mask"], **attributes),
        helper.make_node("Softmax", ["y"], ["s"]),
        helper.make_node("Transpose", ["y"], ["t"]),
    ]
    inputs = {"x": np.zeros((200, 300), np.float32), "training": np.array(True)}
    outputs = ["y", "mask", "s", "t"]
    return model_of(nodes, inputs, {"ratio": np.array(ratio, np.float32)}, outputs, symbolic)


@pytest.mark.parametrize("ratio", (0.0, 0.25, 0.9))
@pytest.mark.parametrize("symbolic", (False, True))
def test_dropout(symbolic: bool, ratio: float) -> None:
    """The share that is kept, its scale, and that all who read the result see the same elements."""
    x = np.random.default_rng(0).normal(size=(200, 300)).astype(np.float32) + 9
    model = onnxc.compile(dropout(symbolic, ratio))
    masks = []
    for _ in range(2):
        found = model.run({"x": x, "training": np.array(True)})
        y, mask = found["y"], found["mask"]
        masks.append(mask)
        assert abs(mask.mean() - (1 - ratio)) < 6 * np.sqrt(ratio * (1 - ratio) / mask.size) + 1e-9
        np.testing.assert_allclose(y, np.where(mask, x / (1 - np.float32(ratio)), 0), rtol=1e-6)
        np.testing.assert_array_equal(found["t"], y.T)
        e = np.exp(y - y.max(1, keepdims=True))
        np.testing.assert_allclose(found["s"], e / e.sum(1, keepdims=True), rtol=1e-4, atol=1e-7)
    assert ratio == 0 or not np.array_equal(*masks)
    inference = model.run({"x": x, "training": np.array(False)})
    np.testing.assert_array_equal(inference["y"], x)
    assert inference["mask"].all()


def test_gradient_of_dropout() -> None:
    """The gradient goes where the result came from."""
    nodes = [
        helper.make_node("Dropout", ["x", "ratio", "training"], ["y", "mask"]),
        helper.make_node("Gradient", ["x"], ["d"], domain="ai.onnx.preview.training", xs=["x"], y="y"),
    ]
    x = np.ones((40, 50), np.float32)
    constants = {"ratio": np.array(0.5, np.float32), "training": np.array(True)}
    model = model_of(nodes, {"x": x}, constants, ["y", "d", "mask"], True)
    model.opset_import.append(helper.make_opsetid("ai.onnx.preview.training", 1))
    found = onnxc.compile(model).run({"x": x})
    np.testing.assert_array_equal(found["d"], found["y"])
    np.testing.assert_array_equal(found["d"], 2 * found["mask"])


def test_statistics_over_runs() -> None:
    """What many runs draw at one place is as random as what one run draws."""
    nodes = [
        helper.make_node("RandomNormal", [], ["n"], shape=[4]),
        helper.make_node("Bernoulli", ["p"], ["b"]),
        helper.make_node("Multinomial", ["l"], ["m"], sample_size=1),
    ]
    share = np.array([0.2, 0.5, 0.3], np.float32)
    inputs = {"p": np.array([0.1, 0.5, 0.9], np.float32), "l": np.log(share).reshape(1, 3)}
    model = onnxc.compile(model_of(nodes, inputs, {}, ["n", "b", "m"]))
    runs = [model.run(inputs) for _ in range(3000)]
    normal = np.stack([run["n"] for run in runs])
    assert abs(normal.mean(0)).max() < 6 / np.sqrt(3000)
    assert abs(normal.var(0) - 1).max() < 6 * np.sqrt(2 / 3000)
    assert abs(np.corrcoef(normal[:-1, 0], normal[1:, 0])[0, 1]) < 6 / np.sqrt(3000)
    hits = np.stack([run["b"] for run in runs]).mean(0)
    assert abs(hits - inputs["p"]).max() < 6 * 0.5 / np.sqrt(3000)
    classes = np.bincount(np.concatenate([run["m"].reshape(-1) for run in runs]), minlength=3) / 3000
    assert abs(classes - share).max() < 6 * 0.5 / np.sqrt(3000)
