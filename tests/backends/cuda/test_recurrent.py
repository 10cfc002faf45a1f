"""Recurrent layers on a GPU, by the emulator: a block that walks all steps, and a launch for each step."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from cuda_lowered import Array, lowered_graph, run_program
from onnx import helper
from onnxc.backends.cuda.kernels import recurrent
from onnxc.compiler.driver import graph_of
from onnxc.compiler.options import Options
from onnxc.ir.program import Program, Repeat
from onnxc.ir.target import Target
from recurrent_layers import Layer, layer, through_bytes

TARGET = Target.parse("cuda:sm_90")
EVERYTHING = ("B", "sequence_lens", "initial_h", "initial_c", "P")


def program_of(model: onnx.ModelProto) -> Program:
    return lowered_graph(graph_of(model, Options()), TARGET)


def check(found: Layer, layout: int = 0, checked: bool = False, **how: Any) -> Program:
    model = found.model(layout=layout, **how)
    program = program_of(model)
    inputs = found.inputs(model, layout)
    results = run_program(program, [inputs[value.name] for value in program.inputs], checked)
    axes = ((2, 0, 1, 3), (1, 0, 2), (1, 0, 2))
    for order, result, wanted in zip(axes, results, found.expected(), strict=False):
        wanted = wanted.transpose(order) if layout else wanted
        np.testing.assert_allclose(result, wanted, rtol=2e-5, atol=2e-5)
    return program


@pytest.mark.parametrize("walks", [True, False])
@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_everything_at_once(op: str, walks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions, lengths, initial states and peepholes; rows of the batch that fill no tile."""
    monkeypatch.setattr(recurrent, "ONE_BLOCK_BYTES", recurrent.ONE_BLOCK_BYTES if walks else 0)
    found = layer(op, 4, 5, 6, 12, "bidirectional", EVERYTHING)
    program = check(found, checked=True)
    repeated = any(isinstance(step, Repeat) for segment in program.segments for step in segment)
    assert repeated != walks


@pytest.mark.parametrize("walks", [True, False])
@pytest.mark.parametrize("late", [0, 1])
def test_sizes_that_only_the_run_tells(late: int, walks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "ONE_BLOCK_BYTES", recurrent.ONE_BLOCK_BYTES if walks else 0)
    found = layer("GRU", 3, 2, 5, 7, "reverse", ("B", "initial_h"), linear_before_reset=late)
    check(found, symbolic=True, layout=1, constant=False)


def test_more_units_than_warps() -> None:
    """Units that warps take in turn, and weights that are read by vectors."""
    check(layer("LSTM", 3, 1, 8, 72, optional=("B",)))


def test_large_layers_step_by_step() -> None:
    program = check(layer("RNN", 2, 1, 8, 300, optional=("B",)), checked=False)
    (loop,) = (step for segment in program.segments for step in segment if isinstance(step, Repeat))
    assert loop.trips == 2


def test_activations() -> None:
    found = layer("LSTM", 3, 2, 4, 5, optional=("B",), activations=["HardSigmoid", "Softsign", "Relu"], clip=0.4)
    check(found)


def test_halves_are_computed_as_floats() -> None:
    found = layer("LSTM", 3, 2, 4, 8, optional=("B",), dtype="float16")
    model = found.model()
    results = run_program(program_of(model), [found.operands["X"]])
    for result, wanted in zip(results, found.expected(), strict=True):
        assert result.dtype == np.float16
        np.testing.assert_allclose(result.astype(np.float32), wanted, rtol=4e-3, atol=4e-3)


def test_integer_weights() -> None:
    """com.microsoft.DynamicQuantizeLSTM: weights stay bytes, turned so that a unit's lie side by side; inputs and
    states become bytes, too."""
    random = np.random.default_rng(0)
    width, hidden = 6, 8
    x = random.standard_normal((3, 2, width)).astype(np.float32)
    w, r = (random.integers(-100, 100, (1, rows, 4 * hidden)).astype(np.int8) for rows in (width, hidden))
    scales = [(random.random((1, 4 * hidden)) * 0.01 + 0.001).astype(np.float32) for _ in range(2)]
    zeros = np.zeros((1, 4 * hidden), np.int8)
    bias = random.standard_normal((1, 8 * hidden)).astype(np.float32) * 0.2
    constants: dict[str, Array] = {
        "w": w, "r": r, "b": bias, "ws": scales[0], "wz": zeros, "rs": scales[1], "rz": zeros,
    }  # fmt: skip
    names = ["x", "w", "r", "b", "", "", "", "", "ws", "wz", "rs", "rz"]
    node = helper.make_node(
        "DynamicQuantizeLSTM", names, ["y", "h", "c"], domain="com.microsoft", hidden_size=hidden, direction="forward"
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "yhc"],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    imports = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    program = program_of(helper.make_model(graph, opset_imports=imports, ir_version=10))
    assert any(memory.dtype.name == "i8" and memory.role == "constant" for memory in program.memories.values())
    floats = {
        "X": x,
        "W": np.ascontiguousarray((w * scales[0][:, None]).transpose(0, 2, 1)),
        "R": np.ascontiguousarray((r * scales[1][:, None]).transpose(0, 2, 1)),
        "B": bias,
    }
    for result, wanted in zip(
        run_program(program, [x]), Layer("LSTM", floats, {}, through_bytes).expected(), strict=True
    ):
        np.testing.assert_allclose(result, wanted, rtol=2e-5, atol=2e-5)
