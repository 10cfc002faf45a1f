"""Quantised models: their form, what they compute on ONNX Runtime and compiled, and models of every kind."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper
from onnxc.ir.errors import OnnxcError
from onnxc.tools import cli
from onnxc.tools.quantize import model as quantize_model
from onnxc.tools.quantize.driver import quantised_draft
from onnxc.tools.quantize.settings import QuantizationError, Settings
from small_models import model_of_text

Array = NDArray[Any]
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def by_onnxruntime(model: onnx.ModelProto | Path, inputs: dict[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def decibels(expected: Array, actual: Array) -> float:
    noise = float(np.sum((actual.astype(float) - expected) ** 2))
    return float(10 * np.log10(np.sum(expected.astype(float) ** 2) / max(noise, 1e-30)))


def agrees(model: onnx.ModelProto, floats: onnx.ModelProto, inputs: dict[str, Array], least: float) -> None:
    """A quantised model gives the same compiled as on ONNX Runtime, near what the float model gives."""
    onnx.checker.check_model(model, full_check=True)
    expected, theirs = by_onnxruntime(floats, inputs), by_onnxruntime(model, inputs)
    ours = onnxc.compile(model).run(inputs).values()
    for truth, other, own in zip(expected, theirs, ours, strict=True):
        assert decibels(truth, other) >= least
        assert decibels(other, own) >= least + 6  # steps that fall to the other side, and nothing else


def named(model: onnx.ModelProto, operator: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == operator]


def constant(model: onnx.ModelProto, name: str) -> Array:
    return next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name)


def definer(model: onnx.ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def residual_model() -> onnx.ModelProto:
    """Convolution with batch normalisation, pooling, a residual sum, a linear layer."""
    return model_of_text(
        """cnn (float[batch, 3, 12, 12] x) => (float[batch, 5] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1)
            b = BatchNormalization (a, scale, shift, mean, variance)
            c = Relu (b)
            d = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
            e = Conv <pads = [1, 1, 1, 1]> (d, w2, b2)
            f = Add (e, d)
            g = Relu (f)
            h = Conv <pads = [1, 1, 1, 1], group = 8> (g, w3, b2)
            i = Clip (h, zero, six)
            j = GlobalAveragePool (i)
            k = Flatten (j)
            y = Gemm <transB = 1> (k, w4, b4)
        }""",
        w1=normal(8, 3, 3, 3), scale=normal(8) + 2, shift=normal(8), mean=normal(8), variance=np.abs(normal(8)) + 1,
        w2=normal(8, 8, 3, 3) / 5, b2=normal(8), w3=normal(8, 1, 3, 3), zero=np.float32(0), six=np.float32(6),
        w4=normal(5, 8), b4=normal(5),
    )  # fmt: skip


IMAGES = {"x": normal(6, 3, 12, 12)}


def linear_model() -> onnx.ModelProto:
    return model_of_text(
        """linear (float[batch, 3, 64] x) => (float[n, 5] y, float[batch, 3, 40] z) {
            z = MatMul (x, w1)
            u = MatMul (x, w1)
            a = Tanh (u)
            r = Reshape (a, shape)
            y = Gemm <transB = 1, alpha = 0.5> (r, w2, b)
        }""",
        w1=normal(64, 40), w2=normal(5, 40), b=normal(5), shape=np.array([-1, 40]),
    )  # fmt: skip


# --- the form -------------------------------------------------------------------------------------------------------


def test_a_residual_network_becomes_integers_between_its_layers() -> None:
    model = onnxc.quantize(residual_model(), IMAGES)
    assert not named(model, "BatchNormalization") and not named(model, "Relu") and not named(model, "Clip")
    for node in named(model, "Conv") + named(model, "Gemm"):
        assert all(definer(model, name).op_type == "DequantizeLinear" for name in node.input)
    for node in named(model, "Conv") + named(model, "Add") + named(model, "MaxPool"):
        (reader,) = (other for other in model.graph.node if node.output[0] in other.input)
        assert reader.op_type == "QuantizeLinear"
    assert all(definer(model, name).op_type == "DequantizeLinear" for name in named(model, "Add")[0].input)
    agrees(model, residual_model(), IMAGES, 30)


def test_biases_have_the_scale_of_the_products() -> None:
    model = onnxc.quantize(residual_model(), IMAGES)
    for node in named(model, "Conv") + named(model, "Gemm"):
        x, w, bias = (definer(model, name) for name in node.input)
        assert constant(model, bias.input[0]).dtype == np.int32
        product = constant(model, x.input[1]) * constant(model, w.input[1])
        assert np.array_equal(constant(model, bias.input[1]), product)
        assert constant(model, w.input[0]).dtype == np.int8 and product.ndim == 1


def test_what_moves_values_keeps_their_grid() -> None:
    model = onnxc.quantize(residual_model(), IMAGES)
    pool = named(model, "MaxPool")[0]
    before = definer(model, pool.input[0])
    (after,) = (node for node in model.graph.node if pool.output[0] in node.input)
    assert list(before.input[1:]) == list(after.input[1:])


@pytest.mark.parametrize("spans", [(1.0, 2.0), (1.0, 100.0)], ids=["alike", "unlike"])
def test_concatenated_values_share_a_grid_if_none_loses_much(spans: tuple[float, float]) -> None:
    text = """concat (float[1, 4, 6, 6] x) => (float[1, 4, 4, 4] y) {
        a = Conv (x, w1)
        b = Conv (x, w2)
        c = Concat <axis = 1> (a, b)
        y = Conv (c, w3)
    }"""
    weights = {"w1": normal(4, 4, 1, 1) * spans[0], "w2": normal(4, 4, 1, 1) * spans[1], "w3": normal(4, 8, 3, 3)}
    model = onnxc.quantize(model_of_text(text, **weights), {"x": normal(1, 4, 6, 6)})
    concat = named(model, "Concat")[0]
    scales = {definer(model, name).input[1] for name in concat.input}
    assert len(scales) == (1 if spans[1] < 10 else 2)
    agrees(model, model_of_text(text, **weights), {"x": normal(1, 4, 6, 6)}, 26)


@pytest.mark.parametrize("integer_outputs", [False, True])
def test_a_smooth_activation_is_in_float_and_rounded_once(integer_outputs: bool) -> None:
    text = """silu (float[1, 3, 6, 6] x) => (float[1, 2, 6, 6] y) {
        a = Conv (x, w1)
        b = Sigmoid (a)
        c = Mul (a, b)
        y = Conv (c, w2)
    }"""
    floats = model_of_text(text, w1=normal(4, 3, 1, 1), w2=normal(2, 4, 1, 1))
    model = onnxc.quantize(floats, {"x": normal(2, 3, 6, 6)}, integer_outputs=integer_outputs)
    sigmoid = definer(model, named(model, "Sigmoid")[0].input[0])
    assert sigmoid.op_type == ("DequantizeLinear" if integer_outputs else "Conv")
    agrees(model, floats, {"x": normal(1, 3, 6, 6)}, 28)


def transformer_model() -> onnx.ModelProto:
    """A layer whose residual sum is read by a product and by another sum."""
    return model_of_text(
        """layer (float[batch, 7, 16] x) => (float[batch, 7, 16] y) {
            n = LayerNormalization <axis = -1> (x, scale)
            q = MatMul (n, wq)
            qb = Add (q, bq)
            k = MatMul (n, wk)
            kt = Transpose <perm = [0, 2, 1]> (k)
            s = MatMul (qb, kt)
            p = Softmax <axis = -1> (s)
            v = MatMul (n, wv)
            o = MatMul (p, v)
            y = Add (o, n)
        }""",
        scale=normal(16), wq=normal(16, 16) / 4, wk=normal(16, 16) / 8, wv=normal(16, 16), bq=normal(16),
    )  # fmt: skip


def test_attention_has_integer_products_and_float_sums() -> None:
    floats, x = transformer_model(), {"x": normal(4, 7, 16)}
    draft, summary = quantised_draft(floats, x, Settings())
    assert summary.quantised == {"MatMul": 5} and not summary.left
    model = draft.embedded()
    for node in named(model, "MatMul"):
        assert all(definer(model, name).op_type == "DequantizeLinear" for name in node.input)
    # The residual sum reads what the normalisation gave, not its rounding.
    last = definer(model, "y")
    assert {definer(model, name).op_type for name in last.input} == {"MatMul", "LayerNormalization"}
    agrees(model, floats, x, 25)


def test_outputs_and_what_inner_graphs_read_keep_their_values() -> None:
    text = """kept (float[1, 3, 6, 6] x, bool flag) => (float[1, 4, 6, 6] a, float[1, 2, 6, 6] y, float[1, 4, 6, 6] z) {
        c = Conv (x, w1)
        a = Relu (c)
        y = Conv (a, w2)
        z = If (flag) <
            then_branch = yes () => (float[1, 4, 6, 6] t) { t = Exp (a) },
            else_branch = no () => (float[1, 4, 6, 6] e) { e = Neg (a) }
        >
    }"""
    floats = model_of_text(text, w1=normal(4, 3, 1, 1), w2=normal(2, 4, 1, 1))
    inputs = {"x": normal(1, 3, 6, 6), "flag": np.array(False)}
    draft, summary = quantised_draft(floats, inputs, Settings())
    assert not summary.left
    assert named(draft.proto, "Relu")
    agrees(draft.embedded(), floats, inputs, 25)


def test_shared_weights_are_quantised_once() -> None:
    text = """shared (float[1, 4, 6, 6] x) => (float[1, 4, 6, 6] y) { a = Conv (x, w) y = Conv (a, w) }"""
    model = onnxc.quantize(model_of_text(text, w=normal(4, 4, 1, 1)), {"x": normal(1, 4, 6, 6)})
    first, second = named(model, "Conv")
    assert first.input[1] == second.input[1]


def test_weights_behind_constant_nodes_are_found() -> None:
    text = """folded (float[2, 4] x) => (float[2, 3] y) { t = Transpose (w) y = MatMul (x, t) }"""
    floats = model_of_text(text, w=normal(3, 4))
    draft, summary = quantised_draft(floats, {"x": normal(2, 4)}, Settings())
    assert summary.quantised == {"MatMul": 1}
    agrees(draft.embedded(), floats, {"x": normal(2, 4)}, 28)


def test_gemm_factors_go_into_the_weights() -> None:
    text = """scaled (float[2, 4] x) => (float[2, 3] y) { y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b) }"""
    floats = model_of_text(text, w=normal(4, 3), b=normal(3))
    model = onnxc.quantize(floats, {"x": normal(2, 4)})
    assert not named(model, "Gemm")[0].attribute
    agrees(model, floats, {"x": normal(2, 4)}, 28)


def test_a_channel_of_tiny_weights_does_not_overflow_its_bias() -> None:
    weights, bias = normal(4, 3, 1, 1), np.full(4, 1000, np.float32)
    weights[1] = 1e-12
    weights[2] = 0
    text = "dead (float[1, 3, 6, 6] x) => (float[1, 4, 6, 6] y) { y = Conv (x, w, b) }"
    floats = model_of_text(text, w=weights, b=bias)
    agrees(onnxc.quantize(floats, {"x": normal(1, 3, 6, 6)}), floats, {"x": normal(1, 3, 6, 6)}, 40)


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"method": "minmax"}, 28),
        ({"method": "percentile"}, 25),
        ({"method": "entropy"}, 12),
        ({"activations": "i8"}, 28),
        ({"symmetric": True}, 22),
        ({"symmetric": True, "activations": "i8"}, 22),
        ({"per_tensor": True}, 25),
        ({"correction": False}, 24),
    ],
    ids=str,
)
def test_every_way_to_quantise_agrees(settings: dict[str, Any], least: float) -> None:
    agrees(onnxc.quantize(residual_model(), IMAGES, **settings), residual_model(), IMAGES, least)


def test_bias_correction_takes_away_the_mean_error() -> None:
    """Of a layer whose operand has a mean and whose weights are rounded coarsely."""
    text = "one (float[batch, 16, 8, 8] x) => (float[batch, 8, 8, 8] y) { y = Conv (x, w, b) }"
    weights = normal(8, 16, 1, 1)
    weights[0, 0] = 60  # the one scale of all weights is large
    x = {"x": normal(8, 16, 8, 8) + 3}
    floats = model_of_text(text, w=weights, b=normal(8))
    (expected,) = by_onnxruntime(floats, x)

    def mean_error(correction: bool) -> float:
        (found,) = by_onnxruntime(onnxc.quantize(floats, x, per_tensor=True, correction=correction), x)
        return float(np.abs((found - expected).mean((0, 2, 3))).max())

    assert mean_error(True) < 0.1 * mean_error(False)


def test_nodes_are_kept_by_name_or_operator() -> None:
    floats = residual_model()
    floats.graph.node[0].name = "stem/conv"
    for pattern, count in (("stem/*", {"Conv": 2, "Gemm": 1}), ("Conv", {"Gemm": 1})):
        draft, summary = quantised_draft(floats, IMAGES, Settings(keep=[pattern]))
        assert summary.quantised == count
        assert all(reason == "it is to be kept" for *_, reason in summary.left)
        agrees(draft.embedded(), floats, IMAGES, 28)


def test_the_same_bytes_twice() -> None:
    first, second = (
        onnxc.quantize(residual_model(), IMAGES, samples=3, seed=4).SerializeToString(deterministic=True) for _ in "ab"
    )
    assert first == second
    assert first != onnxc.quantize(residual_model(), IMAGES, samples=3, seed=5).SerializeToString(deterministic=True)


def test_an_input_that_8_bits_cannot_hold_is_read_in_float() -> None:
    quiet = normal(4, 1, 4096) * np.where(np.arange(4096) % 512 < 8, 1.0, 0.01).astype(np.float32)
    text = """audio (float[1, 1, 4096] x) => (float[1, 4, 1016] y) {
        a = Conv <strides = [4]> (x, w1)
        b = Relu (a)
        y = Conv (b, w2)
    }"""
    floats = model_of_text(text, w1=normal(4, 1, 9), w2=normal(4, 4, 7))
    _, summary = quantised_draft(floats, {"x": quiet}, Settings())
    assert summary.quantised == {"Conv": 1}
    assert "8 bits hold too little of the model's input" in summary.left[0][2]
    _, summary = quantised_draft(floats, {"x": normal(4, 1, 4096)}, Settings())
    assert summary.quantised == {"Conv": 2}


@pytest.mark.parametrize("product", ["MatMul (n, w)", "Gemm <transB = 1> (n, w)"], ids=["MatMul", "Gemm"])
def test_channels_of_unlike_size_are_made_alike(product: str) -> None:
    """A few channels of a normalisation are a hundred times the others."""
    text = f"unlike (float[32, 24] x) => (float[32, 8] y) {{ n = LayerNormalization (x, scale) y = {product} }}"
    weights, scale = normal(8, 24) / 5, np.where(np.arange(24) < 2, 100, 1).astype(np.float32)
    weights[:, :2] /= 100
    floats = model_of_text(text, scale=scale, w=weights if "Gemm" in product else weights.T.copy())
    inputs = {"x": normal(32, 24)}
    (expected,) = by_onnxruntime(floats, inputs)
    found = {}
    for smooth in (True, False):
        draft, summary = quantised_draft(floats, inputs, Settings(smooth=smooth))
        assert summary.smoothed == int(smooth)
        found[smooth] = decibels(expected, by_onnxruntime(draft.embedded(), inputs)[0])
    assert found[True] > 30 and found[True] > found[False] + 10
    agrees(onnxc.quantize(floats, inputs), floats, inputs, 30)
    one_pass = iter([inputs])  # cannot be looked at twice
    assert quantised_draft(floats, one_pass, Settings())[1].smoothed == 0


def test_channels_of_depthwise_convolutions_are_made_alike() -> None:
    text = """unlike (float[4, 6, 9, 9] x) => (float[4, 6, 7, 7] y) {
        t = Tanh (x)
        n = Mul (t, size)
        y = Conv <group = 6> (n, w)
    }"""
    size = np.array([100, 1, 1, 1, 1, 1], np.float32).reshape(6, 1, 1)
    floats = model_of_text(text, size=size, w=normal(6, 1, 3, 3) / size[:, None])
    inputs = {"x": normal(4, 6, 9, 9)}
    assert quantised_draft(floats, inputs, Settings())[1].smoothed == 1
    agrees(onnxc.quantize(floats, inputs), floats, inputs, 30)


def test_portions_are_let_go() -> None:
    """Calibration keeps nothing of a portion when it asks for the next but one."""
    alive: list[weakref.ref[Array]] = []

    def batches() -> Iterator[dict[str, Array]]:
        for place in range(6):
            assert sum(ref() is not None for ref in alive) <= 2
            array = normal(1, 3, 12, 12 + 0 * place) + place
            alive.append(weakref.ref(array))
            yield {"x": array}
            del array

    _, summary = quantised_draft(residual_model(), batches, Settings())
    assert summary.samples == 6


def test_more_samples_run_at_once_and_give_the_same() -> None:
    one, many = (onnxc.quantize(residual_model(), IMAGES, batch=batch, correction=False) for batch in (1, 6))
    for node in named(one, "QuantizeLinear"):
        assert constant(one, node.input[1]) == pytest.approx(constant(many, node.input[1]), rel=1e-2)


# --- models of every kind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "weights_only", "found"), [(11, None, 13), (12, "int8", 13), (13, "int4", 21), (17, None, 17)]
)
def test_older_opsets_are_lifted(opset: int, weights_only: str | None, found: int) -> None:
    floats = residual_model() if weights_only is None else linear_model()
    floats.opset_import[0].version = opset
    floats.ir_version = 7
    model = onnxc.quantize(floats, IMAGES if weights_only is None else None, weights_only=weights_only)
    assert model.opset_import[0].version == found
    inputs = IMAGES if weights_only is None else {"x": normal(2, 3, 64)}
    agrees(model, floats, inputs, 14)


def test_functions_are_expanded() -> None:
    floats = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18, "own" : 1]>
        agraph (float[2, 8] x) => (float[2, 4] y) { y = own.dense (x, w) }
        <domain: "own", opset_import: ["" : 18]>
        dense (a, b) => (c) { c = MatMul (a, b) }
    """)
    floats.graph.initializer.append(numpy_helper.from_array(normal(8, 4), "w"))
    draft, summary = quantised_draft(floats, {"x": normal(2, 8)}, Settings())
    assert summary.quantised == {"MatMul": 1}
    agrees(draft.embedded(), floats, {"x": normal(2, 8)}, 28)


