"""Where a convolution reads its image: as it lies, or from a copy that suits copies of several channels.

A copy is made of images that lie in no regular way, whose windows have too many taps to be told apart (it then has the
padding in it), or whose channels are too few or too scattered to be moved together, where that takes less time than to
gather them one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, product, symbol
from ....ir.loops import For, If, Let, Statement, Store
from ....ir.ops.windows import Windows
from ....ir.scalars import Scalar
from ....ir.target import Target
from ....ir.tensors import all_of, buffer_tensor, flat_offset, inside, unflatten
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.convolution import Convolution
from ...kernels.operands import Affine, affine
from .choose import usual
from .window_loader import Image, window_loader

_THREADS = 256
_LAUNCH = 2500.0  # clocks of another kernel in a graph
_MEMORY_RATE = 2000.0  # bytes in a clock
_GATHERED = 3.0  # accesses to memory, for a warp's elements that are gathered one by one
WIDE = 8
"""Bytes in a piece from which on it is worth no copy to have wider ones."""


NOTHING = Lowered(())


@dataclass(frozen=True)
class Source:
    """The image in memory and the windows over it; `channels` of each batch follow one another, zeros behind those that
    there are. `before` makes it, where it is a copy."""

    memory: Affine
    windows: Windows
    channels: int
    before: Lowered = NOTHING


def source_of(region: Region, target: Target, found: Convolution, batches: int, channels: int) -> Source:
    """The image of a convolution of so many batches (groups) of channels."""
    memory, size = affine(found.image), found.image.dtype.bytes
    if memory is None:
        return _copy(region, found, batches, channels, found.windows)
    image = Image(memory, found.windows, 0, channels, channels * _taps(found))
    if not image.is_supported:
        return _copy(region, found, batches, channels, _unpadded(found.windows))
    loader = window_loader(image, region.alignment(memory.buffer.name))
    if loader.elements * size >= WIDE or (size > 1 and not _pays(found, target, batches, channels)):
        return Source(memory, found.windows, channels)
    return _copy(region, found, batches, channels, found.windows)


def _taps(found: Convolution) -> int:
    return int(str(product(found.windows.kernel)))


def _piece(channels: int, size: int) -> int:
    """Channels that are moved together in a copy."""
    return 16 // size if channels * size > 8 else max(1, 8 // size)


def _pays(found: Convolution, target: Target, batches: int, channels: int) -> bool:
    """Whether a copy takes less time than gathering each element for every row that it occurs in."""
    size, taps = found.image.dtype.bytes, _taps(found)
    rows = usual(product((found.images, *found.windows.output))) * batches
    gathered = rows * taps * channels / 32 * _GATHERED / target.multiprocessors
    piece = _piece(channels, size)
    stored = -(-channels // piece) * piece
    pixels = usual(product((found.images, *found.windows.input))) * batches
    copied = _LAUNCH + pixels * size * (channels + stored) / _MEMORY_RATE
    return copied + rows * taps * (stored // piece) / 32 * 2 / target.multiprocessors < gathered


def _unpadded(windows: Windows) -> Windows:
    """The same windows over an image that has the padding in it."""
    extents = zip(windows.before, windows.input, windows.after, strict=True)
    none = (0,) * windows.rank
    return replace(windows, input=tuple(sum(entry) for entry in extents), before=none, after=none)


def _copy(region: Region, found: Convolution, batches: int, channels: int, windows: Windows) -> Source:
    """A copy as `windows` see it: a thread stores a piece of a pixel, neighbouring threads have neighbouring pixels."""
    image, own = found.image, found.windows
    padded = windows.input != own.input
    piece = _piece(channels, image.dtype.bytes)
    stored = -(-channels // piece) * piece
    shape = (image.shape[0], *windows.input, batches * stored)
    copy = buffer_tensor("image", image.dtype, shape)
    pixels = product(shape[:-1])
    blocks, pieces = ceildiv(pixels, _THREADS), batches * stored // piece
    block = symbol("pixel_block", 0, blocks - 1)
    part = symbol("piece", 0, pieces - 1) if pieces > 1 else 0
    flat = block * _THREADS + symbol("thread", 0, _THREADS - 1)
    pixel = symbol("pixel", 0, pixels - 1)
    zero = s.const(0, image.dtype)
    number, *places = unflatten(pixel, shape[:-1])
    where = [at - first for at, first in zip(places, own.before, strict=True)] if padded else places

    def element(channel: Dim) -> Scalar:
        within = channel % stored
        conditions = [s.index(within) < s.index(channels)]
        if padded:
            conditions += [inside(at, extent) for at, extent in zip(where, own.input, strict=True)]
        value = image.at((number, *where, channel // stored * channels + within))
        return s.select(all_of(conditions), value, zero)

    value: Scalar = element(part)
    if piece > 1:
        value = s.Vector(image.dtype, piece, tuple(element(part * piece + lane) for lane in range(piece)))
    assert copy.buffer is not None
    target = flat_offset((number, *places, part * piece), shape)
    store = Store(copy.buffer, target, value, aligned=piece > 1)
    body = (Let("pixel", flat), If(s.index(flat) < s.index(pixels), (store,)))
    nest: Statement = For("pixel_block", blocks, (For("thread", _THREADS, body, "block"),), "grid")
    nest = For("piece", pieces, (nest,), "grid") if pieces > 1 else nest
    kernel = call(region, f"{region.name}_image", (nest,), (copy.buffer,))
    memory = affine(copy)
    assert memory is not None
    return Source(memory, windows, stored, Lowered((kernel,), (copy.buffer,)))
