"""`onnxc check --baseline`: where a quantised model loses the accuracy of its float model."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from onnxc.compiler.options import Options
from onnxc.ir.errors import OnnxcError
from onnxc.tools import cli
from onnxc.tools.check.measured import Power
from onnxc.tools.check.sensitivity import Comparison, Sensitivities
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from small_models import model_of_text

Array = np.ndarray[Any, Any]
TEXT = """cnn (float[1, 3, 10, 10] image) => (float[1, 5] scores) {
    c1 = Conv <pads = [1, 1, 1, 1]> (image, k1, b1)
    r1 = Relu (c1)
    c2 = Conv <pads = [1, 1, 1, 1], group = 8> (r1, k2, b2)
    r2 = Clip (c2, zero, six)
    c3 = Conv (r2, k3, b3)
    s = Add (c3, r1)
    p = GlobalAveragePool (s)
    flat = Flatten (p)
    scores = Gemm (flat, m, b5)
}"""


def weights(seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)

    def drawn(*shape: int) -> Array:
        fan_in = int(np.prod(shape[1:]))
        return (random.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)

    kernels = {"k1": drawn(8, 3, 3, 3), "k2": drawn(8, 1, 3, 3), "k3": drawn(8, 8, 1, 1)}
    sizes = {"b1": 8, "b2": 8, "b3": 8, "b5": 5}
    biases = {name: 0.1 * drawn(size, 1).reshape(size) for name, size in sizes.items()}
    clamp = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    return {**kernels, **biases, **clamp, "m": drawn(5, 8).T.copy()}


def samples(count: int = 3) -> list[dict[str, Array]]:
    random = np.random.default_rng(5)
    return [{"image": random.standard_normal((1, 3, 10, 10), np.float32)} for _ in range(count)]


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.left: Iterator[dict[str, Array]] = iter(samples())

    def get_next(self) -> dict[str, Array] | None:
        return next(self.left, None)


def float_model(**changed: Array) -> onnx.ModelProto:
    model = model_of_text(TEXT, **{**weights(), **changed})
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    return model


def quantised(
    folder: Path, model: onnx.ModelProto, form: QuantFormat = QuantFormat.QDQ, per_channel: bool = True
) -> onnx.ModelProto:
    """By ONNX Runtime's quantizer, u8 activations and i8 weights."""
    logging.getLogger().setLevel(logging.ERROR)  # it advises to preprocess
    onnx.save(model, folder / "float.onnx")
    quantize_static(
        str(folder / "float.onnx"), str(folder / "int8.onnx"), Reader(), form, per_channel=per_channel,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return onnx.load(folder / "int8.onnx")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return quantised(tmp_path_factory.mktemp("pairs"), float_model())


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return quantised(tmp_path_factory.mktemp("operators"), float_model(), QuantFormat.QOperator)


def changed(model: onnx.ModelProto, change: Mapping[str, Any]) -> onnx.ModelProto:
    """The model with some constants made anew of what they were."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    found = set()
    for tensor in made.graph.initializer:
        if tensor.name in change:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(change[tensor.name](array).astype(array.dtype), tensor.name))
            found.add(tensor.name)
    assert found == set(change)
    return made


def measured(model: onnx.ModelProto, baseline: onnx.ModelProto | None = None) -> Sensitivities:
    return Comparison(model, baseline or float_model(), Options()).run(samples())


def outputs(model: onnx.ModelProto, sample: Mapping[str, Array]) -> list[Array]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(sample)))


@pytest.fixture(scope="module")
def sound(pairs: onnx.ModelProto) -> Sensitivities:
    return measured(pairs)


def test_a_sound_model(pairs: onnx.ModelProto, sound: Sensitivities) -> None:
    """Every tensor has its counterpart; the Relus and the Clip that the quantizer dropped stand behind their
    convolutions; the output's ratio is that of ONNX Runtime's results."""
    found = sound
    assert not found.unknown
    assert {layer.value for layer in found.layers} >= {"image", "r1", "r2", "c3", "s", "p", "scores"}
    assert not {"c1", "c2"} & {layer.value for layer in found.layers}
    assert all(layer.alone.lowest > 20 for layer in found.layers), [(a.value, a.alone.lowest) for a in found.layers]
    ranks = [layer.alone.lowest for layer in found.layers]
    assert ranks == sorted(ranks)
    signal = noise = 0.0
    for sample in samples():
        (right,), (mine,) = outputs(float_model(), sample), outputs(pairs, sample)
        signal, noise = signal + float(np.sum(right**2)), noise + float(np.sum((right - mine) ** 2))
    assert found.outputs["scores"].plain == pytest.approx(10 * np.log10(signal / noise), abs=0.5)


def test_alone_is_what_one_tensor_changes(pairs: onnx.ModelProto, sound: Sensitivities) -> None:
    """The input's rounding, computed here; the weights of the first layer, with ONNX Runtime."""
    layers = {layer.value: layer for layer in sound.layers}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in pairs.graph.initializer}
    scale, zero = constants["image_scale"], constants["image_zero_point"].astype(np.float32)
    images = np.concatenate([sample["image"] for sample in samples()])
    steps = np.clip(np.rint(images / scale) + zero, 0, 255)
    gap = (steps - zero) * scale - images
    expected = 10 * np.log10(np.sum(images.astype(np.float64) ** 2) / np.sum(gap.astype(np.float64) ** 2))
    assert layers["image"].alone.plain == pytest.approx(expected, abs=0.01)
    kernel = constants["k1_quantized"] * constants["k1_scale"].reshape(-1, 1, 1, 1)
    bias = constants["b1_quantized"] * constants["b1_quantized_scale"]
    plain, other = float_model(), float_model(k1=kernel.astype(np.float32), b1=bias.astype(np.float32))
    for model in (plain, other):
        model.graph.output[0].CopyFrom(onnx.ValueInfoProto(name="c1"))
    signal = noise = 0.0
    for sample in samples():
        (right,), (mine,) = outputs(plain, sample), outputs(other, sample)
        signal, noise = signal + float(np.sum(right**2)), noise + float(np.sum((right - mine) ** 2))
    weighing = layers["r1"].weighing
    assert weighing is not None
    assert weighing.plain == pytest.approx(10 * np.log10(signal / noise), abs=0.1)


