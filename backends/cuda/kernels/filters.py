"""Weights in the order in which a kernel reads them: made at compile time where the model fixes them, else by a kernel
that runs before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ....ir.dims import Dim, product
from ....ir.scalars import Buffer, Scalar
from ....ir.tensors import Tensor
from ....passes.nests import build_nests
from ....passes.regions import Lowered, Region
from ...kernels.calls import call

ALIGNED = 256
"""Bytes to which every runtime of a GPU aligns constants and workspaces."""


def packed(
    region: Region,
    name: str,
    shape: Sequence[int],
    tensor: Tensor,
    element: Callable[[Sequence[Dim]], Scalar],
    array: Callable[[], np.ndarray] | None,
) -> tuple[Buffer, Lowered]:
    """A buffer of the shape whose element at some indices is `element(indices)`, of the type of `tensor`, and what
    makes it: `array`, where that is given, at compile time."""
    buffer = Buffer(name, tensor.dtype, product(shape))
    if array is not None:
        return buffer, Lowered((), packed={name: lambda: np.ascontiguousarray(array()).reshape(-1)})
    made = Tensor(tuple(shape), tensor.dtype, lambda indices: element(indices), "map", (tensor,))
    nest = build_nests([(buffer, made)])
    return buffer, Lowered((call(region, f"{region.name}_{name}", nest, (buffer,)),), (buffer,))


def alignment(region: Region, *own: Buffer) -> Callable[[str], int]:
    """The bytes to which buffers are aligned, a schedule's own among them."""
    names = {buffer.name for buffer in own}
    return lambda name: ALIGNED if name in names else region.alignment(name)


def rounded_to_tf32(array: np.ndarray) -> np.ndarray:
    """f32 rounded to the 10 bits of tf32, halves away from zero as `cvt.rna` does."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    return np.where(np.isfinite(array), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).view(np.float32)
