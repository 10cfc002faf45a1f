"""Models in 16-bit floats: integers between f32, or weights with scales of their own type."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxc
import pytest
from onnx import TensorProto, numpy_helper
from onnxc.tools.quantize.driver import quantised_draft
from onnxc.tools.quantize.settings import Settings
from small_models import model_of_text

from .test_quantize import by_onnxruntime, decibels, named, normal

TEXT = """half (float16[batch, 3, 8, 8] x, bool flag) => (float16[batch, 5] y, float16[batch, 4, 6, 6] z) {
    a = Conv (x, w1, b1)
    z = Relu (a)
    c = If (flag) <
        then_branch = yes () => (float16[batch, 4, 6, 6] t) { t = Conv (z, w2) },
        else_branch = no () => (float16[batch, 4, 6, 6] e) { e = Neg (z) }
    >
    d = Cast <to = 1> (c)
    e = Cast <to = 10> (d)
    f = GlobalAveragePool (e)
    g = Flatten (f)
    y = MatMul (g, w3)
}"""


def half_model() -> onnx.ModelProto:
    weights = {"w1": normal(4, 3, 3, 3), "b1": normal(4), "w2": normal(4, 4, 1, 1), "w3": normal(4, 5)}
    return model_of_text(TEXT, **{name: array.astype(np.float16) for name, array in weights.items()})


@pytest.mark.parametrize("given", [{}, {"dynamic": True}], ids=str)
def test_integers_lie_between_f32(given: dict[str, Any]) -> None:
    floats, inputs = half_model(), {"x": normal(2, 3, 8, 8).astype(np.float16), "flag": np.array(True)}
    draft, summary = quantised_draft(floats, inputs, Settings(**given))
    assert summary.quantised == {"Conv": 2, "MatMul": 1} and summary.widened
    model = draft.embedded()
    onnx.checker.check_model(model, full_check=True)
    assert [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)] == [
        TensorProto.FLOAT16, TensorProto.BOOL, TensorProto.FLOAT16, TensorProto.FLOAT16,
    ]  # fmt: skip
    for flag in (True, False):
        inputs["flag"] = np.array(flag)
        expected, theirs = by_onnxruntime(floats, inputs), by_onnxruntime(model, inputs)
        for truth, other, own in zip(expected, theirs, onnxc.compile(model).run(inputs).values(), strict=True):
            assert other.dtype == np.float16 and decibels(truth.astype(float), other.astype(float)) > 28
            assert decibels(other.astype(float), own.astype(float)) > 40


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize(("how", "least"), [("int8", 35), ("int4", 14)])
def test_scales_have_the_type_of_the_weights(kind: Any, how: str, least: float) -> None:
    name = "float16" if kind is np.float16 else "bfloat16"
    text = f"linear ({name}[2, 64] x) => ({name}[2, 8] y) {{ y = MatMul (x, w) }}"
    weights = (normal(64, 8) / 8).astype(kind)
    floats = model_of_text(text)
    tensor = numpy_helper.from_array(weights.astype(np.float32), "w")
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    tensor.raw_data = weights.tobytes()
    floats.graph.initializer.append(tensor)
    model = onnxc.quantize(floats, weights_only=how)
    onnx.checker.check_model(model, full_check=True)
    (scale,) = (entry for entry in model.graph.initializer if entry.name == "w_scale")
    assert scale.data_type == tensor.data_type and named(model, "MatMul")
    x = normal(2, 64).astype(kind)
    truth = x.astype(np.float64) @ weights.astype(np.float64)
    own = onnxc.compile(model).run({"x": x})["y"]
    assert own.dtype == kind and decibels(truth, own.astype(np.float64)) > least
    if kind is np.float16:
        (other,) = by_onnxruntime(model, {"x": x})
        assert decibels(other.astype(np.float64), own.astype(np.float64)) > 30
