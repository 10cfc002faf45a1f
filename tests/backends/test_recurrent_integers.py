"""LSTMs of 8-bit integers (com.microsoft.DynamicQuantizeLSTM): against the equations with inputs and states quantized
in numpy, and against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxc
import onnxruntime
import pytest
from native_kernel import HOST
from onnx import helper
from onnxc.backends.cpu.dot_products import DOTS
from onnxc.backends.cpu.kernels import recurrent_integers
from onnxc.backends.cuda.kernels import recurrent as on_gpus
from recurrent_layers import Layer, layer, through_bytes
from single_node import model_of

OUTPUTS = ["Y", "Y_h", "Y_c"]


def quantized(
    direction: str,
    hidden: int,
    per_column: bool = False,
    zeros: int = 0,
    batch: int = 2,
    kind: type = np.int8,
    width: int = 12,
    constant: bool = True,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray], Layer]:
    """An LSTM with weights of 8 bits whose zero points are up to `zeros` off the middle, its inputs, and the same layer
    with the floats that the weights stand for."""
    found = layer("LSTM", 5, batch, width, hidden, direction, ("B", "initial_h", "initial_c", "P"))
    random, given, operands = np.random.default_rng(7), {}, dict(found.operands)
    middle = 128 if kind == np.uint8 else 0
    for name in ("W", "R"):
        stored = (random.integers(-127, 128, found.operands[name].shape) + middle).astype(kind)
        directions, rows, _ = stored.shape
        shape = (directions, rows) if per_column else (directions,)
        scale = (random.random(shape) * 0.004 + 0.002).astype(np.float32)
        point = (np.full(shape, middle) + random.integers(-zeros, zeros, shape, endpoint=True)).astype(kind)
        wide = [x.reshape(directions, -1, 1).astype(np.float32) for x in (scale, point)]
        operands[name] = (stored - wide[1]) * wide[0]
        given |= {name: stored.transpose(0, 2, 1).copy(), f"{name}_scale": scale, f"{name}_zero": point}
    given |= {name: found.operands[name] for name in ("B", "P")}
    names = ["X", "W", "R", "B", "", "initial_h", "initial_c", "P", "W_scale", "W_zero", "R_scale", "R_zero"]
    node = helper.make_node(
        "DynamicQuantizeLSTM", names, OUTPUTS, domain="com.microsoft", direction=direction, hidden_size=hidden
    )
    inputs = {name: found.operands[name] for name in ("X", "initial_h", "initial_c")}
    constants = given if constant else {}
    inputs = inputs if constant else inputs | given
    model = model_of([node], inputs, constants, OUTPUTS, opset=21)
    return model, inputs, Layer("LSTM", operands, found.attributes, through_bytes)


def near(results: Any, expected: Any) -> None:
    """The same but where a value between two steps went to the other one."""
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, atol=5e-3)
        assert np.mean(np.abs(result - wanted)) < 1e-4


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize(
    ("direction", "hidden", "batch", "kind", "zeros"),
    [
        ("bidirectional", 20, 2, np.int8, 0),
        ("forward", 8, 1, np.int8, 0),
        ("reverse", 35, 9, np.int8, 9),  # weights of more than 8 bits less their zero points
        ("forward", 19, 3, np.uint8, 0),
        ("bidirectional", 16, 1, np.uint8, 3),
    ],
)
def test_weights_of_8_bits(direction: str, hidden: int, batch: int, kind: type, zeros: int, per_column: bool) -> None:
    model, inputs, found = quantized(direction, hidden, per_column, zeros, batch, kind)
    near(onnxc.compile(model).run(inputs).values(), found.expected())


def test_hidden_units_shared_among_threads() -> None:
    model, inputs, found = quantized("forward", 272, batch=1)
    found.rounded = through_bytes
    one, two = (onnxc.compile(model, threads=n).run(inputs) for n in (1, 2))
    near(one.values(), found.expected())
    for name in OUTPUTS:
        np.testing.assert_array_equal(one[name], two[name])


def test_weights_that_come_at_run_time_are_multiplied_as_floats() -> None:
    model, inputs, found = quantized("forward", 12, constant=False)
    for result, wanted in zip(onnxc.compile(model).run(inputs).values(), found.expected(), strict=True):
        np.testing.assert_allclose(result, wanted, atol=0.05)


@pytest.mark.parametrize(("direction", "hidden"), [("bidirectional", 24), ("forward", 96)])
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_onnx_runtime_gives_the_same(direction: str, hidden: int, kind: type) -> None:
    model, inputs, _ = quantized(direction, hidden, True, batch=1, kind=kind)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    near(onnxc.compile(model).run(inputs).values(), session.run(None, inputs))


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_the_same_bits_with_and_without_dot_products_of_bytes(kind: type) -> None:
    """Products of pairs of i16 where there is no instruction for four bytes."""
    if not onnxc.Target.parse("x86-64-v3").enabled <= HOST.enabled | {"lzcnt", "movbe"}:
        pytest.skip("this machine lacks what the target has")
    model, inputs, _ = quantized("bidirectional", 37, batch=3, kind=kind, zeros=2)
    results = [onnxc.compile(model, target=target) for target in ("x86-64-v3", "host")]
    assert "dot2_i16_i16" in results[0].dump("kernels")
    for one, other in zip(*(found.run(inputs).values() for found in results), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_same_bits_by_dot_products_of_signed_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What AArch64 has without i8mm."""
    model, inputs, _ = quantized("bidirectional", 37, batch=3)
    wanted = onnxc.compile(model).run(inputs)
    monkeypatch.setattr(recurrent_integers, "dot_of", lambda fits, target: DOTS["dot4_i8_i8"])
    executable = onnxc.compile(model)
    assert "dot4_i8_i8" in executable.dump("kernels")
    for one, other in zip(wanted.values(), executable.run(inputs).values(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("walks", [True, False])
@pytest.mark.parametrize(
    ("direction", "hidden", "batch", "zeros"),
    [("bidirectional", 20, 2, 0), ("forward", 70, 9, 0), ("reverse", 35, 3, 9)],
)
def test_on_a_gpu(
    direction: str, hidden: int, batch: int, zeros: int, walks: bool, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpus, "ONE_BLOCK_BYTES", on_gpus.ONE_BLOCK_BYTES if walks else 0)
    model, inputs, found = quantized(direction, hidden, True, zeros, batch)
    results = list(onnxc.compile(model, target="cuda").run(inputs).values())
    near(results, found.expected())
    for result, other in zip(results, onnxc.compile(model).run(inputs).values(), strict=True):
        np.testing.assert_allclose(result, other, atol=1e-5)
