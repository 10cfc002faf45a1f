"""Weights as integers: 8 bits per channel or per tensor, 4 bits in blocks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

Array = NDArray[Any]
MOST = 127
"""Of i8: -128 is not used, so that weights are as large on either side."""
SHRINKS = np.linspace(1.0, 0.7, 13)
"""Shares of a block's range that are tried."""
AT_ONCE = 1 << 15
"""Elements that are rounded at once, so that what is made on the way stays in the second-level cache."""


@dataclass(frozen=True)
class Quantised:
    """Integers and their scales: scale[channel] * q, or scale[block] * (q - zero[block]); `axis` is that of the
    channels or blocks, None for one scale."""

    values: Array
    scale: Array
    axis: int | None = None
    zero: Array | None = None

    @property
    def floats(self) -> Array:
        """What the integers stand for."""
        scale = self.scale.astype(np.float64)
        if self.axis is not None:
            scale = scale.reshape([-1 if axis == self.axis else 1 for axis in range(self.values.ndim)])
        return np.asarray(self.values * scale)


def quantised(weights: Array, axis: int | None, least_scale: Array | float = 0.0) -> Quantised:
    """i8 weights around zero, with a scale per channel along `axis` (None: one in all), none below `least_scale`, which
    the weights' type holds."""
    others = tuple(other for other in range(weights.ndim) if other != axis)
    ends = (
        np.asarray(found(axis=others if axis is not None else None, initial=0.0))
        for found in (weights.max, weights.min)
    )
    largest = np.maximum(*(np.abs(end.astype(np.float64)) for end in ends))
    scale = _usable(np.maximum(largest / MOST, least_scale).astype(np.float32), weights.dtype)
    wide = scale if axis is None else scale.reshape([-1 if other == axis else 1 for other in range(weights.ndim)])
    values = np.empty(weights.shape, np.int8)
    step = max(1, AT_ONCE * len(weights) // max(weights.size, 1))
    for start in range(0, len(weights), step):  # what is as large as the weights is only the result
        place = slice(start, start + step)
        part = weights[place] / (wide[place] if axis == 0 else wide)
        values[place] = np.clip(np.rint(part, out=part), -MOST, MOST, out=part)
    return Quantised(values, scale, axis)


def in_blocks(weights: Array, axis: int, block: int, symmetric: bool, threads: int | None = None) -> Quantised:
    """4-bit weights [..., n, ...] with a scale, and a zero point unless `symmetric`, for each `block` elements along
    `axis`; of some ranges per block the one is taken that changes its elements least in the mean of squares.

    Values are -8..7 around zero, or 0..15; scales and zeros are [..., ceil(n / block), ...].
    """
    moved = np.moveaxis(weights, axis, -1)
    rows, length = moved.reshape(-1, moved.shape[-1]), moved.shape[-1]
    count = -(-length // block)
    values = np.empty((len(rows), count * block), np.int8)
    scales, zeros = np.empty((len(rows), count), np.float32), np.empty((len(rows), count), np.int8)
    step = max(1, AT_ONCE // (count * block))

    def fill(start: int) -> None:
        part = rows[start : start + step]
        # The last block is filled up with what it has already: that changes no range.
        part = np.pad(part, ((0, 0), (0, count * block - length)), mode="edge").reshape(len(part), count, block)
        found = _blocks(part.astype(np.float32), symmetric, weights.dtype)
        place = slice(start, start + step)
        values[place] = found[0].reshape(-1, count * block)
        scales[place], zeros[place] = found[1], found[2]

    with ThreadPoolExecutor(threads) as pool:  # NumPy lets others run meanwhile
        list(pool.map(fill, range(0, len(rows), step)))
    shape = moved.shape[:-1]

    def back(array: Array) -> Array:
        return np.ascontiguousarray(np.moveaxis(array.reshape(*shape, -1), -1, axis))

    return Quantised(back(values[:, :length]), back(scales), axis, None if symmetric else back(zeros))


def _usable(scale: Array, kind: Any) -> Array:
    """Scales as a type holds them, 1 in place of those that it hardly does."""
    tiny = float(ml_dtypes.finfo(kind).tiny)  # type: ignore[no-untyped-call]
    return np.asarray(np.where(scale < tiny, np.float32(1), scale.astype(kind)).astype(np.float32))


def _blocks(part: Array, symmetric: bool, kind: Any) -> tuple[Array, Array, Array]:
    """Integers [rows, blocks, block], scales and zeros [rows, blocks] of blocks of weights."""
    low, high = np.minimum(part.min(-1), 0), np.maximum(part.max(-1), 0)
    least, most = (-8, 7) if symmetric else (0, 15)
    extent = np.maximum(-low / 8, high / 7) if symmetric else (high - low) / 15
    values = np.empty(part.shape, np.int8)
    scales, zeros = np.empty(low.shape, np.float32), np.zeros(low.shape, np.float32)
    least_error = np.full(low.shape, np.inf, np.float32)
    q, off = np.empty_like(part), np.empty_like(part)
    for share in SHRINKS:
        scale = _usable((extent * np.float32(share)).astype(np.float32), kind)
        zero = np.zeros_like(scale) if symmetric else np.clip(np.rint(-low * np.float32(share) / scale), 0, 15)
        np.divide(part, scale[..., None], out=q)
        np.rint(q, out=q)
        np.clip(q, (least - zero)[..., None], (most - zero)[..., None], out=q)
        np.multiply(q, scale[..., None], out=off)
        off -= part
        error = np.einsum("rbe,rbe->rb", off, off)
        better = error < least_error
        np.copyto(least_error, error, where=better)
        np.copyto(scales, scale, where=better)
        np.copyto(zeros, zero, where=better)
        q += zero[..., None]
        np.copyto(values, q, where=better[..., None], casting="unsafe")
    return values, scales, zeros.astype(np.int8)


def four_bits(values: Array, signed: bool) -> TensorProto:
    """A tensor of INT4 or UINT4: two elements in a byte, the first in the lower half."""
    flat = values.reshape(-1).astype(np.int8).view(np.uint8) & 15
    flat = np.concatenate([flat, np.zeros(len(flat) % 2, np.uint8)])
    packed = (flat[::2] | flat[1::2] << 4).astype(np.uint8)
    kind = TensorProto.INT4 if signed else TensorProto.UINT4
    return helper.make_tensor("", kind, values.shape, packed.tobytes(), raw=True)


__all__ = ["MOST", "Quantised", "four_bits", "in_blocks", "quantised"]
