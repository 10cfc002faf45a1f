"""LSTM, GRU and RNN as models of one node, and by the equations of ONNX's documentation in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

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


def as_it_is(x: Array) -> Array:
    return x


def through_bytes(x: Array) -> Array:
    """DynamicQuantizeLinear, and back."""
    wide = x.astype(np.float32)
    low, high = min(wide.min(), np.float32(0)), max(wide.max(), np.float32(0))
    scale = np.float32(1) if low == high else (high - low) / np.float32(255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return ((np.clip(np.rint(wide / scale) + zero, 0, 255) - zero) * scale).astype(np.float64)


@dataclass
class Layer:
    """A layer with its operands by name, in ONNX's layout 0; `rounded` is what becomes of the inputs, and of each row's
    state, before they are multiplied."""

    op: str
    operands: dict[str, Array]
    attributes: dict[str, Any] = field(default_factory=dict)
    rounded: Callable[[Array], Array] = as_it_is

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
        o["X"] = self.rounded(o["X"])
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
                    h, c = self.step(o, d, o["X"][t, b], self.rounded(h), c, functions)
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
