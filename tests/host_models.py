"""What tests of models that Python runs in part have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxc
import onnxruntime
from onnx import helper
from onnxc.compiler.host.executable import HostExecutable


def text(*items: Any) -> np.ndarray:
    return np.array(items, object)


def compiled(model: onnx.ModelProto, **options: Any) -> HostExecutable:
    executable = onnxc.compile(model, **options)
    assert isinstance(executable, HostExecutable)
    return executable


def assert_same(found: Any, expected: Any) -> None:
    """Lists, arrays, dicts and None, the same in type, shape and every element."""
    assert type(found) is type(expected), (found, expected)
    if isinstance(found, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(found, np.ndarray):
        np.testing.assert_array_equal(found, expected, strict=True)
    else:
        assert found == expected


def against_onnxruntime(model: onnx.ModelProto, inputs: Mapping[str, Any]) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert_same(list(compiled(model).run(inputs).values()), session.run(None, dict(inputs)))


def with_types(model: onnx.ModelProto, **types: onnx.TypeProto) -> onnx.ModelProto:
    """The model with other types for inputs and outputs: those that ONNX's text has no syntax for."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name in types:
            value.type.CopyFrom(types[value.name])
    return model


def ml(model: onnx.ModelProto) -> onnx.ModelProto:
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 5))
    return model
