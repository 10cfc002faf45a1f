"""Models written as text, in the syntax of `onnx.parser`, for tests of what is done with a compiled model."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
from onnx import numpy_helper

Array = npt.NDArray[Any]


def model_of_text(text: str, **weights: Array) -> onnx.ModelProto:
    """The model of `name (inputs) => (outputs) { nodes }`, with arrays for the names that nothing else defines."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def small_cnn() -> onnx.ModelProto:
    """Convolution, pooling, a linear layer and softmax, for any batch, height and width."""
    random = np.random.default_rng(0)
    return model_of_text(
        """cnn (float[batch, 3, height, width] image) => (float[batch, 5] scores) {
            convolved = Conv <pads = [1, 1, 1, 1]> (image, kernel, bias)
            positive = Relu (convolved)
            pooled = GlobalAveragePool (positive)
            flat = Flatten (pooled)
            logits = MatMul (flat, matrix)
            scores = Softmax (logits)
        }""",
        kernel=random.standard_normal((8, 3, 3, 3), np.float32),
        bias=random.standard_normal(8, np.float32),
        matrix=random.standard_normal((8, 5), np.float32),
    )


def image(*shape: int) -> Array:
    """The same numbers for the same shape."""
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
