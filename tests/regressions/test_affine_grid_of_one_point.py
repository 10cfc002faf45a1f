"""AffineGrid with aligned corners onto an axis of one point: the first corner, as in ONNX's reference, and no NaN."""

import numpy as np
import pytest
from onnx import helper
from single_node import compiled, model_of, reference


@pytest.mark.parametrize("size", [(2, 3, 1, 4), (2, 3, 5, 1), (2, 1, 1, 1)])
def test_one_point(size: tuple[int, ...]) -> None:
    theta = np.random.default_rng(0).integers(-3, 4, (2, 2, 3)).astype(np.float32)
    node = helper.make_node("AffineGrid", ["theta", "size"], ["grid"], align_corners=1)
    model = model_of([node], {"theta": theta}, {"size": np.int64(size)}, ["grid"])
    found, wanted = compiled(model, {"theta": theta}), reference(model, {"theta": theta})
    assert np.isfinite(found[0]).all()
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6, atol=1e-6)
