"""Open sizes that are broadcast: equal as a rule, 1 in some runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import onnxc
import pytest
from onnxc.ir.errors import BroadcastError

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
    added (float[a, b] x, float[c, d] y) => (float[e, f] z, float[g] total) {
        z = Add (x, y)
        axes = Constant <value_ints = [1]> ()
        total = ReduceSum <keepdims = 0> (z, axes)
    }
"""
SHAPES = [((3, 4), (3, 4)), ((3, 4), (1, 4)), ((1, 4), (3, 1)), ((1, 1), (5, 2)), ((2, 1), (2, 7)), ((1, 1), (1, 1))]


def check(executable: onnxc.Executable, x: np.ndarray, y: np.ndarray) -> None:
    z, total = executable(x, y)
    np.testing.assert_array_equal(z, x + y)
    np.testing.assert_allclose(total, (x + y).sum(1), rtol=1e-6)
    assert set(executable.run({"y": y, "x": x})) == {"z", "total"}


def test_any_sizes_that_broadcast() -> None:
    executable = onnxc.compile(onnx.parser.parse_model(TEXT))
    random = np.random.default_rng(0)
    for first, second in SHAPES * 2:
        check(executable, random.random(first, np.float32), random.random(second, np.float32))
    with pytest.raises(onnxc.ShapeError, match="the model needs b = d"):
        executable(np.ones((3, 4), np.float32), np.ones((3, 5), np.float32))


def test_from_the_cache_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXC_CACHE_DIR", str(tmp_path / "cache"))
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "m.onnx")
    for _ in range(2):
        executable = onnxc.compile(tmp_path / "m.onnx")
        check(executable, np.ones((3, 1), np.float32), np.ones((3, 4), np.float32))


def test_an_artifact_says_what_it_takes_for_granted(tmp_path: Path) -> None:
    onnxc.compile(onnx.parser.parse_model(TEXT)).save(tmp_path / "m.onnxc")
    loaded = onnxc.load(tmp_path / "m.onnxc")
    check(loaded, np.ones((3, 4), np.float32), np.ones((3, 4), np.float32))
    with pytest.raises(BroadcastError, match="the model needs a = c"):
        loaded(np.ones((1, 4), np.float32), np.ones((3, 4), np.float32))


def test_on_a_gpu(gpu: None) -> None:
    executable = onnxc.compile(onnx.parser.parse_model(TEXT), target="cuda")
    check(executable, np.ones((1, 4), np.float32), np.ones((3, 4), np.float32))
