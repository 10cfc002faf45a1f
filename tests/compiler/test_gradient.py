"""Gradients against central differences of the same model in f64, operator by operator, and for small networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxc
import pytest
import single_node
from onnx import NodeProto, helper

Array = npt.NDArray[Any]


def model_of(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Array],
    constants: Mapping[str, Array],
    outputs: Sequence[str],
    symbolic: bool = False,
) -> onnx.ModelProto:
    """A model of these nodes, which may be gradients."""
    model = single_node.model_of(nodes, inputs, constants, outputs, symbolic, opset=23)
    model.opset_import.add(domain="ai.onnx.preview.training", version=1)
    return model


def gradient_node(xs: Sequence[str], y: str, names: Sequence[str], **attributes: Any) -> NodeProto:
    return helper.make_node(
        "Gradient", list(xs), list(names), domain="ai.onnx.preview.training", xs=list(xs), y=y, **attributes
    )


def check(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Array],
    constants: Mapping[str, Array] | None = None,
    y: str = "y",
    symbolic: bool = False,
    target: str = "host",
) -> None:
    """d(sum of y)/d input for every float input, by Gradient and by differences; y is weighted, so that no gradient
    cancels."""
    constants = dict(constants or {})
    forward = onnxc.compile(model_of(nodes, inputs, constants, [y]))
    shape = forward.run(inputs)[y].shape
    constants["weight"] = np.random.default_rng(0).normal(size=shape)
    weighted = [*nodes, helper.make_node("Mul", [y, "weight"], ["weighted"])]
    xs = [name for name, a in inputs.items() if a.dtype.kind == "f"]
    names = [f"d_{name}" for name in xs]
    model = model_of([*weighted, gradient_node(xs, "weighted", names)], inputs, constants, names, symbolic)
    found = onnxc.compile(model, target=target).run(inputs)
    for name in xs:
        wanted = np.zeros_like(inputs[name])
        for place in np.ndindex(inputs[name].shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = {key: a.copy() for key, a in inputs.items()}
                moved[name][place] += step
                sides.append((forward.run(moved)[y] * constants["weight"]).sum())
            wanted[place] = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(found[f"d_{name}"], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed + len(shape)).normal(size=shape)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), **attributes: Any) -> NodeProto:
    return helper.make_node(op, list(inputs), list(outputs), **attributes)


SMOOTH = (
    "Abs", "Asinh", "Atan", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Mish", "Neg", "Relu", "Selu", "Shrink", "Sigmoid", "Sin", "Sinh", "Softplus", "Softsign", "Tan",
    "Tanh", "ThresholdedRelu", "Reciprocal",
)  # fmt: skip


def together(parts: Mapping[str, tuple[str, dict[str, Array]]]) -> tuple[list[NodeProto], dict[str, Array]]:
    """Nodes of one operand or more, each on inputs of its own, and the concatenation of all that they give."""
    nodes, inputs = [], {}
    for name, (op, operands) in parts.items():
        nodes += [node(op, [f"{name}_{key}" for key in operands], [name])]
        nodes += [node("Reshape", [name, "all"], [f"{name}_flat"])]
        inputs |= {f"{name}_{key}": array for key, array in operands.items()}
    return [*nodes, node("Concat", [f"{name}_flat" for name in parts], axis=0)], inputs


def test_unary() -> None:
    parts = {op: (op, {"x": normal(3, seed=k)}) for k, op in enumerate(SMOOTH)}
    parts |= {op: (op, {"x": np.tanh(normal(3))}) for op in ("Acos", "Asin", "Atanh")}
    parts |= {op: (op, {"x": 1.5 + np.abs(normal(3))}) for op in ("Acosh", "Log", "Sqrt")}
    nodes, inputs = together(parts)
    check(nodes, inputs, {"all": np.array([-1])})


@pytest.mark.parametrize("shapes", (((2, 3), (2, 3)), ((2, 3), (3,)), ((2, 2, 3), (2, 1))))
def test_binary(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    parts = {}
    for k, op in enumerate(("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu", "Sum", "Mean")):
        a, b = (normal(*shape, seed=10 * k + 3 * side) for side, shape in enumerate(shapes))
        if op in ("Div", "Pow"):
            a, b = np.abs(a) + 0.5, np.abs(b) + 0.5
        parts[op] = op, {"a": a, "b": b}
    nodes, inputs = together(parts)
    check(nodes, inputs, {"all": np.array([-1])})


def test_symbolic_shapes() -> None:
    nodes = [node("MatMul", ["a", "b"], ["c"]), node("Softmax", ["c"], ["d"]), node("ReduceMean", ["d", "axes"])]
    check(nodes, {"a": normal(2, 3), "b": normal(3, 4)}, {"axes": np.array([0])}, symbolic=True)


def test_softplus_at_zero() -> None:
    check([node("Softplus", ["x"])], {"x": np.zeros(2)})


def test_where_and_clip() -> None:
    inputs = {"a": normal(2, 3), "b": normal(3), "c": normal(2, 3, seed=9) > 0}
    check([node("Where", ["c", "a", "b"])], inputs)
    limits = {"low": np.array(-0.5), "high": np.array(0.7)}
    check([node("Clip", ["a", "low", "high"])], {"a": normal(3, 4)}, limits)


MOVEMENTS: dict[str, tuple[Any, ...]] = {
    "reshape": ("Reshape", [np.array([4, -1])], {}),
    "flatten": ("Flatten", [], {}),
    "transpose": ("Transpose", [], {"perm": [2, 0, 1]}),
    "unsqueeze": ("Unsqueeze", [np.array([1])], {}),
    "expand": ("Expand", [np.array([5, 2, 3, 4])], {}),
    "tile": ("Tile", [np.array([1, 2, 3])], {}),
    "slice": ("Slice", [np.array([1, 3]), np.array([3, 0]), np.array([1, 2]), np.array([1, -2])], {}),
    "gather": ("Gather", [np.array([[0, 2], [-1, 0]])], {"axis": 1}),
    "gather_nd": ("GatherND", [np.array([[0, 2], [1, 0], [0, 2]])], {}),
    "pad": ("Pad", [np.array([0, 1, 2, 1, 0, -1])], {}),
    "reflect": ("Pad", [np.array([0, 1, 2, 0, 0, 1])], {"mode": "reflect"}),
    "trilu": ("Trilu", [], {"upper": 0}),
    "cumsum": ("CumSum", [np.array(1)], {"exclusive": 1}),
}


@pytest.mark.parametrize("name", MOVEMENTS)
def test_movement(name: str) -> None:
    op, operands, attributes = MOVEMENTS[name]
    constants = {f"i{k}": a for k, a in enumerate(operands)}
    check([node(op, ["x", *constants], **attributes)], {"x": normal(2, 3, 4)}, constants)


def test_concat_and_split() -> None:
    parts = [node("Concat", ["a", "b"], ["c"], axis=1), node("Split", ["c"], ["p", "q", "r"], axis=1, num_outputs=3)]
    check([*parts, node("Mul", ["p", "r"])], {"a": normal(2, 4), "b": normal(2, 2)})


REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")


@pytest.mark.parametrize("axes", ([0, -1], [], [0, 1, 2]))
def test_reductions(axes: list[int]) -> None:
    nodes, inputs = [], {}
    for k, name in enumerate(REDUCTIONS):
        inputs[name.lower()] = np.abs(normal(2, 3, 2, seed=k)) + 0.1
        operands = [name.lower(), "axes"] if axes else [name.lower()]
        nodes += [node(f"Reduce{name}", operands, [name], keepdims=k % 2)]
        nodes += [node("Reshape", [name, "all"], [f"{name}_flat"])]
    nodes += [node("Concat", [f"{name}_flat" for name in REDUCTIONS], axis=0)]
    check(nodes, inputs, {"axes": np.array(axes, np.int64), "all": np.array([-1])})


def test_product_with_zeros() -> None:
    x = np.array([[2.0, 0, 3], [0, 0, 1], [4, 5, 6]])
    check([node("ReduceProd", ["x", "axes"])], {"x": x}, {"axes": np.array([1])})


@pytest.mark.parametrize(
    "shapes", (((2, 3), (3, 4)), ((5, 2, 3), (3, 4)), ((3,), (5, 3, 2)), ((2, 3), (3,)), ((3,), (3,)))
)
def test_matmul(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    check([node("MatMul", ["a", "b"])], {"a": normal(*shapes[0]), "b": normal(*shapes[1], seed=2)})


@pytest.mark.parametrize("turned", (0, 1))
def test_gemm(turned: int) -> None:
    shapes = ((3, 2), (4, 3)) if turned else ((2, 3), (3, 4))
    inputs = {"a": normal(*shapes[0]), "b": normal(*shapes[1], seed=4), "c": normal(4)}
    check([node("Gemm", ["a", "b", "c"], transA=turned, transB=turned, alpha=0.5, beta=2.0)], inputs)


@pytest.mark.parametrize("equation", ("ab,bc->ac", "abc,acd->bd", "ab,c->b"))
def test_einsum(equation: str) -> None:
    sizes = dict(zip("abcd", (2, 3, 4, 5), strict=True))
    terms = equation.split("->")[0].split(",")
    inputs = {f"x{k}": normal(*(sizes[i] for i in term), seed=k) for k, term in enumerate(terms)}
    check([node("Einsum", list(inputs), equation=equation)], inputs)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"strides": [2, 3], "pads": [1, 0, 1, 2]},
    "dilated": {"dilations": [2, 1], "pads": [0, 1, 2, 0]},
    "grouped": {"group": 2},
    "same": {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str) -> None:
    attributes = CONVOLUTIONS[name]
    inputs = {"x": normal(2, 4, 7, 6), "w": normal(2, 4 // attributes.get("group", 1), 3, 2), "b": normal(2)}
    check([node("Conv", ["x", "w", "b"], **attributes)], inputs)


@pytest.mark.parametrize("op", ("MaxPool", "AveragePool"))
@pytest.mark.parametrize("pads", ([0, 0, 0, 0], [1, 1, 0, 1]))
def test_pooling(op: str, pads: list[int]) -> None:
    check([node(op, ["x"], kernel_shape=[2, 3], strides=[2, 1], pads=pads)], {"x": normal(1, 2, 5, 5)})


@pytest.mark.parametrize("op", ("GlobalAveragePool", "GlobalMaxPool", "LpNormalization", "Softmax", "LogSoftmax"))
def test_over_axes(op: str) -> None:
    check([node(op, ["x"])], {"x": normal(2, 3, 4)})


def test_normalisations() -> None:
    x, channels = normal(2, 4, 5), {"s": normal(4), "b": normal(4, seed=3)}
    statistics = {"m": normal(4, seed=5), "v": np.abs(normal(4, seed=6)) + 0.5}
    check([node("BatchNormalization", ["x", "s", "b", "m", "v"])], {"x": x, **channels, **statistics})
    check([node("InstanceNormalization", ["x", "s", "b"])], {"x": x, **channels})
    check([node("GroupNormalization", ["x", "s", "b"], num_groups=2, stash_type=11)], {"x": x, **channels})
    check(
        [node("LayerNormalization", ["x", "s", "b"], stash_type=11)], {"x": x, "s": normal(5), "b": normal(5, seed=3)}
    )


def network() -> tuple[list[NodeProto], dict[str, Array], dict[str, Array]]:
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("MaxPool", ["r"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", ["m"], ["f"]),
        node("Gemm", ["f", "v", "b"], ["g"]),
        node("SoftmaxCrossEntropyLoss", ["g", "labels"], ["y"]),
    ]
    inputs = {"x": normal(2, 1, 4, 4), "w": normal(2, 1, 3, 3), "v": normal(8, 3), "b": normal(3)}
    return nodes, inputs, {"labels": np.array([2, 0])}


@pytest.mark.parametrize("target", ("host", "cuda"))
def test_network(target: str, request: pytest.FixtureRequest) -> None:
    """A convolution, pooling, a linear layer and a loss."""
    if target == "cuda":
        request.getfixturevalue("gpu")
    nodes, inputs, constants = network()
    check(nodes, inputs, constants, target=target)


def test_other_values() -> None:
    """Operands other than the tensors that `xs` names: the gradient there."""
    nodes = [
        node("Mul", ["a", "b"], ["c"]),
        node("Exp", ["c"], ["y"]),
        helper.make_node("Gradient", ["p", "b"], ["d"], domain="ai.onnx.preview.training", xs=["a"], zs=["b"], y="y"),
    ]
    a, b, p = normal(3), normal(3, seed=2), normal(3, seed=3)
    model = model_of(nodes, {"a": a, "b": b, "p": p}, {}, ["y", "d"])
    found = onnxc.compile(model).run({"a": a, "b": b, "p": p})
    np.testing.assert_allclose(found["y"], np.exp(a * b))
    np.testing.assert_allclose(found["d"], b * np.exp(p * b))


def test_second_order() -> None:
    """A gradient of a gradient."""
    nodes = [
        node("Mul", ["x", "x"], ["square"]),
        node("Mul", ["square", "x"], ["cube"]),
        gradient_node(["x"], "cube", ["first"]),
        gradient_node(["x"], "first", ["second"]),
    ]
    x = normal(4)
    found = onnxc.compile(model_of(nodes, {"x": x}, {}, ["first", "second"])).run({"x": x})
    np.testing.assert_allclose(found["first"], 3 * x * x)
    np.testing.assert_allclose(found["second"], 6 * x)


def test_intermediate_and_independent() -> None:
    """By a tensor in the middle, with another path to it left out; and by one that has no part in the result."""
    nodes = [
        node("Exp", ["x"], ["h"]),
        node("Mul", ["h", "x"], ["y"]),
        gradient_node(["h", "z"], "y", ["dh", "dz"]),
    ]
    x, z = normal(4), normal(2)
    found = onnxc.compile(model_of(nodes, {"x": x, "z": z}, {}, ["dh", "dz"])).run({"x": x, "z": z})
    np.testing.assert_allclose(found["dh"], x)
    np.testing.assert_array_equal(found["dz"], np.zeros(2))


def test_refusal() -> None:
    """An operator without a derivative is named."""
    nodes = [node("Det", ["x"], ["y"]), gradient_node(["x"], "y", ["d"])]
    x = normal(2, 2)
    with pytest.raises(onnxc.OnnxcError, match="Det"):
        onnxc.compile(model_of(nodes, {"x": x}, {}, ["d"]))
