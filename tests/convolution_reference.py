"""Convolutions in f64, for kernels that compute in less."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def convolution(
    x: np.ndarray, w: np.ndarray, pads: Sequence[int], strides: Sequence[int] = (1, 1), group: int = 1
) -> np.ndarray:
    """The convolution of a channels-last image in f64."""
    top, left, bottom, right = pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], axis=(1, 2))
    windows = windows[:, :: strides[0], :: strides[1]]
    parts = zip(np.split(windows, group, axis=3), np.split(w.astype(np.float64), group), strict=True)
    return np.concatenate([np.einsum("nhwckl,fckl->nhwf", *part) for part in parts], axis=3)
