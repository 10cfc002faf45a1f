"""A constant bias is what the sums of an integer product start with: also where they start with nothing else, as the
left operand's zero point is 0. It was lost there."""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from onnx.reference import ReferenceEvaluator
from small_models import model_of_text

PRODUCTS = {
    "matrix": ("[1, 6, 8]", "MatMulInteger (x, w, zero)", (8, 20), (20,)),
    "pointwise": ("[1, 8, 5, 6]", "ConvInteger (x, w, zero)", (20, 8, 1, 1), (20, 1, 1)),
    "dense": ("[1, 8, 5, 6]", "ConvInteger <pads = [1, 1, 1, 1]> (x, w, zero)", (20, 8, 3, 3), (20, 1, 1)),
    "depthwise": ("[1, 20, 5, 6]", "ConvInteger <group = 20> (x, w, zero)", (20, 1, 3, 3), (20, 1, 1)),
    "first": ("[1, 3, 9, 8]", "ConvInteger <strides = [2, 2]> (x, w, zero)", (20, 3, 3, 3), (20, 1, 1)),
}


@pytest.mark.parametrize("zero", [0, 128, 255])
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("read_twice", [False, True])
def test_a_bias_is_added(name: str, zero: int, read_twice: bool) -> None:
    """Where the sum is read without the bias too, it stays where it is."""
    shape, product, weights, bias = PRODUCTS[name]
    random = np.random.default_rng(1)
    other = "t" if read_twice else "s"
    model = model_of_text(
        f"""product (uint8{shape} x) => (int32[] y) {{
            t = {product}
            s = Add (t, bias)
            y = Mul (s, {other})
        }}""",
        w=random.integers(-128, 128, weights, np.int8),
        bias=random.integers(-900, 900, bias, np.int32),
        zero=np.array(zero, np.uint8),
    )
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    x = random.integers(0, 256, [int(d) for d in shape[1:-1].split(",")], np.uint8)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_array_equal(onnxc.compile(model)(x), expected)
