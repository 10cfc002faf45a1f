"""Quantised models of the catalogue: int8 ones made of its float models, and one product with a matrix of 4 bits.

The int8 models are what ONNX Runtime's own static quantizer writes: QuantizeLinear and DequantizeLinear around each
operator, u8 activations by minimum and maximum over a few random inputs of fixed seeds, i8 weights per channel. So all
engines are timed on a file that none of them has a better reading of.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ...ir.errors import OnnxcError
from .exported import Export
from .subjects import inputs_of

CALIBRATIONS = 4
"""Inputs from which the ranges of activations are taken."""
BLOCK = 32
WIDTH = 4096


def quantized_pairs(path: Path, source: str) -> None:
    """The model `source` of the catalogue at its usual sizes, quantised to 8 bits. OnnxcError without ONNX Runtime."""
    from .catalogue import model_path

    try:
        runtime = import_module("onnxruntime.quantization")
        prepare = import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    except ImportError as error:
        raise OnnxcError(f"{error.name} makes this model: pip install 'onnxc[bench]'") from None
    plain = str(model_path(source))

    class Reader(runtime.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.inputs: Iterator[dict[str, Any]] = (
                inputs_of(plain, {}, {}, (), seed)[1] for seed in range(CALIBRATIONS)
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self.inputs, None)

    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _files_in(folder):
        prepared = str(Path(folder) / "prepared.onnx")
        onnx.save(_sized(onnx.load(plain), inputs_of(plain, {}, {}, (), 0)[1]), prepared)
        prepare(prepared, prepared, skip_symbolic_shape=True)
        runtime.quantize_static(
            prepared, str(path), Reader(), quant_format=runtime.QuantFormat.QDQ, per_channel=True,
            activation_type=runtime.QuantType.QUInt8, weight_type=runtime.QuantType.QInt8,
        )  # fmt: skip


def _sized(model: onnx.ModelProto, inputs: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """The model with the sizes of these inputs."""
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, inputs[value.name].shape, strict=True):
            dim.dim_value = size
    return model


@contextmanager
def _files_in(folder: str) -> Iterator[None]:
    """Lets the quantizer write the files it needs in between into a folder, and not where the user is."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def matrix() -> NDArray[np.float32]:
    """The matrix of both products with a vector, [WIDTH, WIDTH]."""
    return np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(np.float32) / np.float32(np.sqrt(WIDTH))


def product(path: Path) -> None:
    """A vector of WIDTH floats times a matrix of floats."""
    weights = [numpy_helper.from_array(matrix(), "matrix")]
    _write(path, helper.make_node("MatMul", ["x", "matrix"], ["y"]), weights)


def product_of_blocks(path: Path) -> None:
    """The same with the matrix in 4 bits, a scale for each 32 elements of a column: com.microsoft's MatMulNBits."""
    packed, scales = packed_blocks(matrix())
    weights = [numpy_helper.from_array(packed, "matrix"), numpy_helper.from_array(scales, "scales")]
    node = helper.make_node(
        "MatMulNBits", ["x", "matrix", "scales"], ["y"], domain="com.microsoft", K=WIDTH, N=WIDTH, bits=4,
        block_size=BLOCK,
    )  # fmt: skip
    _write(path, node, weights)


def packed_blocks(weights: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """[K, N] floats as MatMulNBits reads them: [N, K / 32, 16] bytes, each of two elements, the first in the low half,
    and N * K / 32 scales; the zero point is 8, and the element furthest from 0 of each block becomes 0 or 15."""
    blocks = weights.T.reshape(weights.shape[1], -1, BLOCK)
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scales = (furthest / np.float32(-8)).astype(np.float32)
    steps = np.where(scales == 0, 0, blocks / np.where(scales == 0, 1, scales))
    nibbles = np.clip(np.rint(steps) + 8, 0, 15).astype(np.uint8)
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4, scales.reshape(-1)


def _write(path: Path, node: onnx.NodeProto, weights: list[TensorProto]) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))


QUANTIZED: Mapping[str, Export] = {
    "resnet50_int8": partial(quantized_pairs, source="resnet50"),
    "mobilenetv2_int8": partial(quantized_pairs, source="mobilenetv2"),
    "bert_base_int8": partial(quantized_pairs, source="bert_base"),
    "gemv": product,
    "gemv_int4": product_of_blocks,
}
"""What is made here, by the name in the catalogue."""
