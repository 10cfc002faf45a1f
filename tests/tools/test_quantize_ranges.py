"""Ranges from histograms, weights as integers: against numpy on the values themselves."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxc.tools.quantize.ranges import BINS, Histogram, grid_of, range_of, signal_to_noise
from onnxc.tools.quantize.settings import QuantizationError, Settings
from onnxc.tools.quantize.weights import four_bits, in_blocks, quantised

Array = NDArray[Any]
FLOATS = st.floats(-1e6, 1e6, width=32)


def histogram_of(*parts: Array) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


def mean_square_error(values: Array, settings: Settings) -> float:
    grid = range_of(histogram_of(values), settings)
    return float(np.mean((grid.rounded(values) - values) ** 2))


@given(st.lists(arrays(np.float32, array_shapes(min_side=0), elements=FLOATS), min_size=1, max_size=4))
def test_histograms_count_everything_in_any_portions(parts: list[Array]) -> None:
    whole = np.concatenate([part.ravel() for part in parts])
    one, many = histogram_of(whole), histogram_of(*parts)
    assert one.counts.sum() == many.counts.sum() == whole.size
    assert (one.low, one.high, one.exponent) == (many.low, many.high, many.exponent)
    if whole.size:
        assert (one.low, one.high) == (whole.min(), whole.max())
    merged = histogram_of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(histogram_of(part))
    assert np.array_equal(merged.counts, many.counts)


def test_bins_that_were_doubled_hold_the_same_as_wide_ones() -> None:
    random = np.random.default_rng(0)
    small, large = random.normal(size=10000).astype(np.float32), random.normal(size=1000).astype(np.float32) * 100
    grown, wide = histogram_of(small, large), histogram_of(large, small)
    assert np.array_equal(grown.counts, wide.counts)
    assert np.count_nonzero(wide.counts) < BINS


def test_infinities_and_nan_are_left_out() -> None:
    histogram = histogram_of(np.array([1, -np.inf, np.nan, 2, np.inf], np.float32))
    assert (histogram.low, histogram.high, histogram.counts.sum()) == (1, 2, 2)
    assert not histogram_of(np.array([np.nan], np.float32)).seen


@given(
    low=st.floats(-1e4, 0), high=st.floats(0, 1e4), activations=st.sampled_from(("u8", "i8")), symmetric=st.booleans()
)
def test_grids_hold_zero_and_the_range(low: float, high: float, activations: str, symmetric: bool) -> None:
    grid = grid_of(low, high, Settings(activations=activations, symmetric=symmetric))
    assert grid.rounded(np.zeros(1))[0] == 0
    assert grid.least <= grid.zero <= grid.most
    if high - low > 1e-30:
        slack = 0.51 * float(grid.scale)
        assert grid.low <= low + slack and high - slack <= grid.high


def test_min_max_takes_the_whole_range_and_percentile_leaves_out_the_ends() -> None:
    values = np.concatenate([np.linspace(-1, 3, 100000), [50.0, -40.0]]).astype(np.float32)
    histogram = histogram_of(values)
    whole = range_of(histogram, Settings(method="minmax"))
    assert (whole.low, whole.high) == pytest.approx((-40, 50), abs=0.3)
    inner = range_of(histogram, Settings(method="percentile", percentile=99.99))
    assert (inner.low, inner.high) == pytest.approx((-1, 3), abs=0.05)
    assert range_of(histogram, Settings(method="percentile", percentile=100)).high == pytest.approx(50, abs=0.3)


@pytest.mark.parametrize("shape", ["normal", "heavy", "positive"])
def test_mse_is_about_the_best_range_there_is(shape: str) -> None:
    random = np.random.default_rng(0)
    values = {
        "normal": lambda: random.normal(size=20000),
        "heavy": lambda: random.standard_t(3, size=20000),
        "positive": lambda: np.maximum(random.laplace(size=20000) - 1, 0),
    }[shape]().astype(np.float32)
    best = min(
        float(np.mean((grid.rounded(values) - values) ** 2))
        for share in np.linspace(0.05, 1, 100)
        for grid in [grid_of(values.min() * share, values.max() * share, Settings())]
    )
    found = mean_square_error(values, Settings(method="mse"))
    assert found <= 1.05 * best
    assert found <= mean_square_error(values, Settings(method="minmax")) * 1.001


def test_entropy_clips_outliers_and_keeps_what_has_none() -> None:
    random = np.random.default_rng(0)
    values = np.append(random.normal(size=100000), 100.0).astype(np.float32)
    assert range_of(histogram_of(values), Settings(method="entropy")).high < 20
    flat = random.uniform(0, 1, 100000).astype(np.float32)
    assert range_of(histogram_of(flat), Settings(method="entropy")).high > 0.9


@pytest.mark.parametrize("method", ["mse", "minmax", "percentile", "entropy"])
@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0], [5.0], [-3.0], [1e-40], [1e30, -1e30]], ids=str)
def test_degenerate_values_have_a_range(method: str, values: list[float]) -> None:
    grid = range_of(histogram_of(np.array(values, np.float32)), Settings(method=method))
    assert np.isfinite(grid.scale) and grid.scale > 0
    rounded = grid.rounded(np.array(values))
    assert np.all(np.abs(rounded - values) <= np.maximum(0.02 * np.abs(values), 1e-30))


def test_signal_to_noise_is_that_of_the_values() -> None:
    values = np.random.default_rng(0).normal(size=100000).astype(np.float32)
    histogram = histogram_of(values)
    grid = range_of(histogram, Settings())
    truth = 10 * np.log10(np.sum(values**2) / np.sum((grid.rounded(values) - values) ** 2))
    assert signal_to_noise(histogram, grid) == pytest.approx(truth, abs=0.3)
    assert signal_to_noise(histogram_of(np.zeros(4, np.float32)), grid) == np.inf


# --- weights --------------------------------------------------------------------------------------------------------


@given(
    arrays(np.float32, array_shapes(min_dims=2, max_dims=4, max_side=6), elements=st.floats(-1e3, 1e3, width=32)),
    st.data(),
)
def test_weights_are_within_half_a_step(weights: Array, data: st.DataObject) -> None:
    axis = data.draw(st.one_of(st.none(), st.integers(0, weights.ndim - 1)))
    found = quantised(weights, axis)
    scale = found.scale if axis is None else np.expand_dims(found.scale, [a for a in range(weights.ndim) if a != axis])
    assert found.values.dtype == np.int8 and np.abs(found.values.astype(int)).max(initial=0) <= 127
    assert np.all(np.abs(found.floats - weights) <= 0.5001 * scale + 1e-30)


@given(
    arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 5)), elements=st.floats(-100, 100, width=32)),
    st.booleans(),
    st.sampled_from((16, 32)),
    st.integers(0, 1),
)
def test_blocks_are_as_near_as_with_the_whole_range(weights: Array, symmetric: bool, block: int, axis: int) -> None:
    found = in_blocks(weights, axis, block, symmetric)
    length = weights.shape[axis]
    count = -(-length // block)
    assert found.scale.shape[axis] == count

    def per_element(blocks: Array) -> Array:
        return np.take(np.repeat(blocks, block, axis), range(length), axis)

    zero = 0 if found.zero is None else per_element(found.zero)
    floats = (found.values - zero) * per_element(found.scale)
    low, high = np.minimum(weights, 0), np.maximum(weights, 0)
    for index in range(count):
        part = [slice(None)] * 2
        part[axis] = slice(index * block, (index + 1) * block)
        place = tuple(part)
        step = np.max(high[place], axis) - np.min(low[place], axis)
        plain = (0.5 * step / (7 if symmetric else 15)) ** 2 * weights[place].shape[axis]
        assert np.all(np.sum((floats - weights)[place] ** 2, axis) <= 4 * plain + 1e-12)


@pytest.mark.parametrize("signed", [True, False])
def test_four_bit_tensors_are_read_by_onnx(signed: bool) -> None:
    values = np.random.default_rng(0).integers(-8 if signed else 0, 8 if signed else 16, (3, 5)).astype(np.int8)
    read = numpy_helper.to_array(four_bits(values, signed))
    assert read.dtype == (ml_dtypes.int4 if signed else ml_dtypes.uint4)
    assert np.array_equal(read.astype(np.int8), values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "best"}, "method is 'best': it can be mse"),
        ({"activations": "i16"}, "activations is 'i16'"),
        ({"dynamic": True, "weights_only": "int8"}, "in one of these ways"),
        ({"percentile": 10.0}, "percentile"),
        ({"block": 48}, "power of two"),
        ({"samples": 0}, "samples is 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        Settings(**settings)
