"""ONNX's own cases run by definition: single operators and small graphs, node by node, fixed or symbolic shapes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from evaluate import evaluate_tensor
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.reference import ReferenceEvaluator
from onnxc.ir.dims import Dim, as_symbol, evaluate, symbol
from onnxc.ir.dtypes import BY_ONNX, of_numpy
from onnxc.ir.graph import Constant, TensorType, Value
from onnxc.ir.infer import Inference
from onnxc.ir.tensors import Tensor

RANDOM = ("Bernoulli",)
DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type", "precision", "output_datatype")


@lru_cache
def node_cases() -> dict[str, Any]:
    """The node cases by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for case in load_model_tests(kind="node")}


def attribute(proto: onnx.AttributeProto) -> Any:
    """An attribute as the IR holds it."""
    value = onnx.helper.get_attribute_value(proto)
    if proto.name in DTYPE_ATTRIBUTES and proto.type == onnx.AttributeProto.INT:
        return BY_ONNX[value] if value else None
    if proto.type == onnx.AttributeProto.TENSOR:
        return Constant(proto.name, numpy_helper.to_array(value))
    if proto.type == onnx.AttributeProto.STRING:
        return value.decode()
    if proto.type == onnx.AttributeProto.STRINGS:
        return tuple(item.decode() for item in value)
    return tuple(value) if isinstance(value, list) else value


@dataclass
class Evaluation:
    """A graph evaluated node by node: each node's outputs by definition over arrays that are already there."""

    symbolic: bool = False
    inference: Inference = field(default_factory=Inference)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    bindings: dict[str, int] = field(default_factory=dict)
    opsets: Sequence[onnx.OperatorSetIdProto] = ()

    def add_input(self, name: str, array: np.ndarray, known: bool) -> None:
        """An input: `known` at compile time, or only its type; symbolic where that is asked for."""
        shape: tuple[Dim, ...] = array.shape
        if self.symbolic and not known:
            shape = tuple(symbol(f"d{n}") if n > 1 else n for n in array.shape)
            self.bindings |= {f"d{n}": n for n in array.shape if n > 1}
        self.arrays[name] = array
        self.values[name] = Value(name, TensorType(of_numpy(array.dtype), shape))
        if known:
            self.inference.define(self.values[name], array)

    def run(self, node: onnx.NodeProto) -> None:
        """Adds the arrays of a node's outputs; raises where what was inferred contradicts them."""
        domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
        inputs = [self.values[name] if name else None for name in node.input]
        if node.op_type == "Constant":
            self.add_input(node.output[0], constant_array(node), True)
            return
        attributes = {proto.name: attribute(proto) for proto in node.attribute}
        attributes = {name: value for name, value in attributes.items() if value is not None}
        outputs = list(node.output)
        arguments = (f"{domain}{node.op_type}", inputs, attributes, {}, outputs)
        types = self.inference.outputs(*arguments)
        tensors = self.inference.definition(*arguments)
        for name, (source, element) in self.inference.bindings.items():
            self.bindings[name] = int(self.arrays[source].reshape(-1)[element])
        for left, right in self.inference.assumptions:
            assert evaluate(left, self.bindings) == evaluate(right, self.bindings), f"{left} taken for {right}"
        for name, type, tensor in zip(outputs, types, tensors, strict=False):
            if not name:
                continue
            assert isinstance(tensor, Tensor) and isinstance(type, TensorType)
            if tensor.kind == "opaque":
                array = self.reference(node, outputs.index(name))
                self.bind(type, array)
            else:
                array = evaluate_tensor(tensor, self.arrays, self.bindings)
            self.check_known(name, array, tensor)
            self.arrays[name] = array
            self.values[name] = Value(name, type)

    def reference(self, node: onnx.NodeProto, output: int) -> np.ndarray:
        """An output that has no definition by elements."""
        graph = onnx.helper.make_graph([node], "node", [], [])
        graph.input.extend(onnx.ValueInfoProto(name=name) for name in node.input if name)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name)
        evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=self.opsets))
        feeds = {name: self.arrays[name] for name in node.input if name}
        return np.asarray(evaluator.run([node.output[output]], feeds)[0])

    def bind(self, type: TensorType, array: np.ndarray) -> None:
        """Gives new size symbols the values that the array shows; its type must be the inferred one."""
        for dim, size in zip(type.shape, array.shape, strict=True):
            symbol = as_symbol(dim)
            if symbol is not None and symbol.name not in self.bindings:
                assert symbol.upper is None or size <= evaluate(symbol.upper, self.bindings)
                self.bindings[symbol.name] = size
        assert tuple(evaluate(dim, self.bindings) for dim in type.shape) == array.shape, f"{type} for {array.shape}"
        assert of_numpy(array.dtype) == type.dtype

    def check_known(self, name: str, array: np.ndarray, tensor: Tensor) -> None:
        """What inference claims to know of the values must be true of them."""
        for known, actual in zip(self.inference.values.get(name, ()), array.reshape(-1).tolist(), strict=False):
            value = evaluate(known, self.bindings) if not isinstance(known, float | bool) else known
            np.testing.assert_allclose(value, actual, rtol=1e-6)
        if array.size and tensor.lower is not None:
            assert array.min() >= tensor.lower
        if array.size and tensor.upper is not None:
            assert array.max() <= evaluate(tensor.upper, self.bindings)


