"""Fourier transforms as plain sums, and the mel scale."""

from __future__ import annotations

import math

from ..dims import Dim, dim_min, floordiv, modulo
from ..dtypes import F32, DType
from ..errors import ShapeError, UnsupportedError
from ..functions import cast, sin, where
from ..scalars import Scalar, const, index
from ..tensors import Indices, Tensor, assume_equal, compute, normalize_axis, reduce_tensor, select_axis
from .declare import Registry, Static
from .movement import replaced
from .reduction import divided

declare = Registry()


def _wave(steps: Dim, length: Dim, dtype: DType) -> tuple[Scalar, Scalar]:
    """(cosine, sine) of 2*pi*steps/length, taken back to the first quarter turns exactly: so zeros are zeros."""
    part = modulo(steps, length)
    short = dim_min(part, length - part)
    turn = math.pi / cast(index(length), dtype)
    sine = sin(cast(index(dim_min(2 * short, length - 2 * short)), dtype) * turn)
    cosine = sin(cast(index(length - 4 * short), dtype) * turn * 0.5)
    return cosine, where(index(2 * part) > index(length), -sine, sine)


def transform(x: Tensor, axis: int, length: Dim, inverse: bool, onesided: bool) -> Tensor:
    """The discrete Fourier transform of `length` points along `axis`; the last axis holds real and imaginary parts.

    The input is cut, or thought to go on with zeros. `onesided` gives the first half of the frequencies, and takes it
    for an inverse transform, whose result then is real (last axis 1).
    """
    half = floordiv(length, 2) + 1
    count = dim_min(half if inverse and onesided else length, x.shape[axis])
    shape = replaced(x.shape, {axis: half if onesided and not inverse else length, x.rank - 1: 2})
    if inverse and onesided:
        shape = (*shape[:-1], 1)
    sign = 1 if inverse else -1

    def body(i: Indices, r: Indices) -> Scalar:
        cosine, sine = _wave(i[axis] * r[0], length, x.dtype)
        source = replaced(i, {axis: r[0]})
        real = x.at((*source[:-1], 0))
        imaginary = imaginary_part(x, source[:-1])
        value = real * cosine - imaginary * sine * sign
        if inverse and onesided:
            # Every frequency but the first and, of an even number, the middle one stands for its mirror image too.
            alone = index(r[0]).equal(0) | index(2 * r[0]).equal(index(length))
            return where(alone, value, value * 2)
        return where(index(i[-1]).equal(0), value, imaginary * cosine + real * sine * sign)

    total = reduce_tensor("add", shape, x.dtype, (count,), body, x)
    return divided(total, length) if inverse else total


def imaginary_part(x: Tensor, position: Indices) -> Scalar:
    """The imaginary part of a number, 0 where `x` [..., 1 or 2] holds real parts alone."""
    if x.shape[-1] == 1:
        return const(0, x.dtype)
    return where(index(1) < index(x.shape[-1]), x.at((*position, 1)), const(0, x.dtype))


@declare.op("DFT", static=("dft_length", "axis"), alone=True)
def dft(
    x: Tensor,
    dft_length: Static | None = None,
    axis: Static | None = None,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """The transform along an axis (by default the one before the parts) of x [..., 1 or 2]."""
    along = normalize_axis(-2 if axis is None else axis[0], x.rank)
    length = points(x, along, dft_length, bool(inverse and onesided))
    return transform(x, along, length, bool(inverse), bool(onesided))


def points(x: Tensor, axis: int, given: Static | None, from_half: bool) -> Dim:
    """The length of a transform where it may be given; that of `from_half` of a spectrum is nearly twice the extent."""
    default = 2 * (x.shape[axis] - 1) if from_half else x.shape[axis]
    return default if given is None else given[0]


@declare.op("STFT", static=("frame_step", "frame_length"), alone=True)
def stft(
    signal: Tensor,
    frame_step: Static,
    window: Tensor | None = None,
    frame_length: Static | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """Transforms of the windowed frames of signal [batch, length, 1 or 2]: [batch, frames, frequencies, 2].

    A signal [batch, length] holds real parts: PyTorch's exporter writes it so, and ONNX Runtime runs it.
    """
    x = frames(signal, frame_step, window, frame_length)
    return transform(x, 2, x.shape[2], False, bool(onesided))


def frames(signal: Tensor, frame_step: Static, window: Tensor | None, frame_length: Static | None) -> Tensor:
    """The windowed frames of a signal: [batch, frames, length of a frame, 1 or 2]."""
    if window is None and frame_length is None:
        raise UnsupportedError("neither a window nor the length of a frame is given")
    length: Dim = window.shape[0] if frame_length is None and window is not None else frame_length[0]  # type: ignore[index]
    if window is not None:
        assume_equal(window.shape[0], length, "lengths of the window and of a frame")
    step = frame_step[0]
    if isinstance(step, int) and step < 1:
        raise ShapeError(f"frames that are {step} apart")
    if signal.rank not in (2, 3):
        raise ShapeError(f"a signal of {signal.rank} axes: it has batch, length and parts")
    count = floordiv(signal.shape[1] - length, step) + 1

    def element(b: Dim, frame: Dim, t: Dim, part: Dim) -> Scalar:
        value = signal.at((b, frame * step + t, part)[: signal.rank])
        return value if window is None else value * window.at((t,))

    shape = (signal.shape[0], count, length, signal.shape[2] if signal.rank == 3 else 1)
    return compute(shape, signal.dtype, element, signal, *([] if window is None else [window]))


MOST_BINS = 4096
_MEL_OPERANDS = ("num_mel_bins", "dft_length", "sample_rate", "lower_edge_hertz", "upper_edge_hertz")


@declare.op("MelWeightMatrix", static=_MEL_OPERANDS)
def mel_weight_matrix(
    num_mel_bins: Static,
    dft_length: Static,
    sample_rate: Static,
    lower_edge_hertz: Static,
    upper_edge_hertz: Static,
    *,
    output_datatype: DType = F32,
) -> Tensor:
    """Triangular filters of equal width on the mel scale: [dft_length/2 + 1, num_mel_bins]."""
    count, length, rate = num_mel_bins[0], dft_length[0], sample_rate[0]
    if isinstance(count, int) and not 0 <= count <= MOST_BINS:
        raise ShapeError(f"{count} bins: at most {MOST_BINS} are compiled")
    low, high = (2595 * math.log10(1 + edge[0] / 700) for edge in (lower_edge_hertz, upper_edge_hertz))
    mels = [low + k * (high - low) / (count + 2) for k in range(count + 2)]
    bins = [int((length + 1) * 700 * (10 ** (mel / 2595) - 1) // rate) for mel in mels]
    table = [const(edge, F32) for edge in bins]

    def edge(bank: Dim, offset: int) -> Scalar:
        return select_axis(bank, table[offset : offset + count])

    def element(j: Dim, bank: Dim) -> Scalar:
        at, left, centre, right = cast(index(j), F32), edge(bank, 0), edge(bank, 1), edge(bank, 2)
        rising = where(left.equal(centre), 1, (at - left) / (centre - left))
        falling = (right - at) / (right - centre)
        before_centre, inside = (at < centre) | at.equal(centre), (left <= at) & (at < right)
        value = where(before_centre, where(at.equal(centre) & (centre < right), falling, rising), falling)
        reached = inside | (at.equal(centre) & (left <= at))
        return cast(where(reached, value, 0), output_datatype)

    return compute((length // 2 + 1, count), output_datatype, element)
