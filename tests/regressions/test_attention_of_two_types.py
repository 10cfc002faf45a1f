"""Attention admits values of another type than its queries and keys: what is computed, and the types that come out."""

from __future__ import annotations

import numpy as np
from onnx import helper
from single_node import compiled, model_of, reference


def test_values_and_their_cache_keep_their_type() -> None:
    rng = np.random.default_rng(4)
    shapes = {"q": (1, 2, 3, 8), "k": (1, 2, 3, 8), "v": (1, 2, 3, 4), "past_k": (1, 2, 2, 8), "past_v": (1, 2, 2, 4)}
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    inputs |= {name: inputs[name].astype(np.float16) for name in ("v", "past_v")}
    node = helper.make_node("Attention", ["q", "k", "v", "", "past_k", "past_v"], ["y", "", "present_v"])
    model = model_of([node], inputs, {}, ["y", "present_v"], opset=28)
    y, present = compiled(model, inputs)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(present, np.concatenate([inputs["past_v"], inputs["v"]], 2))
    same = {name: array.astype(np.float32) for name, array in inputs.items()}
    wanted = reference(model_of([node], same, {}, ["y", "present_v"], opset=28), same)[0]
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
