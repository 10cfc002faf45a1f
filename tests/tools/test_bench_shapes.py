"""Matrix products of one node: that each model is what its name says."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator
from onnxc.tools.bench import shapes
from onnxc.tools.bench.shapes import Product

RNG = np.random.default_rng(1)


@pytest.mark.parametrize(
    "product",
    [
        Product((3, 5), (5, 7), True),
        Product((2, 3, 5), (2, 5, 7)),
        Product((3, 5), (7, 5), transposed=(False, True)),
        Product((5, 3), (7, 5), transposed=(True, True)),
    ],
    ids=str,
)
def test_models_multiply_what_is_named(product: Product) -> None:
    model = product.model(np.random.default_rng(2))
    onnx.checker.check_model(model, full_check=True)
    left = RNG.standard_normal(product.left, np.float32)
    given = [onnx.numpy_helper.to_array(constant) for constant in model.graph.initializer]
    right = given[0] if given else RNG.standard_normal(product.right, np.float32)
    inputs = {"a": left} if given else {"a": left, "b": right}
    (found,) = ReferenceEvaluator(model).run(None, inputs)
    a, b = (x.T if turned else x for x, turned in zip((left, right), product.transposed, strict=True))
    np.testing.assert_allclose(found, a @ b, rtol=1e-5)
    assert product.operations == 2 * found.size * a.shape[-1]


def test_shapes_are_measured_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "products", lambda: iter([Product((4, 8), (8, 16), True)]))
    result = CliRunner().invoke(shapes.main, ["--rounds", "1", "--seconds", "0.01"], catch_exceptions=False)
    assert result.exit_code == 0 and "4x8 by 8x16, constant" in result.output
    assert result.output.splitlines()[-1].startswith("1 products; ratios ")
