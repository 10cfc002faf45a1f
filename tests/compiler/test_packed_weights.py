"""Initializers of every element type, packed in the file where ONNX packs them: the same numbers wherever they lie."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from onnx import helper, numpy_helper
from onnxc.compiler.weights import load_model
from onnxc.ir.dtypes import ALL, BY_NAME, F32, DType

NUMERIC = [dtype for dtype in ALL if dtype.kind != "string"]


def numbers(dtype: DType, count: int) -> np.ndarray[Any, Any]:
    """Small whole numbers of a type; powers of two of one that has an exponent alone."""
    values = np.random.default_rng(count).integers(-9, 9, count).astype(np.float64)
    if dtype.name == "f8e8m0":
        return (2.0**values).astype(dtype.numpy)
    return (
        (values * (1 + 2j)).astype(dtype.numpy)
        if dtype.kind == "complex"
        else values.clip(*dtype.limits).astype(dtype.numpy)
    )


def model_with(tensor: onnx.TensorProto) -> onnx.ModelProto:
    output = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
    graph = helper.make_graph([], "weights", [], [output], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 28)], ir_version=14)


@pytest.mark.parametrize("count", [0, 5, 4001])
@pytest.mark.parametrize("dtype", NUMERIC, ids=str)
def test_arrays_of_all_types(dtype: DType, count: int, tmp_path: Path) -> None:
    """As raw bytes, in typed fields, in a file and beside it."""
    wanted = numbers(dtype, count)
    for tensor in (numpy_helper.from_array(wanted, "w"), helper.make_tensor("w", dtype.onnx, [count], wanted)):
        model = model_with(tensor)
        onnx.save(model, tmp_path / "inside.onnx")
        sources: list[Any] = [model, model.SerializeToString(), tmp_path / "inside.onnx"]
        if tensor.raw_data:
            beside = {"save_as_external_data": True, "size_threshold": 0, "location": f"w{count}"}
            onnx.save(copy.deepcopy(model), tmp_path / "beside.onnx", **beside)
            sources.append(tmp_path / "beside.onnx")
        for source in sources:
            proto, weights = load_model(source)
            found = weights.array(proto.graph.initializer[0])
            assert (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


@pytest.mark.parametrize("name", ["i4", "u2", "f4e2m1", "f6e3m2", "f8e5m2", "f8e8m0"])
def test_packed_weights_in_kernels_and_artifacts(name: str, tmp_path: Path) -> None:
    dtype = BY_NAME[name]
    weights = numbers(dtype, 4001)
    node = helper.make_node("DequantizeLinear", ["w", "scale"], ["y"])
    cast = helper.make_node("Cast", ["w"], ["y"], to=F32.onnx)
    value = helper.make_tensor_value_info("scale", F32.onnx, [])
    used = cast if name == "f8e8m0" else node
    initializers = [numpy_helper.from_array(weights, "w")]
    output = helper.make_empty_tensor_value_info("y")
    graph = helper.make_graph([used], "packed", [value] if used is node else [], [output], initializers)
    model = onnxc.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 28)], ir_version=14))
    loaded = onnxc.load(model.save(tmp_path / "packed.onnxc"))
    for executable in (model, loaded):
        found = executable.run({"scale": np.float32(2)} if used is node else {})["y"]
        np.testing.assert_array_equal(found, weights.astype(np.float32) * (2 if used is node else 1))
