"""Channels-last convolutions of 8-bit images by 8-bit weights, both less their zero points, with sums in i32.

The sum of (x - zero) * w is start + sum of x * w, where start = -zero * (sum of w) is one number for each filter, and
where outside the image stands the zero point. Where instructions multiply bytes of the other sign than the image's, it
is read as x ^ 0x80: i8 as u8 with the zero point 128 higher, or u8 as i8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim
from ....ir.dtypes import I8, I32, U8, U32
from ....ir.loops import For, Store
from ....ir.ops.declare import CHANNELS_LAST
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Call, Lowered, Region
from ...kernels import convolution
from ...kernels.calls import call, operand
from ...kernels.operands import affine
from ..dot_products import Dot
from .convolution import Convolution, channels_last, lifted
from .integer_gemm import choose_dot

SIGN = 0x80
"""What makes u8 of i8, the order kept."""
ONES = 0x01010101
"""Four bytes of 1."""


@dataclass(frozen=True)
class IntegerConvolution:
    """A convolution whose `weights` are i32, less their zero points, and the zero point of its image, an i32.

    `dot` multiplies elements of the image that were moved by `shift` (by 128 or -128 where they must have the other
    sign), with their zero point. `step` is how far apart the channels of a pixel lie.
    """

    whole: Convolution
    zero: Scalar
    dot: Dot
    shift: int = 0
    step: Dim = 1

    @property
    def known_zero(self) -> int | None:
        """The zero point where the model fixes it."""
        return int(self.zero.value) if isinstance(self.zero, s.Const) else None

    @property
    def own_zero(self) -> Scalar:
        """The zero point of the image as it lies in memory."""
        known = self.known_zero
        return self.zero - self.shift if known is None else s.const(known - self.shift, I32)

    @property
    def fits(self) -> bool:
        """Whether all weights are i8."""
        return bool(self.whole.weights.min() >= -128 and self.whole.weights.max() <= 127)

    def start(self, sums: np.ndarray) -> np.ndarray:
        """What the sums of weights add to every result; where the zero point is only known at run time, less than
        once that: it is the factor of these."""
        zero = self.known_zero
        return (-sums if zero is None else -sums * zero).astype(np.int32)

    def started(self, sums: Scalar) -> Scalar:
        """The start of sums by what `start` has made of their weights."""
        return sums if self.known_zero is not None else sums * s.widen(self.zero, sums.lanes)

    def zeros(self) -> Scalar:
        """Four zero points side by side, as u32."""
        zero = self.known_zero
        if zero is not None:
            return s.const(zero % 256 * ONES, U32)
        return (s.cast(self.zero, U32) & s.const(255, U32)) * s.const(ONES, U32)

    def bytes_of(self, pixels: Scalar) -> Scalar:
        """Elements of the image as they are multiplied, the bits of u8."""
        pixels = pixels if pixels.dtype == U8 else s.Bitcast(U8, pixels.lanes, pixels)
        return pixels ^ s.const(SIGN, U8, pixels.lanes) if self.shift else pixels

    def flipped(self, words: Scalar) -> Scalar:
        """Four elements of the image, a u32, as they are multiplied."""
        return words ^ s.const(SIGN * ONES, U32, words.lanes) if self.shift else words

    def rim(self, name: str, words: Dim) -> tuple[Buffer, Call | None, dict[str, Callable[[], np.ndarray]]]:
        """What stands for pixels outside, as they would lie in memory: a buffer of `words` times four elements, the
        kernel that makes it at run time, or else the constant."""
        buffer = Buffer(name, U32, words)
        zero = self.known_zero
        if zero is not None:
            word = (zero % 256 ^ (SIGN if self.shift else 0)) * ONES
            return buffer, None, {name: lambda: np.full(int(str(words)), word, np.uint32)}
        fill = For("i", words, (Store(buffer, k.index_symbol("i", words), self.flipped(self.zeros())),), "vector")
        return buffer, call(self.whole.region, "zero_points", (fill,), (buffer,)), {}


def find_integers(region: Region, target: Target) -> IntegerConvolution | None:
    """The region's anchor as a convolution of integers over one or two spatial axes with constant weights and one zero
    point for the image; None where it is not."""
    image, zero = operand(region, 0), operand(region, 2)
    if image is None or image.dtype not in (U8, I8) or (zero is not None and (zero.kind == "opaque" or zero.size != 1)):
        return None
    weight_zero = operand(region, 3)
    zeros = np.zeros(1, np.int32) if weight_zero is None else region.elements(weight_zero)
    found = _found(region) if zeros is not None else None
    if found is None or zeros is None:
        return None
    whole, step = found
    weights = whole.weights.astype(np.int32)
    weights = weights - zeros.astype(np.int32).reshape(-1, *(1,) * (weights.ndim - 1))
    known = region.elements(zero) if zero is not None else np.zeros(1, np.int32)
    dot, flips = choose_dot(image.dtype, target)
    shift = 0 if not flips else SIGN if image.dtype == I8 else -SIGN
    if known is not None:
        own = s.const(int(known.reshape(-1)[0]) + shift, I32)
    else:
        assert zero is not None
        own = s.cast(zero.at((0,) * zero.rank), I32) + shift
    return IntegerConvolution(replace(whole, weights=weights), own, dot, shift, step)


def _found(region: Region) -> tuple[Convolution, Dim] | None:
    """The convolution, and how far apart the channels of a pixel lie: copied where a schedule would not do that."""

    def find(region: Region) -> list[convolution.Convolution] | None:
        found = convolution.find_convolution(region, "ConvInteger")
        return None if found is None else [found]

    parts = find(region)
    image = affine(parts[0].image) if parts else None
    if parts and image is not None and parts[0].channels % 4 and parts[0].channels != 1:
        (part,) = parts
        last = region.anchor is not None and region.anchor.attributes.get("layout") == CHANNELS_LAST
        if part.array is None or part.windows.rank > 2 or not last:
            return None
        return lifted(part, image, Lowered(())), image.strides[-1]
    found = channels_last(region, find, (I32,))
    return None if found is None else (found[0], 1)