def test_external_data_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, target = tmp_path / "model.onnx", tmp_path / "out" / "small.onnx"
    target.parent.mkdir()
    onnx.save(residual_model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    inside = onnxc.quantize(path, IMAGES)
    monkeypatch.setattr(quantize_model, "LARGEST_FILE", 1)
    monkeypatch.setattr(quantize_model, "SMALLEST_OUTSIDE", 16)
    draft, _ = quantised_draft(path, IMAGES, Settings())
    files = draft.save(target)
    assert [file.name for file in files] == ["small.onnx", "small.onnx.data"]
    assert len(target.read_bytes()) < len(inside.SerializeToString())
    for expected, found in zip(by_onnxruntime(inside, IMAGES), by_onnxruntime(target, IMAGES), strict=True):
        assert np.array_equal(expected, found)
    assert np.array_equal(onnxc.compile(target)(IMAGES["x"]), onnxc.compile(inside)(IMAGES["x"]))


def test_external_data_inside_branches_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """branches (float[2, 32] x, bool flag) => (float[2, 4] y) {
        y = If (flag) <
            then_branch = yes () => (float[2, 4] t) { t = MatMul (x, w) },
            else_branch = no () => (float[2, 4] e) { u = MatMul (x, w) e = Neg (u) }
        >
    }"""
    path, target = tmp_path / "model.onnx", tmp_path / "small.onnx"
    onnx.save(model_of_text(text, w=normal(32, 4)), path, save_as_external_data=True, location="w", size_threshold=0)
    monkeypatch.setattr(quantize_model, "LARGEST_FILE", 1)
    monkeypatch.setattr(quantize_model, "SMALLEST_OUTSIDE", 16)
    draft, _ = quantised_draft(path, None, Settings(weights_only="int8"))
    assert [file.name for file in draft.save(target)] == ["small.onnx", "small.onnx.data"]
    inputs = {"x": normal(2, 32), "flag": np.array(False)}
    assert np.array_equal(by_onnxruntime(target, inputs)[0], by_onnxruntime(draft.embedded(), inputs)[0])


def test_the_model_given_is_left_alone() -> None:
    floats = residual_model()
    before = floats.SerializeToString(deterministic=True)
    for settings in ({}, {"weights_only": "int8"}):
        onnxc.quantize(floats, IMAGES, **settings)
        assert floats.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("make", "data", "settings", "message"),
    [
        (residual_model, None, {}, "needs calibration data"),
        (residual_model, [], {}, "no sample"),
        (residual_model, {"image": IMAGES["x"]}, {}, "no array for the input x"),
        (residual_model, IMAGES, {"keep": ["Conv", "Gemm"]}, "nothing to quantise.*to be kept"),
        (lambda: onnxc.quantize(residual_model(), IMAGES), IMAGES, {}, "quantised already"),
        (residual_model, {"x": np.full((1, 3, 12, 12), np.nan, np.float32)}, {}, "has NaN"),
        (
            lambda: model_of_text("f (float[2, 4] x) => (float[2, 4] y) { y = Relu (x) }"),
            {"x": normal(2, 4)},
            {},
            "nothing to quantise: the model has no Conv, Gemm or MatMul",
        ),
        (residual_model, None, {"weights_only": "int4", "keep": ["Gemm"]}, "nothing to quantise"),
    ],
    ids=["no data", "no sample", "names", "all kept", "twice", "nan", "nothing", "nothing in 4 bits"],
)
def test_what_cannot_be_quantised_is_told(make: Any, data: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        onnxc.quantize(make(), data, **settings)
    assert issubclass(QuantizationError, OnnxcError)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, data, output = (str(tmp_path / name) for name in ("model.onnx", "data.npz", "small.onnx"))
    onnx.save(residual_model(), path)
    np.savez(data, **IMAGES)
    assert cli.run(["quantize", path, "--data", data, "-o", output, "--keep", "Gemm"]) == 0
    out = capsys.readouterr().out
    assert "3 Conv in integers" in out and "left in float: Gemm_11 (Gemm): it is to be kept" in out
    assert cli.run(["quantize", path, "--weights-only", "int8", "--json", "-o", output]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["quantised"] == {"Conv": 3, "Gemm": 1} and record["files"] == [output]
    assert record["bytes_after"] < record["bytes_before"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "needs calibration data (--data)"),
        (["--data", "nothing.npz"], 2, "no such file"),
        (["--dynamic", "-o", "model.onnx"], 2, "would be overwritten"),
        (["--dynamic", "--weights-only", "int8"], 2, "in one of these ways"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    onnx.save(residual_model(), "model.onnx")
    assert cli.run(["quantize", "model.onnx", *arguments]) == code
    assert message in " ".join(capsys.readouterr().err.split())