def constant_of(model: onnx.ModelProto, tensor: str, kind: str) -> str:
    """The scale or zero point of a tensor, under its own name or that of the convolution before its Relu."""
    names = {tensor.name for tensor in model.graph.initializer}
    return f"{tensor}_{kind}" if f"{tensor}_{kind}" in names else f"c{tensor[1:]}_{kind}"


@pytest.mark.parametrize(
    ("form", "tensor"),
    [("pairs", "image"), ("operators", "p")],
)
def test_a_clipped_activation_is_ranked_first(tensor: str, form: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(form)
    worst = measured(changed(model, {constant_of(model, tensor, "scale"): lambda scale: scale / 6})).layers[0]
    assert worst.value == tensor
    assert "% clipped" in worst.remark


@pytest.mark.parametrize(("form", "tensor"), [("pairs", "s"), ("operators", "r2")])
def test_a_wrong_zero_point_is_ranked_first(tensor: str, form: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(form)
    change = {constant_of(model, tensor, "zero_point"): lambda zero: (zero.astype(int) + 100) % 256}
    worst = measured(changed(model, change)).layers[0]
    assert worst.value == tensor
    assert "the zero point" in worst.remark


def test_weights_of_a_wrong_zero_point_are_ranked_first(pairs: onnx.ModelProto) -> None:
    worst = measured(changed(pairs, {"k1_zero_point": lambda zero: zero + 25})).layers[0]
    assert worst.value == "r1"
    assert "k1_quantized: the weights are off by" in worst.remark


def test_a_channel_whose_scale_is_100_times_as_large(pairs: onnx.ModelProto) -> None:
    factors = np.ones(8)
    factors[5] = 100
    worst = measured(changed(pairs, {"k3_scale": lambda scale: scale * factors})).layers[0]
    assert worst.value == "c3"
    assert worst.alone.worst[0] == 5


@pytest.mark.parametrize("made_up_for", [True, False])
def test_a_channel_of_100_times_the_range_is_ranked_first(made_up_for: bool, tmp_path: Path) -> None:
    """In the float model itself, quantised per tensor: a ratio over all elements would hide it."""
    plain = weights()
    factors = np.ones((8, 1, 1, 1), np.float32)
    factors[3] = 100
    change = {"k3": plain["k3"] * factors, "b3": plain["b3"] * factors.reshape(-1)}
    if made_up_for:
        change["m"] = plain["m"] / factors.reshape(8, 1)
    model = float_model(**change)
    worst = measured(quantised(tmp_path, model, per_channel=False), model).layers[0]
    assert worst.value == "c3"
    assert "channel 3 reaches" in worst.remark
    assert worst.alone.plain > worst.alone.balanced + 10


def test_names_are_not_needed(operators: onnx.ModelProto) -> None:
    """Nodes are found again by what they compute."""
    model = onnx.ModelProto()
    model.CopyFrom(operators)
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    names = {name: f"t{i}" for i, name in enumerate(n for node in model.graph.node for n in node.output)}
    for node in model.graph.node:
        node.name = f"n{node.name[::-1]}"
        for field in (node.input, node.output):
            for place, name in enumerate(field):
                if name in names and name not in known:
                    field[place] = names[name]
    del model.graph.value_info[:]
    found = measured(model)
    assert not found.unknown
    assert {layer.value for layer in found.layers} >= {"image", "r1", "r2", "c3", "s", "p", "scores"}


def test_channels_made_alike_before_a_scale(pairs: onnx.ModelProto) -> None:
    """A product with constants that only the quantised model has is no loss; what is quantised of it has a row."""
    model = onnx.ModelProto()
    model.CopyFrom(pairs)
    factors = np.array([1, 2, 4, 1, 2, 1, 1, 8], np.float32).reshape(8, 1, 1)
    model.graph.initializer.append(numpy_helper.from_array(factors, "factors"))
    nodes = list(model.graph.node)
    place = next(i for i, node in enumerate(nodes) if node.op_type == "QuantizeLinear" and node.input[0] == "s")
    nodes[place].input[0] = "s_smoothed"
    nodes.insert(place, onnx.helper.make_node("Div", ["s", "factors"], ["s_smoothed"], "smooth"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    found = measured(model)
    layers = {layer.value: layer for layer in found.layers}
    assert not found.unknown
    assert layers["s"].alone.plain == np.inf
    assert 20 < layers["s_smoothed"].alone.plain < 60


def test_dynamic_quantisation(tmp_path: Path) -> None:
    """Scales that are computed; integers that are never dequantised one by one."""
    onnx.save(float_model(), tmp_path / "float.onnx")
    quantize_dynamic(str(tmp_path / "float.onnx"), str(tmp_path / "int8.onnx"), weight_type=QuantType.QUInt8)
    found = measured(onnx.load(tmp_path / "int8.onnx"))
    layers = {layer.value: layer for layer in found.layers}
    assert not found.unknown
    assert {"c1", "c2", "c3", "scores"} <= set(layers)
    assert all(20 < layers[name].alone.plain < 60 for name in ("c1", "c2", "c3"))
    assert layers["r1"].alone.plain == np.inf
    assert "k1_quantized" in layers["c1"].weights


def test_folded_normalisations(tmp_path: Path) -> None:
    """The float model has batch normalisations, the quantised one was made after they were folded."""
    random = np.random.default_rng(3)
    model = model_of_text(
        """bn (float[1, 3, 8, 8] image) => (float[1, 4, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (image, k1)
            n = BatchNormalization (a, scale, shift, mean, variance)
            r = Relu (n)
            y = Conv (r, k2)
        }""",
        k1=random.standard_normal((6, 3, 3, 3), np.float32), k2=random.standard_normal((4, 6, 1, 1), np.float32),
        **{name: random.random(6, np.float32) + 0.5 for name in ("scale", "shift", "mean", "variance")},
    )  # fmt: skip
    onnx.save(model, tmp_path / "plain.onnx")
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(Reader):
        def __init__(self) -> None:
            self.left = iter([{"image": random.standard_normal((1, 3, 8, 8), np.float32)} for _ in range(3)])

    quant_pre_process(str(tmp_path / "plain.onnx"), str(tmp_path / "ready.onnx"), skip_symbolic_shape=True)
    for form in (QuantFormat.QDQ, QuantFormat.QOperator):
        quantize_static(str(tmp_path / "ready.onnx"), str(tmp_path / "int8.onnx"), Images(), form)
        comparison = Comparison(str(tmp_path / "int8.onnx"), str(tmp_path / "plain.onnx"), Options())
        found = comparison.run([{"image": random.standard_normal((1, 3, 8, 8), np.float32)}])
        assert {layer.value for layer in found.layers} == {"image", "r", "y"}
        assert all(layer.alone.plain > 20 for layer in found.layers)


def test_command(pairs: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(float_model(), tmp_path / "float.onnx")
    bad = changed(pairs, {"s_scale": lambda scale: scale / 20})
    onnx.save(bad, tmp_path / "int8.onnx")
    np.savez(tmp_path / "data.npz", image=np.concatenate([sample["image"] for sample in samples()]))
    arguments = ["check", str(tmp_path / "int8.onnx"), "--baseline", str(tmp_path / "float.onnx")]
    data = ["--data", str(tmp_path / "data.npz")]
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(cli.cli, [*arguments, *data])
    assert shown.exit_code == 0, shown.output
    assert shown.output.index("\ns ") < shown.output.index("\nr1 ")
    result = CliRunner().invoke(cli.cli, [*arguments, *data, "--json", "--least", "30"], standalone_mode=False)
    assert result.return_value == 1, result.output
    record = json.loads(result.output)
    assert (record["samples"], record["same"], record["unmatched"]) == (3, False, [])
    first = record["tensors"][0]
    assert (first["name"], first["operator"], first["nodes"]) == ("s", "Add", ["node_s"])
    assert first["alone"]["snr_db"] == first["of_values"]["snr_db"] < 10
    assert first["of_weights"]["snr_db"] == "inf"
    assert first["clipped"] > 0.1
    made_up = CliRunner().invoke(cli.cli, [*arguments, "--seeds", "2", "--json"])
    assert json.loads(made_up.output)["samples"] == 2
    assert "made up" in CliRunner().invoke(cli.cli, arguments).output and "made up" not in shown.output


def test_refusals(pairs: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(pairs, tmp_path / "int8.onnx")
    alone = CliRunner().invoke(cli.cli, ["check", str(tmp_path / "int8.onnx"), "--least", "3"])
    assert "are for --baseline" in alone.output + str(alone.exception)
    other = model_of_text("other (float[2] x, float[2] z) => (float[2] y) { y = Add (x, z) }")
    with pytest.raises(OnnxcError, match="the baseline has other inputs"):
        Comparison(pairs, other, Options())
    with pytest.raises(OnnxcError, match="no samples"):
        Comparison(pairs, float_model(), Options()).run([])


def test_one_large_channel_hides_nothing() -> None:
    power = Power()
    power.add([1e4, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0])
    assert power.plain == pytest.approx(10 * np.log10(10003 / 4))
    assert power.balanced == pytest.approx(-10 * np.log10(3.0001 / 4))
    faint = Power()
    faint.add([1.0, 1.0, 1.0, 0.0], [1e-4, 1e-4, 1e-4, 1e-4])
    assert faint.balanced == pytest.approx(-10 * np.log10((3e-4 + 1e-2) / 4))
    assert faint.worst[0] == 3
    silent = Power()
    silent.add([0.0, 0.0], [0.0, 0.0])
    assert (silent.plain, silent.balanced) == (np.inf, np.inf)
