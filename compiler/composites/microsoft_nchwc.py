"""The domain com.microsoft.nchwc: what ONNX Runtime writes at its highest level of optimization.

There activations lie in memory as [N, C/block, H, W, block], yet their shapes are written as [N, C, H, W] with C a
multiple of the block. Here they stay [N, C, H, W]; only weights, which such a file holds in the kernels' order, are put
back. The size of a block stands nowhere: it is that of the machine on which the file was written, and as ONNX Runtime
does, this takes it to be the machine at hand (16 with AVX-512 or on AArch64, else 8).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from ...ir.dims import ceildiv
from ...ir.dtypes import F32
from ...ir.errors import UnsupportedError
from ...ir.graph import Attribute, Value
from ...ir.target import Target
from ..expand import Expansions, Nodes
from .microsoft_fused import fused_convolution

declare = Expansions()
DOMAIN = "com.microsoft.nchwc"


@functools.cache
def block_size() -> int:
    """The channels in a block on this machine."""
    host = Target.host()
    return 16 if host.architecture == "aarch64" or host.has("avx512f") else 8


def plain_weights(n: Nodes, w: Value, depthwise: bool) -> Value:
    """Weights [M, C, *kernel] of blocks of filters, and of channels where those are enough to fill a block."""
    block = block_size()
    filters, channels, *kernel = w.shape
    if not isinstance(filters, int) or not isinstance(channels, int) or filters % block:
        raise UnsupportedError(
            f"weights {w.type} that are not in blocks of {block} filters, those of this machine; "
            "let ONNX Runtime optimize the model again here, or at the level ORT_ENABLE_EXTENDED"
        )
    rank = len(kernel)
    spatial = tuple(range(2, 2 + rank))
    if depthwise or channels < block:
        blocked = n.reshape(w, filters // block, channels, *kernel, block)
        order: tuple[int, ...] = (0, 2 + rank, 1, *spatial)
    else:
        blocked = n.reshape(w, filters // block, channels // block, *kernel, block, block)
        order = (0, 3 + rank, 1, 2 + rank, *spatial)
    return n.reshape(n.transpose(blocked, *order), *w.shape)


@declare(f"{DOMAIN}.Conv")
def conv(
    n: Nodes,
    x: Value,
    w: Value,
    b: Value | None = None,
    z: Value | None = None,
    *,
    group: int = 1,
    activation: str = "",
    activation_params: Sequence[float] = (),
    **attributes: Attribute,
) -> Value:
    """activation(Conv(x, w, b) + z)."""
    weights = plain_weights(n, w, group > 1 and w.shape[1] == 1)
    return fused_convolution(
        n, x, weights, b, z, activation, activation_params, {"group": group, **attributes}
    )  # fmt: skip


@declare(f"{DOMAIN}.ReorderInput")
def reorder_input(n: Nodes, x: Value, *, channels_last: int = 0) -> Value:
    """The image with zeros for channels up to a whole block."""
    if channels_last:
        x = n.transpose(x, 0, 3, 1, 2)
    channels, block = x.shape[1], block_size()
    missing = ceildiv(channels, block) * block - channels
    return x if missing == 0 else n("Pad", x, n.dims(0, missing), None, n.dims(1))


@declare(f"{DOMAIN}.ReorderOutput")
def reorder_output(n: Nodes, x: Value, *, channels: int, channels_last: int = 0) -> Value:
    """The first channels of an image."""
    y = x if x.shape[1] == channels else n.slice(x, 1, 0, channels)
    return n.transpose(y, 0, 2, 3, 1) if channels_last else y


def _pool(name: str) -> None:
    @declare(f"{DOMAIN}.{name}")
    def define(n: Nodes, x: Value, **attributes: Attribute) -> Value:
        return n(name, x, **attributes)


for _name in ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"):
    _pool(_name)


@declare(f"{DOMAIN}.Upsample")
def upsample(
    n: Nodes,
    x: Value,
    *,
    scales: Sequence[int] = (),
    mode: str = "nearest",
    coordinate_transformation_mode: str = "asymmetric",
) -> Value:
    """The image larger by whole factors."""
    factors = n.constant(np.array(scales).astype(F32.numpy))
    return n(
        "Resize", x, None, factors, mode=mode, coordinate_transformation_mode=coordinate_transformation_mode,
        nearest_mode="floor",
    )  # fmt: skip
