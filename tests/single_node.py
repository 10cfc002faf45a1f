"""Models of one node (or a few), compiled and run: sizes as numbers or as symbols, operands as inputs or constants."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxc
from onnx import NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = npt.NDArray[Any]


def model_of(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Array],
    constants: Mapping[str, Array],
    outputs: Sequence[str],
    symbolic: bool = False,
    opset: int = 26,
) -> onnx.ModelProto:
    """A model of these nodes; the dims of its inputs are symbols where wanted, all of them different ones."""
    values = []
    for name, array in inputs.items():
        shape = [f"{name}_{axis}" for axis in range(array.ndim)] if symbolic else list(array.shape)
        values.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape))
    graph = helper.make_graph(
        list(nodes),
        "nodes",
        values,
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=12)


def compiled(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Array]:
    """What the compiled model computes."""
    return list(onnxc.compile(model).run(inputs).values())


def run_node(
    op: str,
    operands: Mapping[str, Array | None],
    outputs: int = 1,
    constant: Collection[str] = (),
    symbolic: bool = False,
    opset: int = 26,
    **attributes: Any,
) -> list[Array]:
    """One node, compiled; operands named in `constant` are initializers, None is an absent one."""
    present = {name: array for name, array in operands.items() if array is not None}
    names = [f"output{number}" for number in range(outputs)]
    node = helper.make_node(op, [n if n in present else "" for n in operands], names, **attributes)
    inputs = {name: array for name, array in present.items() if name not in constant}
    constants = {name: array for name, array in present.items() if name in constant}
    return compiled(model_of([node], inputs, constants, names, symbolic, opset), inputs)


def reference(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Array]:
    """What ONNX's reference computes."""
    return list(ReferenceEvaluator(model).run(None, dict(inputs)))


def assert_equal(found: Sequence[Array], wanted: Sequence[Array]) -> None:
    """Equality of every element, type and shape."""
    assert len(found) == len(wanted)
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"output {number}: {a.dtype}{a.shape}, not {b.dtype}{b.shape}"
        np.testing.assert_array_equal(a, b, err_msg=f"output {number}")
