"""Definitions against ONNX Runtime on attributes drawn at random: what ONNX's own cases do not reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from node_cases import Evaluation
from numpy.random import Generator, default_rng

OPSET = 19
SAMPLES = 25

Sample = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Operands by name (those that start with "_" are known when compiling) and attributes."""


def floats(random: Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def integers(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def window(random: Generator, rank: int, padding: bool = True) -> dict[str, Any]:
    """Attributes of a window over `rank` axes, and its kernel."""
    kernel = random.integers(1, 4, rank).tolist()
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": random.integers(1, 4, rank).tolist()}
    if random.random() < 0.3:
        # With strides beyond the kernel ONNX Runtime crops by negative padding, which ONNX does not know.
        attributes["strides"] = [min(pair) for pair in zip(attributes["strides"], kernel, strict=True)]
        attributes["auto_pad"] = str(random.choice(["SAME_UPPER", "SAME_LOWER", "VALID"]))
    elif padding:
        attributes["pads"] = [int(random.integers(0, size)) for size in kernel * 2]
    return attributes


def conv(random: Generator) -> Sample:
    rank, group = int(random.integers(1, 4)), int(random.integers(1, 4))
    attributes = window(random, rank)
    if "auto_pad" not in attributes:
        attributes["dilations"] = random.integers(1, 3, rank).tolist()
    spatial = random.integers(6, 9, rank).tolist()
    inputs, filters = int(random.integers(1, 3)), int(random.integers(1, 3))
    operands = {
        "x": floats(random, 2, inputs * group, *spatial),
        "w": floats(random, filters * group, inputs, *attributes["kernel_shape"]),
        "b": floats(random, filters * group),
    }
    return operands, attributes | {"group": group}


def conv_transpose(random: Generator) -> Sample:
    rank, group = int(random.integers(1, 3)), int(random.integers(1, 3))
    attributes = window(random, rank)
    if "auto_pad" not in attributes:
        attributes["dilations"] = random.integers(1, 3, rank).tolist()
        attributes["output_padding"] = [int(random.integers(0, stride)) for stride in attributes["strides"]]
    spatial = random.integers(3, 6, rank).tolist()
    inputs, filters = int(random.integers(1, 3)), int(random.integers(1, 3))
    operands = {
        "x": floats(random, 1, inputs * group, *spatial),
        "w": floats(random, inputs * group, filters, *attributes["kernel_shape"]),
        "b": floats(random, filters * group),
    }
    return operands, attributes | {"group": group}


def pool(random: Generator) -> Sample:
    rank = int(random.integers(1, 4))
    attributes = window(random, rank) | {"ceil_mode": int(random.integers(0, 2))}
    if "auto_pad" not in attributes:
        attributes["dilations"] = random.integers(1, 3, rank).tolist()
    return {"x": floats(random, 2, 2, *random.integers(6, 9, rank))}, attributes


def average_pool(random: Generator) -> Sample:
    operands, attributes = pool(random)
    return operands, attributes | {"count_include_pad": int(random.integers(0, 2))}


def resize(random: Generator) -> Sample:
    x = floats(random, 1, 2, int(random.integers(2, 7)), int(random.integers(2, 7)))
    mode = str(random.choice(["nearest", "linear", "cubic"]))
    attributes: dict[str, Any] = {
        "mode": mode,
        "coordinate_transformation_mode": str(
            random.choice(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
        ),
    }
    if mode == "nearest":
        attributes["nearest_mode"] = str(random.choice(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]))
    if mode == "cubic":
        attributes["exclude_outside"] = int(random.integers(0, 2))
    operands = {"x": x, "roi": np.zeros(0, np.float32)}
    if random.random() < 0.5:
        # Products that are whole: else ONNX Runtime takes the rounded extent for align_corners, ONNX does not.
        factors = random.choice([1.0, 2.0, 3.0, 4.0], 2)
        return operands | {"_scales": np.asarray([1, 1, *factors], np.float32)}, attributes
    sizes = [1, 2, int(random.integers(1, 12)), int(random.integers(1, 12))]
    return operands | {"scales": np.zeros(0, np.float32), "_sizes": integers(*sizes)}, attributes


def slices(random: Generator) -> Sample:
    extents = random.integers(1, 7, 3)
    count = int(random.integers(1, 4))
    axes = random.permutation(3)[:count] - random.integers(0, 2) * 3
    bound = 1 << 62
    starts = random.choice([-9, -3, -1, 0, 1, 2, 9, bound, -bound], count)
    ends = random.choice([-9, -2, -1, 0, 1, 3, 9, bound, -bound], count)
    steps = random.choice([-3, -2, -1, 1, 2, 3], count)
    names = {"_starts": starts, "_ends": ends, "_axes": axes, "_steps": steps}
    return {"x": floats(random, *extents)} | {name: integers(*values) for name, values in names.items()}, {}


def pad(random: Generator) -> Sample:
    mode = str(random.choice(["constant", "edge", "reflect", "wrap"]))
    low = -1 if mode == "constant" else 0
    operands = {"x": floats(random, 4, 3, 5), "_pads": random.integers(low, 3, 6).astype(np.int64)}
    return operands | {"value": np.asarray(random.random(), np.float32)}, {"mode": mode}


def gather(random: Generator) -> Sample:
    x = floats(random, 4, 3, 5)
    axis = int(random.integers(-3, 3))
    indices = random.integers(-x.shape[axis], x.shape[axis], random.integers(1, 4, int(random.integers(0, 3))))
    name = str(random.choice(["_indices", "indices"]))
    return {"x": x, name: np.asarray(indices, np.int64)}, {"axis": axis}


EQUATIONS: tuple[tuple[Any, ...], ...] = (
    ("ij,jk->ik", 2, 2), ("bij,bjk->bik", 3, 3), ("ii->i", 2), ("ij->ji", 2), ("ij->", 2), ("i,j", 1, 1),
    ("bhqd,bhkd->bhqk", 4, 4), ("...ij,...jk->...ik", 4, 3), ("ij,kj,k->i", 2, 2, 1), ("...i,i", 3, 1),
    ("ijk,ik->j", 3, 2),
)  # fmt: skip


def einsum(random: Generator) -> Sample:
    equation, *ranks = EQUATIONS[int(random.integers(0, len(EQUATIONS)))]
    return {f"x{k}": floats(random, *[3] * rank) for k, rank in enumerate(ranks)}, {"equation": equation}


def matmul(random: Generator) -> Sample:
    batch = random.integers(1, 4, int(random.integers(0, 3))).tolist()
    left = [1 if random.random() < 0.3 else extent for extent in batch]
    right = batch[int(random.integers(0, len(batch) + 1)) :]
    a, b = floats(random, *left, 2, 5), floats(random, *right, 5, 3)
    a = a[..., 0, :] if not left and random.random() < 0.3 else a
    b = b[..., 0] if not right and random.random() < 0.3 else b
    return {"a": a, "b": b}, {}


def gemm(random: Generator) -> Sample:
    a_turned, b_turned = int(random.integers(0, 2)), int(random.integers(0, 2))
    addend = [(), (4,), (1, 4), (3, 1), (3, 4)][int(random.integers(0, 5))]
    operands = {
        "a": floats(random, *((5, 3) if a_turned else (3, 5))),
        "b": floats(random, *((4, 5) if b_turned else (5, 4))),
        "c": floats(random, *addend),
    }
    attributes = {"alpha": float(random.choice([1.0, 0.5])), "beta": float(random.choice([1.0, 0.25]))}
    return operands, attributes | {"transA": a_turned, "transB": b_turned}


def extremum(random: Generator) -> Sample:
    x = random.integers(0, 3, (3, 4, 5)).astype(np.float32)
    flags = {name: int(random.integers(0, 2)) for name in ("keepdims", "select_last_index")}
    return {"x": x}, flags | {"axis": int(random.integers(-3, 3))}


def local_response(random: Generator) -> Sample:
    return {"x": floats(random, 2, 6, 3, 2)}, {"size": int(random.choice([1, 3, 5])), "alpha": 0.5, "beta": 0.6}


def depth(random: Generator) -> Sample:
    return {"x": floats(random, 2, 8, 2, 3)}, {"blocksize": 2, "mode": str(random.choice(["DCR", "CRD"]))}


def grid(random: Generator) -> Sample:
    operands = {"x": floats(random, 2, 2, 4, 5), "grid": (random.random((2, 3, 4, 2)) * 3 - 1.5).astype(np.float32)}
    attributes = {
        "mode": str(random.choice(["bilinear", "nearest", "bicubic"])),
        "padding_mode": str(random.choice(["zeros", "border", "reflection"])),
        "align_corners": int(random.integers(0, 2)),
    }
    return operands, attributes


def reduction(random: Generator) -> Sample:
    axes = random.permutation(3)[: int(random.integers(0, 4))]
    flags = {name: int(random.integers(0, 2)) for name in ("keepdims", "noop_with_empty_axes")}
    return {"x": floats(random, 3, 4, 5) + 3, "_axes": integers(*axes)}, flags


def activation(random: Generator) -> Sample:
    return {"x": floats(random, 2, 3, 4) * 3}, {}


def biased(random: Generator) -> Sample:
    return {"x": floats(random, 2, 3, 4) * 3, "bias": floats(random, 4)}, {}


def fused_matmul(random: Generator) -> Sample:
    turned = random.integers(0, 2, 2)
    a, b = floats(random, 2, *((5, 3) if turned[0] else (3, 5))), floats(random, 2, *((4, 5) if turned[1] else (5, 4)))
    return {"a": a, "b": b}, {"alpha": 0.5, "transA": int(turned[0]), "transB": int(turned[1])}


def skip_layer_normalization(random: Generator) -> Sample:
    operands = {"x": floats(random, 2, 3, 8), "skip": floats(random, 2, 3, 8), "gamma": floats(random, 8)}
    return operands | {"beta": floats(random, 8), "bias": floats(random, 8)}, {"epsilon": 1e-5}


def quantized_pair(random: Generator) -> Sample:
    operands: dict[str, np.ndarray] = {}
    for name in ("a", "b"):
        operands[name] = random.integers(0, 256, (2, 8)).astype(np.uint8)
        operands[f"{name}_scale"] = np.asarray(0.01 + random.random(), np.float32)
        operands[f"{name}_zero"] = np.asarray(random.integers(0, 256), np.uint8)
    return operands | {"c_scale": np.asarray(1.5, np.float32), "c_zero": np.asarray(9, np.uint8)}, {}


def narrow(random: Generator, *shape: int, signed: bool = False) -> np.ndarray:
    dtype = np.int8 if signed else np.uint8
    return random.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape).astype(dtype)


def matmul_integer(random: Generator) -> Sample:
    operands = {"a": narrow(random, 2, 3, 5), "b": narrow(random, 5, 4, signed=True), "a_zero": narrow(random)}
    return operands | {"b_zero": narrow(random, *[(), (4,)][int(random.integers(0, 2))], signed=True)}, {}


def conv_integer(random: Generator) -> Sample:
    attributes = window(random, 2) | {"group": 2}
    operands = {"x": narrow(random, 2, 4, 6, 7), "w": narrow(random, 6, 2, *attributes["kernel_shape"])}
    return operands | {"x_zero": narrow(random), "w_zero": narrow(random)}, attributes


def qlinear_conv(random: Generator) -> Sample:
    attributes = window(random, 2) | {"group": 2}
    operands = {
        "x": narrow(random, 2, 4, 6, 7),
        "x_scale": np.asarray(0.02, np.float32),
        "x_zero": narrow(random),
        "w": narrow(random, 6, 2, *attributes["kernel_shape"], signed=True),
        "w_scale": (0.01 + random.random(6) / 50).astype(np.float32),
        "w_zero": np.zeros(6, np.int8),
        "y_scale": np.asarray(0.3, np.float32),
        "y_zero": narrow(random),
        "b": random.integers(-500, 500, 6).astype(np.int32),
    }
    return operands, attributes


SAMPLERS: dict[str, Callable[[Generator], Sample]] = {
    "Conv": conv, "ConvTranspose": conv_transpose, "MaxPool": pool, "AveragePool": average_pool, "LpPool": pool,
    "Resize": resize, "Slice": slices, "Pad": pad, "Gather": gather, "Einsum": einsum, "MatMul": matmul, "Gemm": gemm,
    "ArgMax": extremum, "ArgMin": extremum, "LRN": local_response, "DepthToSpace": depth, "GridSample": grid,
    "ReduceSum": reduction, "ReduceMean": reduction, "ReduceMax": reduction, "ReduceLogSumExp": reduction,
    "ReduceProd": reduction, "ReduceL2": reduction, "com.microsoft.Gelu": activation, "com.microsoft.BiasGelu": biased,
    "MatMulInteger": matmul_integer, "ConvInteger": conv_integer, "QLinearConv": qlinear_conv,
    "com.microsoft.FastGelu": biased, "com.microsoft.QuickGelu": activation, "com.microsoft.FusedMatMul": fused_matmul,
    "com.microsoft.SkipLayerNormalization": skip_layer_normalization,
    "com.microsoft.QLinearAdd": quantized_pair, "com.microsoft.QLinearMul": quantized_pair,
}  # fmt: skip

# The importer lifts older spellings; here the newest ones go to the definitions.
RENAMED = {"bilinear": "linear", "bicubic": "cubic"}


def run_both(op: str, operands: dict[str, np.ndarray], attributes: dict[str, Any], symbolic: bool) -> list[np.ndarray]:
    """[ONNX Runtime's result, the definition's]; raises what ONNX Runtime raises where it refuses."""
    names = [name if array.size or array.ndim != 1 or name.startswith("_") else "" for name, array in operands.items()]
    domain, _, name = op.rpartition(".")
    node = onnx.helper.make_node(name, names, ["y"], domain=domain, **attributes)
    present = {name: array for name, array in operands.items() if name in names}
    graph = onnx.helper.make_graph(
        [node],
        op,
        [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
         for n, a in present.items()],
        [onnx.ValueInfoProto(name="y")],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    expected = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, present)[0]
    for attribute in node.attribute:
        attribute.s = RENAMED.get(attribute.s.decode(), attribute.s.decode()).encode()
    evaluation = Evaluation(symbolic)
    for name, array in present.items():
        evaluation.add_input(name, array, name.startswith("_"))
    evaluation.run(node)
    return [expected, evaluation.arrays["y"]]


@pytest.mark.parametrize("symbolic", [False, True], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("op", SAMPLERS)
def test_random_attributes(op: str, symbolic: bool) -> None:
    random = default_rng(7)
    compared = 0
    for _ in range(SAMPLES):
        operands, attributes = SAMPLERS[op](random)
        message = f"{op} {attributes} on { {n: a.shape for n, a in operands.items()} }"
        try:
            expected, actual = run_both(op, operands, attributes, symbolic)
        except Exception as error:
            if type(error).__module__.startswith("onnxruntime"):
                continue
            raise AssertionError(message) from error
        compared += 1
        close = 1 if expected.dtype.kind in "iu" and "QLinear" in op else 1e-5  # ties of the rounding
        np.testing.assert_allclose(actual.astype(float), expected.astype(float), 1e-4, close, err_msg=message)
    assert compared >= SAMPLES // 3, "ONNX Runtime refuses most samples: draw others"
