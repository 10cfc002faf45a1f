"""LSTM, GRU and RNN: against the equations of ONNX's documentation written in numpy, and those against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxc
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_kernel import HOST, run_native
from onnxc.backends.cpu.build import scheduled
from onnxc.backends.kernels import rational
from onnxc.ir import loops
from onnxc.ir import scalars as s
from onnxc.ir.dtypes import F32
from onnxc.ir.scalars import Buffer
from onnxc.tools.fit_rational import fit
from recurrent_layers import DEFAULTS, FUNCTIONS, GATES, Layer, layer


def check(found: Layer, tolerance: float = 2e-5, layout: int = 0, threads: int | None = None, **how: Any) -> str:
    """The text of the kernels, whose results are right."""
    model = found.model(layout=layout, **how)
    executable = onnxc.compile(model, threads=threads)
    results = executable.run(found.inputs(model, layout))
    axes = {"Y": (2, 0, 1, 3), "Y_h": (1, 0, 2), "Y_c": (1, 0, 2)}
    for (name, result), wanted in zip(results.items(), found.expected(), strict=True):
        wanted = wanted.transpose(axes[name]) if layout else wanted
        assert result.dtype == found.operands["X"].dtype and result.shape == wanted.shape
        np.testing.assert_allclose(result, wanted, rtol=tolerance, atol=tolerance, err_msg=name)
    return executable.dump("kernels")


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
    steps, batch, width, hidden = (draw(st.integers(1, high)) for high in (4, 9, 6, 35))
    optional = tuple(draw(st.lists(st.sampled_from(OPTIONAL), unique=True)))
    return layer(op, steps, batch, width, hidden, direction, optional, draw(st.integers(0, 99)), **attributes)


@settings(max_examples=25, deadline=None)
@given(layers(), st.booleans(), st.booleans(), st.integers(0, 1))
def test_any_layer(found: Layer, constant: bool, symbolic: bool, layout: int) -> None:
    check(found, 1e-4, layout, constant=constant, symbolic=symbolic)


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize(
    ("direction", "layout", "steps", "optional"),
    [("forward", 0, 35, ("B",)), ("reverse", 0, 24, OPTIONAL[2:]), ("bidirectional", 1, 35, ("B", *OPTIONAL[2:]))],
)
def test_products_with_the_inputs_between_those_with_the_state(
    op: str, direction: str, layout: int, steps: int, optional: tuple[str, ...]
) -> None:
    """One row whose recurrent weights are larger than the first-level cache; steps left over, and units."""
    hidden = {"LSTM": 56, "GRU": 72, "RNN": 112}[op]
    found = layer(op, steps, 1, hidden, hidden, direction, optional)
    for array in ("W", "R"):
        found.operands[array] /= 4
    text = check(found, layout=layout)
    assert not HOST.has("avx512f") or ("gemm" not in text and "inputs[" in text)


def test_products_with_the_inputs_apart_where_lengths_or_weights_come_at_run_time() -> None:
    for found, constant in (
        (layer("LSTM", 24, 1, 56, 56, "bidirectional", OPTIONAL), True),
        (layer("LSTM", 24, 1, 56, 56, "reverse"), False),
    ):
        assert "inputs[" not in check(found, constant=constant)


@pytest.mark.parametrize(
    ("batch", "direction", "layout", "constant"),
    [(7, "forward", 1, True), (8, "forward", 0, False), (19, "bidirectional", 0, True)],
)
def test_gates_apart_for_more_rows_to_a_tile(batch: int, direction: str, layout: int, constant: bool) -> None:
    found = layer("LSTM", 4, batch, 9, 40, direction, ("B", "sequence_lens", "P"))
    text = check(found, layout=layout, constant=constant, threads=1)
    assert not HOST.has("avx512f") or "for part < 2" in text


def test_quotients_are_what_the_tool_fits() -> None:
    above, below, error = fit(len(rational.ABOVE) - 1, len(rational.BELOW) - 1, rational.LIMIT)
    np.testing.assert_allclose(rational.ABOVE, above, rtol=1e-6)
    np.testing.assert_allclose(rational.BELOW, below, rtol=1e-6)
    assert error < 2.5e-8


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3"])
@pytest.mark.parametrize(
    ("op", "hidden", "batch", "steps"), [("LSTM", 56, 1, 27), ("GRU", 72, 1, 24), ("LSTM", 20, 9, 3)]
)
def test_fewer_registers(target: str, op: str, hidden: int, batch: int, steps: int) -> None:
    if not onnxc.Target.parse(target).enabled <= HOST.enabled | {"lzcnt", "movbe"}:
        pytest.skip("this machine lacks what the target has")
    found = layer(op, steps, batch, hidden, hidden, "bidirectional", ("B", "initial_h"))
    for array in ("W", "R"):
        found.operands[array] /= 4
    model = found.model()
    executable = onnxc.compile(model, target=target)
    for result, wanted in zip(executable.run(found.inputs(model)).values(), found.expected(), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=2e-5, atol=2e-5)
    assert ("inputs[" if batch == 1 else "for part <") in executable.dump("kernels")


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_quotients_of_polynomials(name: str) -> None:
    """As close as told, on either side of where they are constant, and with NaN as it is."""
    x = np.concatenate([np.linspace(-25, 25, 100001), [1e-30, -1e-8, 1e30, -1e30, np.inf, -np.inf]]).astype(np.float32)
    x = np.append(x, np.float32(np.nan))

    def element(i: Any) -> Any:
        return getattr(rational, name)(s.load(given, i)).value()

    given, result = (Buffer(n, F32, x.size) for n in ("given", "result"))
    i = loops.index_symbol("i", x.size)
    body = (loops.For("i", x.size, (loops.Store(result, i, element(i)),), "vector"),)
    kernel = scheduled(loops.Kernel("quotients", (given, result), ("result",), (), body), HOST)
    out = np.zeros_like(x)
    run_native(kernel, {"given": x, "result": out})
    wide = x[:-1].astype(np.float64)
    wanted = np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-np.maximum(wide, -700)))
    assert np.isnan(out[-1])
    if name == "tanh":
        np.testing.assert_allclose(out[:-1], wanted, rtol=4e-7, atol=0)
    else:
        np.testing.assert_allclose(out[:-1], wanted, rtol=0, atol=2e-7)


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
