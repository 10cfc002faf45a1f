"""DFT and STFT against numpy, for lengths of all kinds of factors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxc.backends.kernels.fourier import radices
from single_node import Array, run_node

TOLERANCE = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-12}


def parts(x: Array, count: int = 2) -> Array:
    """Complex numbers as ONNX stores them."""
    return np.stack([x.real, x.imag][:count], -1)


def samples(shape: tuple[int, ...], dtype: str, count: int, seed: int) -> tuple[Array, Array]:
    """Numbers in ONNX's form, and as numpy has them."""
    x = np.random.default_rng(seed).standard_normal((*shape, count)).astype(dtype)
    return x, x[..., 0] + (1j * x[..., 1] if count == 2 else 0)


def check(found: Array, wanted: Array, length: int) -> None:
    tolerance = TOLERANCE[found.dtype] * math.sqrt(length)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


@given(st.integers(1, 5000))
def test_factors(length: int) -> None:
    assert math.prod(radices(length)) == length


LENGTHS = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 11, 12, 15, 16, 25, 30, 49, 64, 77, 97, 100, 128, 210, 400, 512])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 5), max_size=2),
    st.lists(st.integers(1, 3), max_size=1),
    LENGTHS,
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from(["float32", "float64"]),
    st.booleans(),
)
def test_transform(
    before: list[int],
    after: list[int],
    length: int,
    count: int,
    inverse: bool,
    onesided: bool,
    more: int,
    dtype: str,
    symbolic: bool,
) -> None:
    """Along any axis, of lines that are cut or filled up with zeros."""
    half = inverse and onesided
    count = 2 if half else 1 if onesided else count
    extent = max(1, (length // 2 + 1 if half else length) + more)
    x, numbers = samples((*before, extent, *after), dtype, count, length)
    axis = len(before)
    operands = {"x": x, "length": np.array(length), "axis": np.array(axis)}
    (found,) = run_node(
        "DFT", operands, constant=["length", "axis"], symbolic=symbolic, inverse=int(inverse), onesided=int(onesided)
    )
    if half:
        wanted = parts(np.fft.irfft(numbers, length, axis), 1)
    else:
        wanted = parts((np.fft.ifft if inverse else np.fft.fft)(numbers, length, axis))
        wanted = wanted.take(range(length // 2 + 1), axis) if onesided else wanted
    check(found, wanted, length)


@pytest.mark.parametrize("shape", [(1, 4096), (3, 1000), (40, 512), (20, 32, 60)])
def test_many_and_long_lines(shape: tuple[int, ...]) -> None:
    x, numbers = samples(shape, "float32", 2, 0)
    operands = {"x": x, "length": None, "axis": np.array(-2)}
    (found,) = run_node("DFT", operands, constant=["axis"])
    check(found, parts(np.fft.fft(numbers)), shape[-1])


def test_of_real_numbers_two_waves_are_real() -> None:
    x, _ = samples((4, 30), "float32", 1, 0)
    (found,) = run_node("DFT", {"x": x, "length": np.array(30), "axis": np.array(1)}, constant=["length", "axis"])
    assert not found[:, [0, 15], 1].any()


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(
    ("length", "step", "onesided", "windowed"), [(400, 160, 1, True), (64, 16, 0, True), (30, 7, 1, False)]
)
def test_frames(length: int, step: int, onesided: int, windowed: bool, symbolic: bool) -> None:
    x, numbers = samples((2, 3001), "float32", 1, 0)
    window = np.hanning(length).astype(np.float32) if windowed else None
    operands = {"x": x, "step": np.array(step), "window": window, "length": np.array(length)}
    constant = ["step", "window", "length"]
    (found,) = run_node("STFT", operands, constant=constant, symbolic=symbolic, onesided=onesided)
    operands["x"] = x[..., 0]  # A signal [batch, length] of real parts alone.
    (flat,) = run_node("STFT", operands, constant=constant, symbolic=symbolic, onesided=onesided)
    cut = np.lib.stride_tricks.sliding_window_view(numbers.real, length, 1)[:, ::step]
    cut = cut * (1 if window is None else window)
    for each in found, flat:
        check(each, parts(np.fft.rfft(cut) if onesided else np.fft.fft(cut)), length)
