"""LSTM, GRU and RNN: against the equations of ONNX's documentation written in numpy, and those against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxc
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from single_node import compiled, model_of

Array = npt.NDArray[Any]
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


# Function, default alpha, default beta; None where it has none.
FUNCTIONS: Mapping[str, tuple[Callable[[Array, float, float], Array], float | None, float | None]] = {
    "Relu": (lambda x, a, b: np.maximum(x, 0), None, None),
    "Tanh": (lambda x, a, b: np.tanh(x), None, None),
    "Sigmoid": (lambda x, a, b: sigmoid(x), None, None),
    "Affine": (lambda x, a, b: a * x + b, 1.0, 0.0),
    "LeakyRelu": (lambda x, a, b: np.where(x >= 0, x, a * x), 0.01, None),
    "ThresholdedRelu": (lambda x, a, b: np.where(x > a, x, 0), 1.0, None),
    "ScaledTanh": (lambda x, a, b: a * np.tanh(b * x), 1.0, 1.0),
    "HardSigmoid": (lambda x, a, b: np.clip(a * x + b, 0, 1), 0.2, 0.5),
    "Elu": (lambda x, a, b: np.where(x >= 0, x, a * np.expm1(np.minimum(x, 0))), 1.0, None),
    "Softsign": (lambda x, a, b: x / (1 + np.abs(x)), None, None),
    "Softplus": (lambda x, a, b: np.logaddexp(0, x), None, None),
}


def clipped(function: Callable[[Array, float, float], Array], a: float, b: float, clip: float, x: Array) -> Array:
    return function(np.clip(x, -clip, clip), a, b)


@dataclass
class Layer:
    """A layer with its operands by name, in ONNX's layout 0."""

    op: str
    operands: dict[str, Array]
    attributes: dict[str, Any] = field(default_factory=dict)

    def names(self) -> list[str]:
        return ["X", "W", "R", "B", "sequence_lens", "initial_h"] + ["initial_c", "P"] * (self.op == "LSTM")

    def model(self, constant: bool = True, symbolic: bool = False, layout: int = 0) -> onnx.ModelProto:
        """One node; weights are initializers or inputs."""
        weights = {"W", "R", "B", "P"} if constant else set()
        operands = self.arranged(layout)
        names = [name if name in operands else "" for name in self.names()]
        outputs = ["Y", "Y_h", "Y_c"][: 3 if self.op == "LSTM" else 2]
        attributes = self.attributes | ({"layout": 1} if layout else {})
        node = helper.make_node(self.op, names, outputs, hidden_size=operands["R"].shape[2], **attributes)
        inputs = []
        for name, array in operands.items():
            shape: list[int | str] = list(array.shape)
            if symbolic and name not in ("W", "R", "B", "P"):
                axes = {"X": {layout: "steps", 1 - layout: "batch"}, "sequence_lens": {0: "batch"}}
                for axis, text in axes.get(name, {1 - layout: "batch"}).items():
                    shape[axis] = text
            if name not in weights:
                inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape))
        dtype = helper.np_dtype_to_tensor_dtype(operands["X"].dtype)
        graph = helper.make_graph(
            [node],
            "layer",
            inputs,
            [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
            [onnx.numpy_helper.from_array(operands[name], name) for name in sorted(weights & operands.keys())],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)

    def arranged(self, layout: int) -> dict[str, Array]:
        turned = {"X", "initial_h", "initial_c"} if layout else set()
        return {n: np.ascontiguousarray(a.swapaxes(0, 1)) if n in turned else a for n, a in self.operands.items()}

    def inputs(self, model: onnx.ModelProto, layout: int = 0) -> dict[str, Array]:
        return {value.name: self.arranged(layout)[value.name] for value in model.graph.input}

    def activations(self) -> list[Callable[[Array], Array]]:
        """All of them, clipped; those of the second direction follow the first's."""
        names = self.attributes.get("activations") or DEFAULTS[self.op] * 2
        alphas, betas = (iter(self.attributes.get(f"activation_{n}", ())) for n in ("alpha", "beta"))
        clip = self.attributes.get("clip", np.inf)
        found: list[Callable[[Array], Array]] = []
        for name in names:
            function, alpha, beta = FUNCTIONS[name]
            a = 0.0 if alpha is None else next(alphas, alpha)
            b = 0.0 if beta is None else next(betas, beta)
            found.append(partial(clipped, function, a, b, clip))
        return found

    def expected(self) -> list[Array]:
        """Y, Y_h and, for an LSTM, Y_c, computed in f64."""
        o = {name: array.astype(np.float64) for name, array in self.operands.items()}
        steps, batch, _ = o["X"].shape
        directions, hidden = o["R"].shape[0], o["R"].shape[2]
        lengths = self.operands.get("sequence_lens", np.full(batch, steps))
        y = np.zeros((steps, directions, batch, hidden))
        last_h, last_c = np.zeros((2, directions, batch, hidden))
        count = len(DEFAULTS[self.op])
        for d in range(directions):
            functions = self.activations()[d * count : (d + 1) * count]
            backwards = self.attributes.get("direction") == "reverse" or d == 1
            for b in range(batch):
                h = o["initial_h"][d, b] if "initial_h" in o else np.zeros(hidden)
                c = o["initial_c"][d, b] if "initial_c" in o else np.zeros(hidden)
                times = range(int(lengths[b]))
                for t in reversed(times) if backwards else times:
                    h, c = self.step(o, d, o["X"][t, b], h, c, functions)
                    y[t, d, b] = h
                last_h[d, b], last_c[d, b] = h, c
        return [y, last_h, last_c][: 3 if self.op == "LSTM" else 2]

    def step(
        self, o: dict[str, Array], d: int, x: Array, h: Array, c: Array, functions: list[Callable[[Array], Array]]
    ) -> tuple[Array, Array]:
        gates, hidden = GATES[self.op], len(h)
        bias = o["B"][d] if "B" in o else np.zeros(2 * gates * hidden)
        given = (o["W"][d] @ x + bias[: gates * hidden]).reshape(gates, hidden)
        inner_bias = bias[gates * hidden :].reshape(gates, hidden)
        r = o["R"][d].reshape(gates, hidden, hidden)
        f, g = functions[0], functions[-1] if self.op == "GRU" else functions[min(1, len(functions) - 1)]
        if self.op == "RNN":
            return f(given[0] + r[0] @ h + inner_bias[0]), c
        sums = given + r @ h + inner_bias
        if self.op == "GRU":
            z, reset = f(sums[0]), f(sums[1])
            if self.attributes.get("linear_before_reset"):
                candidate = g(given[2] + reset * (r[2] @ h + inner_bias[2]))
            else:
                candidate = g(given[2] + r[2] @ (reset * h) + inner_bias[2])
            return (1 - z) * candidate + z * h, c
        peep = o["P"][d].reshape(3, hidden) if "P" in o else np.zeros((3, hidden))
        i, forget = f(sums[0] + peep[0] * c), f(sums[2] + peep[2] * c)
        if self.attributes.get("input_forget"):
            forget = 1 - i
        c = forget * c + i * g(sums[3])
        return f(sums[1] + peep[1] * c) * functions[2](c), c


def layer(
    op: str,
    steps: int,
    batch: int,
    width: int,
    hidden: int,
    direction: str = "forward",
    optional: tuple[str, ...] = (),
    seed: int = 0,
    dtype: str = "float32",
    **attributes: Any,
) -> Layer:
    """A layer with random operands, those named in `optional` included."""
    random, gates, d = np.random.default_rng(seed), GATES[op], 2 if direction == "bidirectional" else 1
    shapes = {
        "X": (steps, batch, width), "W": (d, gates * hidden, width), "R": (d, gates * hidden, hidden),
        "B": (d, 2 * gates * hidden), "initial_h": (d, batch, hidden), "initial_c": (d, batch, hidden),
        "P": (d, 3 * hidden),
    }  # fmt: skip
    operands: dict[str, Array] = {}
    for name, shape in shapes.items():
        wanted = name in ("X", "W", "R") or (name in optional and (op == "LSTM" or name not in ("initial_c", "P")))
        scale = 0.5 if name in ("W", "R", "B", "P") else 1.0
        if wanted:
            operands[name] = (random.standard_normal(shape) * scale).astype(dtype)
    if "sequence_lens" in optional:
        operands["sequence_lens"] = random.integers(1, steps + 1, batch).astype(np.int32)
    return Layer(op, operands, {"direction": direction, **attributes})


def check(found: Layer, tolerance: float = 2e-5, layout: int = 0, **how: Any) -> None:
    model = found.model(layout=layout, **how)
    results = onnxc.compile(model).run(found.inputs(model, layout))
    axes = {"Y": (2, 0, 1, 3), "Y_h": (1, 0, 2), "Y_c": (1, 0, 2)}
    for (name, result), wanted in zip(results.items(), found.expected(), strict=True):
        wanted = wanted.transpose(axes[name]) if layout else wanted
        assert result.dtype == found.operands["X"].dtype and result.shape == wanted.shape
        np.testing.assert_allclose(result, wanted, rtol=tolerance, atol=tolerance, err_msg=name)


OPTIONAL = ("B", "sequence_lens", "initial_h", "initial_c", "P")


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    op = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    attributes: dict[str, Any] = {}
    if op == "GRU":
        attributes["linear_before_reset"] = draw(st.integers(0, 1))
    if op == "LSTM" and draw(st.booleans()):
        attributes["input_forget"] = 1
    if draw(st.booleans()):
        attributes["clip"] = 0.8
    if draw(st.booleans()):
        count = len(DEFAULTS[op]) * (2 if direction == "bidirectional" else 1)
        names = draw(st.lists(st.sampled_from(sorted(FUNCTIONS)), min_size=count, max_size=count))
        attributes["activations"] = names
        alphas = [name for name in names if FUNCTIONS[name][1] is not None]
        betas = [name for name in names if FUNCTIONS[name][2] is not None]
        if draw(st.booleans()) and alphas:
            attributes["activation_alpha"] = [0.3 + 0.1 * n for n in range(len(alphas))]
        if draw(st.booleans()) and betas:
            attributes["activation_beta"] = [0.7 - 0.1 * n for n in range(len(betas))]
    steps, batch, width, hidden = (draw(st.integers(1, high)) for high in (4, 5, 6, 35))
    optional = tuple(draw(st.lists(st.sampled_from(OPTIONAL), unique=True)))
    return layer(op, steps, batch, width, hidden, direction, optional, draw(st.integers(0, 99)), **attributes)


@settings(max_examples=25, deadline=None)
@given(layers(), st.booleans(), st.booleans(), st.integers(0, 1))
def test_any_layer(found: Layer, constant: bool, symbolic: bool, layout: int) -> None:
    check(found, 1e-4, layout, constant=constant, symbolic=symbolic)


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_many_rows(op: str, direction: str) -> None:
    """More rows of the batch than share a load of the weights, and some left over; several blocks of hidden units."""
    check(layer(op, 5, 23, 12, 40, direction, OPTIONAL), symbolic=True)
    check(layer(op, 3, 16, 12, 64, direction, ("B",)))


@pytest.mark.parametrize("op", GATES)
def test_hidden_units_shared_among_threads(op: str) -> None:
    hidden = {"LSTM": 260, "GRU": 300, "RNN": 520}[op]
    check(layer(op, 3, 1, 4, hidden, optional=("B", "initial_h")), 1e-4)


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float16", 4e-3)])
def test_other_types(op: str, dtype: str, tolerance: float) -> None:
    check(layer(op, 4, 3, 5, 19, "bidirectional", OPTIONAL, dtype=dtype), tolerance)


@pytest.mark.parametrize(
    "found",
    [
        layer("LSTM", 5, 3, 4, 6, "bidirectional", ("B", "sequence_lens", "initial_h", "initial_c", "P")),
        layer("LSTM", 4, 2, 4, 6, "reverse", ("B", "initial_c"), clip=0.7),
        layer("LSTM", 4, 2, 4, 6, "reverse", ("B", "initial_c"), input_forget=1),
        layer("LSTM", 4, 2, 4, 6, activations=["HardSigmoid", "Softsign", "LeakyRelu"], activation_alpha=[0.3, 0.4]),
        layer("GRU", 5, 3, 4, 6, "bidirectional", ("B", "sequence_lens", "initial_h"), linear_before_reset=1),
        layer("GRU", 5, 3, 4, 6, "reverse", ("B", "initial_h"), clip=0.7),
        layer("RNN", 5, 3, 4, 6, "bidirectional", ("B", "sequence_lens", "initial_h"), activations=["Relu", "Tanh"]),
    ],
)
def test_the_equations_are_those_of_onnx_runtime(found: Layer) -> None:
    model = found.model()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for result, wanted in zip(session.run(None, found.inputs(model)), found.expected(), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)


def test_an_unknown_activation_is_refused() -> None:
    found = layer("RNN", 2, 2, 2, 2, activations=["Swish"])
    with pytest.raises(onnxc.ModelError, match="Swish"):
        onnxc.compile(found.model())


def test_no_steps_leave_the_initial_state() -> None:
    found = layer("LSTM", 1, 2, 3, 4, optional=("initial_h", "initial_c"))
    model = found.model(symbolic=True)
    inputs = found.inputs(model) | {"X": np.zeros((0, 2, 3), np.float32)}
    y, h, c = onnxc.compile(model).run(inputs).values()
    assert y.shape == (0, 1, 2, 4)
    np.testing.assert_array_equal(h, inputs["initial_h"])
    np.testing.assert_array_equal(c, inputs["initial_c"])


def quantized(
    direction: str, hidden: int, per_column: bool, zero: bool, batch: int = 2
) -> tuple[onnx.ModelProto, Layer]:
    """An LSTM with weights of 8 bits, and the same with the floats that they stand for."""
    found = layer("LSTM", 5, batch, 12, hidden, direction, ("B", "initial_h", "initial_c", "P"))
    random, constants, operands = np.random.default_rng(7), {}, dict(found.operands)
    for name in ("W", "R"):
        stored = random.integers(-127, 128, found.operands[name].shape).astype(np.int8)
        directions, rows, _ = stored.shape
        shape = (directions, rows) if per_column else (directions,)
        scale = (random.random(shape) * 0.004 + 0.002).astype(np.float32)
        point = random.integers(-9, 10, shape).astype(np.int8) * zero
        wide = [x.reshape(directions, -1, 1).astype(np.float32) for x in (scale, point)]
        operands[name] = (stored - wide[1]) * wide[0]
        constants |= {name: stored.transpose(0, 2, 1).copy(), f"{name}_scale": scale, f"{name}_zero": point}
    constants |= {name: found.operands[name] for name in ("B", "P")}
    names = ["X", "W", "R", "B", "", "initial_h", "initial_c", "P", "W_scale", "W_zero", "R_scale", "R_zero"]
    node = helper.make_node(
        "DynamicQuantizeLSTM",
        names,
        ["Y", "Y_h", "Y_c"],
        domain="com.microsoft",
        direction=direction,
        hidden_size=hidden,
    )
    inputs = {name: found.operands[name] for name in ("X", "initial_h", "initial_c")}
    return model_of([node], inputs, constants, ["Y", "Y_h", "Y_c"], opset=21), Layer("LSTM", operands, found.attributes)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize(("direction", "hidden"), [("bidirectional", 20), ("forward", 8)])
def test_weights_of_8_bits(direction: str, hidden: int, per_column: bool, zero: bool) -> None:
    model, found = quantized(direction, hidden, per_column, zero)
    inputs = {value.name: found.operands[value.name] for value in model.graph.input}
    for result, wanted in zip(compiled(model, inputs), found.expected(), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-4)


def test_weights_of_8_bits_in_onnx_runtime() -> None:
    """It rounds inputs and states to 8 bits too: the results are near."""
    model, found = quantized("bidirectional", 24, False, False, batch=1)
    inputs = {value.name: found.operands[value.name] for value in model.graph.input}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for result, wanted in zip(compiled(model, inputs), session.run(None, inputs), strict=True):
        np.testing.assert_allclose(result, wanted, atol=0.05)
