"""TfIdfVectorizer against the reference: all modes, lengths, skips, rows of any length, columns in any order."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxc
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

GRAMS = ([2, 3, 5, 4], [5, 6, 7, 8, 6, 7], [2, 3, 5, 5, 6, 7])


def model_of(x: Any, symbolic: bool, **changes: Any) -> Any:
    counts = [0, 4, 10]
    attributes: dict[str, Any] = {
        "min_gram_length": 1, "max_gram_length": 3, "max_skip_count": 2, "mode": "TF", "ngram_counts": counts,
        "ngram_indexes": [3, 1, 0, 8, 4, 2, 6, 5, 7], "pool_int64s": [item for gram in GRAMS for item in gram],
    }  # fmt: skip
    node = helper.make_node("TfIdfVectorizer", ["x"], ["y"], **(attributes | changes))
    shape = [f"d{axis}" for axis in range(x.ndim)] if symbolic else list(x.shape)
    value = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), shape)
    graph = helper.make_graph([node], "node", [value], [helper.make_empty_tensor_value_info("y")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def check(x: Any, symbolic: bool, target: str = "host", **changes: Any) -> None:
    model = model_of(x, symbolic, **changes)
    (found,) = onnxc.compile(model, target=target).run({"x": x}).values()
    if "weights" not in changes:  # the reference fails without them
        model = model_of(x, symbolic, **changes, weights=[1.0] * 9)
    (wanted,) = ReferenceEvaluator(model).run(None, {"x": x})
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def rows(*shape: int, dtype: Any = np.int64) -> Any:
    return np.random.default_rng(sum(shape)).integers(2, 9, shape).astype(dtype)


@pytest.mark.parametrize("symbolic", (False, True))
@pytest.mark.parametrize("dtype", (np.int32, np.int64))
@pytest.mark.parametrize("shape", ((12,), (3, 20), (4, 1), (2, 2)))
def test_counts(shape: tuple[int, ...], dtype: Any, symbolic: bool) -> None:
    check(rows(*shape, dtype=dtype), symbolic)


@pytest.mark.parametrize("mode", ("TF", "IDF", "TFIDF"))
@pytest.mark.parametrize("weights", (False, True))
def test_modes(mode: str, weights: bool) -> None:
    changes = {"weights": np.linspace(-1, 2, 9).tolist()} if weights else {}
    check(rows(5, 14), True, mode=mode, **changes)


@pytest.mark.parametrize("lengths", ((1, 1), (2, 2), (2, 3), (3, 3)))
@pytest.mark.parametrize("skips", (0, 5))
def test_lengths(lengths: tuple[int, int], skips: int) -> None:
    check(rows(5, 14), False, min_gram_length=lengths[0], max_gram_length=lengths[1], max_skip_count=skips)


def test_columns_of_several() -> None:
    """Two n-grams that count in one column."""
    check(rows(5, 14), False, ngram_indexes=[0, 1, 1, 3, 3, 2, 0, 6, 6])


def test_on_gpu(gpu: None) -> None:
    check(rows(3, 12), True, target="cuda", mode="TFIDF", weights=np.linspace(0, 2, 9).tolist())
