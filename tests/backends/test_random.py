"""Random numbers: their streams, and their distributions by statistics with limits six standard deviations off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from single_node import Array, compiled, model_of, run_node

COUNT = 200_000


def drawn(op: str, dtype: int = TensorProto.FLOAT, seed: float | None = 3.0, **attributes: Any) -> Array:
    given = {} if seed is None else {"seed": seed}
    (found,) = run_node(op, {}, shape=[COUNT // 500, 500], dtype=dtype, **given, **attributes)
    return found.reshape(-1).astype(np.float64)


def moments(x: Array, mean: float, deviation: float, kurtosis: float) -> None:
    """Mean and variance within what chance allows."""
    assert abs(x.mean() - mean) < 6 * deviation / np.sqrt(x.size)
    assert abs(x.var() / deviation**2 - 1) < 6 * np.sqrt((kurtosis - 1) / x.size)


def uncorrelated(a: Array, b: Array) -> None:
    assert abs(np.corrcoef(a, b)[0, 1]) < 6 / np.sqrt(len(a))


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.DOUBLE])
def test_uniform(dtype: int) -> None:
    x = drawn("RandomUniform", dtype, low=-2.0, high=3.0)
    assert x.min() >= -2 and x.max() <= 3
    moments(x, 0.5, 5 / np.sqrt(12), 1.8)
    counts = np.histogram(x, 100, (-2, 3))[0]
    assert np.all(abs(counts - x.size / 100) < 6 * np.sqrt(x.size / 100))
    for distance in (1, 2, 16, 500):
        uncorrelated(x[:-distance], x[distance:])


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16])
def test_normal(dtype: int) -> None:
    x = drawn("RandomNormal", dtype, mean=1.5, scale=2.0)
    moments(x, 1.5, 2.0, 3.0)
    standard = (x - 1.5) / 2
    for limit, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        inside = (abs(standard) < limit).mean()
        assert abs(inside - share) < 6 * np.sqrt(share * (1 - share) / x.size) + 1e-3 * (dtype == TensorProto.FLOAT16)
    uncorrelated(x[:-1], x[1:])
    uncorrelated(abs(x[:-1]), abs(x[1:]))


def test_streams() -> None:
    """One seed gives one stream; other seeds, and nodes without one, give others."""
    first = drawn("RandomUniform", seed=1.0)
    np.testing.assert_array_equal(first, drawn("RandomUniform", seed=1.0))
    uncorrelated(first, drawn("RandomUniform", seed=2.0))
    nodes = [helper.make_node("RandomNormal", [], [name], shape=[COUNT]) for name in ("a", "b")]
    a, b = compiled(model_of(nodes, {}, {}, ["a", "b"]), {})
    uncorrelated(a, b)


@pytest.mark.parametrize("op", ["RandomNormalLike", "RandomUniformLike"])
def test_like(op: str) -> None:
    x = np.zeros((3, 70), np.float16)
    for attributes, dtype in (({}, np.float16), ({"dtype": TensorProto.DOUBLE}, np.float64)):
        (found,) = run_node(op, {"x": x}, symbolic=True, seed=1.0, **attributes)
        assert found.shape == x.shape and found.dtype == dtype and len(np.unique(found)) > 150


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_bernoulli(dtype: str) -> None:
    x = np.repeat(np.array([0, 0.1, 0.5, 0.9, 1]), COUNT // 5).astype(dtype)
    (found,) = run_node("Bernoulli", {"x": x}, dtype=TensorProto.INT32, seed=5.0)
    assert found.dtype == np.int32 and set(np.unique(found)) <= {0, 1}
    shares = found.reshape(5, -1).mean(1)
    for share, chance in zip(shares, [0, 0.1, 0.5, 0.9, 1], strict=True):
        assert abs(share - chance) <= 6 * np.sqrt(chance * (1 - chance) / (COUNT // 5)) + 1e-3 * (dtype == "float16")


@pytest.mark.parametrize("symbolic", [False, True])
def test_multinomial(symbolic: bool) -> None:
    chances = np.array([[0.1, 0.2, 0.3, 0.4], [0.97, 0.01, 0.02, 0.0], [0.25] * 4])
    x = (np.log(chances + 1e-30) + np.array([[0], [5], [-3]])).astype(np.float32)
    samples = 40_000
    (found,) = run_node("Multinomial", {"x": x}, symbolic=symbolic, sample_size=samples, seed=2.0)
    assert found.dtype == np.int32 and found.shape == (3, samples)
    for row, wanted in zip(found, chances, strict=True):
        shares = np.bincount(row, minlength=4) / samples
        assert np.all(abs(shares - wanted) <= 6 * np.sqrt(wanted * (1 - wanted) / samples))
    uncorrelated(found[0], found[2])
