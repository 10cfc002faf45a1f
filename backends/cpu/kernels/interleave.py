"""Images of few channels, stored channel by channel, copied to pixel by pixel: what the first convolution reads.

As many vectors as there are channels are read and written for each vector of pixels, and in between their lanes picked
from pairs; element by element it would take as long as the convolution of a small network's first layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import ceildiv, dim_min, known_le, symbol
from ....ir.loops import Define, For, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.tensors import Tensor
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.operands import Affine, affine, copied
from .division import TASKS_PER_THREAD

# With more channels a pixel fills a good part of a vector by itself.
CHANNELS = (2, 3, 4)


def copied_image(region: Region) -> tuple[Region, Lowered]:
    """`operands.copied` for the image of a convolution, by vectors where it has few channels."""
    image = region.operands[0]
    assert image is not None
    changed, copies = copied(region, (0,))
    (memory,) = copies.workspaces
    found = _planes(image)
    lanes = 8 if image.dtype.bits == 64 else 16
    if found is None or not known_le(lanes, image.shape[1] * image.shape[2]):
        return changed, copies
    body = tuple(_body(found, image, memory, lanes))
    name = f"{image.dtype}_interleave{image.shape[3]}"
    return changed, replace(copies, calls=(call(region, name, body, (memory,)),))


def _planes(image: Tensor) -> Affine | None:
    """Where the channels of [images, height, width, few channels] are planes of neighbouring pixels."""
    found = affine(image)
    if found is None or image.rank != 4 or image.shape[3] not in CHANNELS or found.buffer.dtype.bits < 32:
        return None
    _, height, width, _ = image.shape
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    rows = height == 1 or found.strides[1] == width
    return found if rows and (width == 1 or found.strides[2] == 1) else None


def _body(found: Affine, image: Tensor, memory: Buffer, lanes: int) -> Iterator[Statement]:
    images, height, width, channels = image.shape
    assert isinstance(height, int) and isinstance(width, int) and isinstance(channels, int)
    pixels = height * width
    vectors = -(-pixels // lanes)
    block = max(1, vectors // TASKS_PER_THREAD // 4)
    blocks = ceildiv(vectors, block)
    number = symbol("part", 0, blocks - 1) * block + k.index_symbol("vector", block)
    # The last vectors end with the image: they do some pixels again.
    at = dim_min(number, vectors - 1) * lanes
    place = symbol("pixel", 0, pixels - lanes)
    source = found.start + symbol("image", 0) * found.strides[0] + place
    inner: list[Statement] = [Let("pixel", dim_min(at, pixels - lanes))]
    planes = [Buffer(f"plane{c}", image.dtype, 1, "register", lanes) for c in range(channels)]
    for c, plane in enumerate(planes):
        inner.append(Define(plane, s.load(found.buffer, source + c * found.strides[3], lanes)))
    target = (symbol("image", 0) * pixels + place) * channels
    for part in range(channels):
        value = _picked([s.load(plane, 0, lanes) for plane in planes], part, lanes)
        inner.append(Store(memory, target + part * lanes, value))
    task = k.index_symbol("task", images * blocks)
    head = (Let("part", task % blocks), Let("image", task // blocks))
    yield For("task", images * blocks, (*head, For("vector", block, tuple(inner))), "parallel")


def _picked(planes: Sequence[Scalar], part: int, lanes: int) -> Scalar:
    """Lanes `part * lanes` and on of the pixels one after another: from two planes, then those of each further one."""
    places = [divmod(part * lanes + lane, len(planes)) for lane in range(lanes)]
    result = planes[0]
    for number, plane in enumerate(planes[1:], 1):
        first = number == 1
        pick = tuple(
            lanes + pixel if channel == number else pixel if first and channel == 0 else lane
            for lane, (pixel, channel) in enumerate(places)
        )
        result = s.Shuffle(plane.dtype, lanes, result, plane, pick)
    return result
