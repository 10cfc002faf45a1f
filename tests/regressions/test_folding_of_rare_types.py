"""What ONNX's reference gets wrong is not folded: constants give what the run gives."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper
from single_node import assert_equal, compiled, model_of

CASES = {
    "Resize": (
        helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear"),
        {"x": np.array([[[[1 + 2j, 3 - 1j, 0, 5j]]]], np.complex64), "scales": np.array([1, 1, 1, 1.5], np.float32)},
    ),
    "GridSample": (
        helper.make_node("GridSample", ["x", "grid"], ["y"]),
        {
            "x": np.arange(1, 10, dtype=np.int32).reshape(1, 1, 3, 3),
            "grid": np.linspace(-0.9, 0.9, 8, dtype=np.float32).reshape(1, 2, 2, 2),
        },
    ),
}


@pytest.mark.parametrize("op", CASES)
def test_constants_give_what_the_run_gives(op: str) -> None:
    node, arrays = CASES[op]
    constants = {name: array for name, array in arrays.items() if name == "scales"}
    inputs = {name: array for name, array in arrays.items() if name not in constants}
    wanted = compiled(model_of([node], inputs, constants, ["y"], opset=28), inputs)
    assert np.any(wanted[0].imag if op == "Resize" else wanted[0])
    assert_equal(compiled(model_of([node], {}, arrays, ["y"], opset=28), {}), wanted)