def constant_array(node: onnx.NodeProto) -> np.ndarray:
    """The array of a Constant node, whichever attribute spells it."""
    proto = node.attribute[0]
    value = onnx.helper.get_attribute_value(proto)
    if proto.name == "value":
        return numpy_helper.to_array(value)
    return np.asarray(value, np.int64 if "int" in proto.name else np.float32)


def static_inputs(graph: onnx.GraphProto) -> set[str]:
    """Names of the values that operators of the graph want to know when compiling."""
    from onnxc.ir.ops import REGISTRY

    found: set[str] = set()
    for node in graph.node:
        operator = REGISTRY.get(node.op_type)
        if operator is not None:
            found |= {node.input[i] for i in operator.static_positions(len(node.input)) if node.input[i]}
    return found


def run_case(case: Any, symbolic: bool = False) -> None:
    """Runs one case on each of its data sets; AssertionError where dtype, shape or values differ from the expected."""
    graph = case.model.graph
    wanted = static_inputs(graph)
    for inputs, expected in case.data_sets:
        evaluation = Evaluation(symbolic, opsets=case.model.opset_import)
        for info, array in zip(graph.input, inputs, strict=False):
            evaluation.add_input(info.name, as_array(array), info.name in wanted)
        for initializer in graph.initializer:
            evaluation.add_input(initializer.name, numpy_helper.to_array(initializer), True)
        for node in graph.node:
            evaluation.run(node)
        for info, array in zip(graph.output, expected, strict=True):
            compare(evaluation.arrays[info.name], as_array(array), case)
            shape = tuple(evaluate(dim, evaluation.bindings) for dim in evaluation.values[info.name].shape)
            assert shape == as_array(array).shape, (
                f"inferred {evaluation.values[info.name].type}, expected {as_array(array).shape}"
            )


def as_array(data: Any) -> np.ndarray:
    """A case's tensor, which is an array or a TensorProto."""
    return numpy_helper.to_array(data) if isinstance(data, onnx.TensorProto) else np.asarray(data)


def compare(actual: np.ndarray, expected: np.ndarray, case: Any) -> None:
    assert actual.dtype == expected.dtype, f"{actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{actual.shape} instead of {expected.shape}"
    if all(node.op_type in RANDOM for node in case.model.graph.node):
        return
    if actual.dtype.kind in "iub":
        np.testing.assert_array_equal(actual, expected)
        return
    # Results that are zero but for rounding differ by it: as f32 does beside the greatest element.
    finite = np.abs(expected.astype(np.float64))
    finite = finite[np.isfinite(finite)]
    noise = 1e-6 * finite.max() if finite.size and expected.dtype.itemsize >= 4 else 0
    np.testing.assert_allclose(
        actual.astype(np.float64), expected.astype(np.float64), case.rtol, max(case.atol, noise), equal_nan=True
    )
