"""Biases that make up for what rounding the weights does to the mean of each channel.

A layer with weights W + dW instead of W gives dW E[x] more on average, and that is known from the mean of each channel
of x on calibration data (Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction",
4.2, with measured means in place of those that batch normalisation tells). Values beyond the border of an image are
taken to have the mean too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from .model import attribute

Array = NDArray[Any]


def mean_error(node: NodeProto, error: Array, means: Array) -> Array | None:
    """How much larger the mean of each channel of the node's result is with weights that are `error` larger.

    `means` are those of the channels of its left operand. None where the shapes do not tell.
    """
    if node.op_type == "Conv":
        groups, each = attribute(node, "group", 1), error.shape[1]
        if len(means) != groups * each:
            return None
        taps = error.reshape(groups, error.shape[0] // groups, each, -1).sum(-1)
        return np.asarray(np.einsum("goc,gc->go", taps, means.reshape(groups, each)).reshape(-1))
    if error.ndim != 2:
        return None
    matrix = error.T if attribute(node, "transB", 0) else error
    return np.asarray(means @ matrix) if matrix.shape[0] == len(means) else None


__all__ = ["mean_error"]
