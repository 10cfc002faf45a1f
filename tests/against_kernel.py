"""One operator compiled against ONNX Runtime's CPU kernel for it, with sizes as numbers and as symbols."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxc
import onnxruntime
from onnx import helper
from single_node import Array, model_of

OPSET = 22


def operator_model(
    op: str,
    operands: Mapping[str, Array | None],
    attributes: Mapping[str, Any],
    outputs: Sequence[str],
    constant: Collection[str] = (),
    symbols: Mapping[int, str] | None = None,
    typed: int = 0,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of one node of com.microsoft (or of the domain in front of the name), and its inputs.

    `typed` is the element type that outputs are declared to have. Sizes that `symbols` holds are called so; all are
    symbols of their own where it is empty.
    """
    domain, _, name = op.rpartition(".")
    present = {key: array for key, array in operands.items() if array is not None}
    names = [key if key in present else "" for key in operands]
    node = helper.make_node(name, names, list(outputs), domain=domain or "com.microsoft", **attributes)
    inputs = {key: array for key, array in present.items() if key not in constant}
    constants = {key: array for key, array in present.items() if key in constant}
    model = model_of([node], inputs, constants, [text for text in outputs if text], symbols == {}, OPSET)
    for value in model.graph.output if typed else ():
        value.type.tensor_type.elem_type = typed
    for value in model.graph.input if symbols else ():
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value in (symbols or {}):
                dim.dim_param = (symbols or {})[dim.dim_value]
    if domain and domain != "com.microsoft":
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return model, inputs


def by_onnxruntime(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Array]:
    """What ONNX Runtime's CPU kernels compute, with no rewriting."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(inputs)))


def assert_close(found: Sequence[Array], wanted: Sequence[Array], tolerance: float) -> None:
    """Equal types and shapes; integers differ by `tolerance` at most, floats by that part of the largest."""
    assert len(found) == len(wanted)
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"output {number}: {a.dtype}{a.shape}, not {b.dtype}{b.shape}"
        if b.dtype.kind in "iub":
            assert np.abs(a.astype(np.int64) - b.astype(np.int64)).max(initial=0) <= int(tolerance), f"output {number}"
            continue
        finite = np.isfinite(b.astype(np.float64))
        largest = np.abs(b.astype(np.float64), where=finite, out=np.zeros(b.shape)).max(initial=1e-30)
        np.testing.assert_allclose(
            a.astype(np.float64), b.astype(np.float64), rtol=0, atol=tolerance * largest, err_msg=f"output {number}"
        )


def assert_as_onnxruntime(
    op: str,
    operands: Mapping[str, Array | None],
    attributes: Mapping[str, Any] | None = None,
    outputs: Sequence[str] = ("y",),
    constant: Collection[str] = (),
    tolerance: float = 2e-6,
    symbols: Mapping[int, str] | None = MappingProxyType({}),
    target: str | None = None,
) -> list[Array]:
    """The operator compiled, once for these shapes and once with symbols for sizes, gives what the kernel gives."""
    model, inputs = operator_model(op, operands, attributes or {}, outputs, constant)
    wanted = by_onnxruntime(model, inputs)
    if target is not None:
        assert_close(list(onnxc.compile(model, target=target).run(inputs).values()), wanted, tolerance)
        return wanted
    assert_close(list(onnxc.compile(model).run(inputs).values()), wanted, tolerance)
    if symbols is not None:
        symbolic, _ = operator_model(op, operands, attributes or {}, outputs, constant, symbols)
        assert_close(list(onnxc.compile(symbolic).run(inputs).values()), wanted, tolerance)
    return wanted
