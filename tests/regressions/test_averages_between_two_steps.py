"""An AveragePool whose result has the scale of its image: a quarter of the averages lie halfway between two steps, and
what the definition rounds its sums of reals to decides. As exact sums of integers 5 % of the bytes were others."""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from onnx import helper
from single_node import assert_equal, model_of, reference


@pytest.mark.parametrize(("kernel", "pads"), [((2, 2), (0, 0, 0, 0)), ((3, 3), (1, 1, 1, 1)), ((1, 4), (0, 0, 0, 0))])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.83])
def test_averages_are_those_of_the_definition(kernel: tuple[int, int], pads: tuple[int, ...], ratio: float) -> None:
    x = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 24)).astype(np.uint8)
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s"], ["d"]),
        helper.make_node("AveragePool", ["d"], ["p"], kernel_shape=kernel, pads=pads, strides=(2, 2)),
        helper.make_node("QuantizeLinear", ["p", "t", "z"], ["y"]),
    ]
    scale = np.float32(0.0237)
    constants = {"s": scale, "t": np.float32(scale * np.float32(ratio)), "z": np.uint8(0)}
    model = model_of(nodes, {"x": x}, constants, ["y"])
    compiled = onnxc.compile(model)
    assert_equal(list(compiled.run({"x": x}).values()), reference(model, {"x": x}))
    assert ("ConvInteger" in compiled.dump("graph")) == (ratio == 0.83)
    assert ("order of sums decides" in compiled.dump("graph")) == (ratio != 0.83)
