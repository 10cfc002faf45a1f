"""Steps of optimisers against the reference, for several tensors and for each attribute, at step 0 and later."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxc
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

OPTIMISERS: dict[str, tuple[int, dict[str, Any]]] = {
    "Adagrad": (1, {"decay_factor": 0.1, "epsilon": 1e-5, "norm_coefficient": 0.01}),
    "Adam": (
        2,
        {"alpha": 0.95, "beta": 0.8, "epsilon": 1e-3, "norm_coefficient": 0.01, "norm_coefficient_post": 0.1},
    ),
    "Momentum": (1, {"alpha": 0.9, "beta": 0.7, "norm_coefficient": 0.01, "mode": "standard"}),
    "Nesterov": (1, {"alpha": 0.9, "beta": 0.7, "norm_coefficient": 0.01, "mode": "nesterov"}),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("number", (0, 3))
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("target", ("host", "cuda"))
def test_step(name: str, number: int, dtype: Any, target: str, request: pytest.FixtureRequest) -> None:
    if target == "cuda":
        request.getfixturevalue("gpu")
    states, attributes = OPTIMISERS[name]
    random = np.random.default_rng(number)
    shapes = ((3,), (2, 4))
    inputs: dict[str, Any] = {"r": np.array(0.1, dtype), "t": np.array(number, np.int64)}
    for kind in range(2 + states):
        for tensor, shape in enumerate(shapes):
            inputs[f"i{kind}{tensor}"] = np.abs(random.normal(size=shape)).astype(dtype) + dtype(0.1)
    outputs = [f"o{k}" for k in range(len(shapes) * (1 + states))]
    op = "Momentum" if name == "Nesterov" else name
    node = helper.make_node(op, list(inputs), outputs, domain="ai.onnx.preview.training", **attributes)
    values = [
        helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for key, a in inputs.items()
    ]
    graph = helper.make_graph([node], "step", values, [helper.make_empty_tensor_value_info(key) for key in outputs])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.preview.training", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    found = onnxc.compile(model, target=target).run(inputs)
    for a, b in zip(found.values(), ReferenceEvaluator(model).run(None, inputs), strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=2e-5 if dtype == np.float32 else 1e-7)
