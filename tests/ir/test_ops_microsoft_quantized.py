"""Quantized operators of com.microsoft against ONNX Runtime's CPU kernels, by formula where there is none."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnxc
import pytest
from against_kernel import assert_as_onnxruntime, assert_close, operator_model
from single_node import Array

Case = tuple[str, dict[str, Array | None], dict[str, Any]]
random = np.random.default_rng(0)
SYMBOLS = {2: "batch", 3: "rows"}


def real(*shape: int) -> Array:
    return random.standard_normal(shape).astype(np.float32)


def scales(*shape: int) -> Array:
    return (random.random(shape) * 0.1 + 0.01).astype(np.float32)


def u8(*shape: int) -> Array:
    return random.integers(0, 256, shape).astype(np.uint8)


def i8(*shape: int) -> Array:
    return random.integers(-128, 128, shape).astype(np.int8)


def scale(value: float) -> Array:
    return np.array(value, np.float32)


def byte(value: int) -> Array:
    return np.array(value, np.int8 if value < 0 else np.uint8)


PRODUCTS: dict[str, Case] = {
    "integers": ("MatMulIntegerToFloat", {"a": u8(2, 3, 8), "b": u8(8, 5), "sa": scale(0.1), "sb": scale(0.2)}, {}),
    "columns": (
        "MatMulIntegerToFloat",
        {"a": u8(2, 3, 8), "b": i8(8, 5), "sa": scale(0.1), "sb": scales(5), "za": byte(120), "zb": i8(5),
         "bias": real(5)}, {},
    ),
    "signed": (
        "MatMulIntegerToFloat",
        {"a": i8(3, 8), "b": i8(8, 5), "sa": scales(1), "sb": scales(1), "za": i8(1), "zb": i8(1), "bias": real(5)}, {},
    ),
    "dynamic": ("DynamicQuantizeMatMul", {"a": real(2, 3, 8), "b": u8(8, 5), "sb": scale(0.2)}, {}),
    "dynamic columns": (
        "DynamicQuantizeMatMul",
        {"a": real(2, 3, 8), "b": i8(8, 5), "sb": scales(5), "zb": i8(5), "bias": real(5)}, {},
    ),
    "gemm": (
        "QGemm",
        {"a": u8(3, 8), "sa": scale(0.1), "za": byte(100), "b": u8(8, 5), "sb": scale(0.02), "zb": byte(99),
         "c": random.integers(-99, 99, 5).astype(np.int32), "sy": scale(0.9), "zy": byte(128)}, {"alpha": 0.5},
    ),
    "gemm turned": (
        "QGemm",
        {"a": u8(8, 3), "sa": scale(0.1), "za": byte(100), "b": i8(5, 8), "sb": scales(5), "zb": i8(5), "c": None,
         "sy": scale(0.9), "zy": byte(128)}, {"transA": 1, "transB": 1},
    ),
    "gemm real": (
        "QGemm", {"a": u8(3, 8), "sa": scale(0.1), "za": byte(100), "b": u8(8, 5), "sb": scale(0.02), "zb": byte(99)},
        {},
    ),
    "attention": (
        "QAttention",
        {"x": u8(2, 3, 8), "w": i8(8, 24), "b": real(24), "sx": scale(0.02), "sw": scale(0.01), "mask": None,
         "zx": byte(128), "zw": np.array(3, np.int8)}, {"num_heads": 2},
    ),
    "attention columns": (
        "QAttention",
        {"x": u8(2, 3, 8), "w": u8(8, 24), "b": real(24), "sx": scale(0.02), "sw": scales(24),
         "mask": np.array([2, 3], np.int32), "zx": byte(128), "zw": u8(24)}, {"num_heads": 2},
    ),
    "embeddings": (
        "QEmbedLayerNormalization",
        {"ids": random.integers(0, 9, (2, 3)).astype(np.int32), "kinds": random.integers(0, 2, (2, 3)).astype(np.int32),
         "w": u8(9, 8), "p": u8(7, 8), "s": u8(4, 8), "g": u8(8), "b": u8(8), "mask": None, "sw": scale(0.02),
         "sp": scale(0.03), "ss": scale(0.04), "sg": scale(0.01), "sb": scale(0.02), "zw": byte(120), "zp": byte(110),
         "zs": byte(100), "zg": byte(5), "zb": byte(128)}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    op, operands, attributes = PRODUCTS[name]
    # Where a quotient lies in the middle of two integers, the last bit of a scale decides.
    tolerance = 1.0 if "sy" in operands else 2e-6
    outputs = ("y", "mask_index") if name == "embeddings" else ("y",)
    assert_as_onnxruntime(op, operands, attributes, outputs, tolerance=tolerance, symbols=SYMBOLS)


def between(op: str, shape: tuple[int, ...], zero: int, attributes: dict[str, Any], step: float = 1 / 256) -> Case:
    """An operator of one tensor, of the type that the zero point has."""
    x = (i8 if zero < 0 else u8)(*shape)
    operands: dict[str, Array | None] = {"x": x, "sx": scale(0.05), "zx": byte(zero)}
    return op, operands | {"sy": scale(step), "zy": byte(zero)}, attributes


POOL = {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1]}
BETWEEN: list[Case] = [
    case
    for zero in (100, -5)
    for case in (
        between("QLinearSigmoid", (2, 50), zero, {}),
        between("QLinearLeakyRelu", (2, 50), zero, {"alpha": 0.2}, 0.04),
        between("QLinearSoftmax", (2, 50), zero, {"opset": 13, "axis": -1}),
        between("QLinearSoftmax", (2, 5, 10), zero, {"opset": 11, "axis": 1}),
        between("QLinearGlobalAveragePool", (2, 5, 7, 6), zero, {}, 0.03),
        between("QLinearGlobalAveragePool", (2, 5, 7, 6), zero, {"channels_last": 1}, 0.03),
        between("QLinearAveragePool", (2, 5, 7, 6), zero, {**POOL, "strides": [2, 1]}, 0.03),
        between("QLinearAveragePool", (2, 5, 7, 6), zero, {**POOL, "count_include_pad": 1}, 0.03),
        between("QLinearAveragePool", (2, 7, 6, 5), zero, {**POOL, "channels_last": 1}, 0.03),
    )
]


@pytest.mark.parametrize("number", range(len(BETWEEN)))
def test_between_quantizations(number: int) -> None:
    op, operands, attributes = BETWEEN[number]
    assert_as_onnxruntime(op, operands, attributes, tolerance=1, symbols={2: "batch"})


@pytest.mark.parametrize("zero", [100, -5])
def test_several_tensors(zero: int) -> None:
    x, y = ((i8 if zero < 0 else u8)(*shape) for shape in ((2, 50), (50,)))
    first = {"x": x, "sx": scale(0.05), "zx": byte(zero)}
    second, third = {"v": y, "sv": scale(0.04), "zv": byte(zero)}, {"sz": scale(0.06), "zz": byte(zero)}
    condition = {"c": random.integers(0, 2, (2, 50)).astype(bool)}
    assert_as_onnxruntime("QLinearWhere", {**condition, **first, **second, **third}, symbols={2: "batch"})
    for op in ("QLinearAdd", "QLinearMul"):
        assert_as_onnxruntime(op, {**first, **second, **third}, tolerance=1, symbols={2: "batch"})
    wide = {"v": (i8 if zero < 0 else u8)(2, 7), "sv": scale(0.04), "zv": byte(zero)}
    assert_as_onnxruntime("QLinearConcat", {**third, **first, **wide}, {"axis": 1}, symbols={2: "batch"})


@pytest.mark.parametrize("last", [0, 1])
def test_convolution(last: int) -> None:
    operands: dict[str, Array | None] = {
        "x": u8(2, 7, 4, 5) if last else u8(2, 5, 7, 4), "sx": scale(0.05), "zx": byte(120), "w": i8(6, 5, 3, 3),
        "sw": scales(6), "zw": np.zeros(6, np.int8), "sy": scale(0.9), "zy": byte(128),
        "b": random.integers(-999, 999, 6).astype(np.int32),
    }  # fmt: skip
    attributes = {"channels_last": last, "pads": [1, 1, 1, 1]}
    constant = ("w", "sw", "zw", "b")
    assert_as_onnxruntime("QLinearConv", operands, attributes, tolerance=1, constant=constant, symbols={2: "batch"})


def nbits(bits: int, zeros: str, width: int, block: int, rows: int = 7) -> dict[str, Array | None]:
    """Operands of MatMulNBits."""
    blocks = -(-width // block)
    points = {"packed": u8(rows, -(-blocks * bits // 8)), "real": scales(rows, blocks) * 50, "none": None}[zeros]
    packed = u8(rows, blocks, block * bits // 8)
    return {"a": real(2, 3, width), "b": packed, "s": scales(rows, blocks), "z": points}


@pytest.mark.parametrize(("width", "block"), [(64, 32), (40, 16)])
@pytest.mark.parametrize("zeros", ["none", "packed", "real"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_of_few_bits(bits: int, zeros: str, width: int, block: int) -> None:
    operands = nbits(bits, zeros, width, block)
    attributes = {"K": width, "N": 7, "bits": bits, "block_size": block}
    if (bits, zeros) == (8, "real"):  # ONNX Runtime has no kernel
        found = run("MatMulNBits", operands, attributes)
        assert_close(found, [dequantized_product(operands, attributes)], 1e-5)
        return
    constant = ("b", "s", "z")
    assert_as_onnxruntime("MatMulNBits", operands, attributes, constant=constant, tolerance=1e-5, symbols=SYMBOLS)


def run(op: str, operands: dict[str, Array | None], attributes: dict[str, Any]) -> list[Array]:
    model, inputs = operator_model(op, operands, attributes, ("y",), tuple(set(operands) - {"a"}))
    return list(onnxc.compile(model).run(inputs).values())


def numbers(packed: Array, bits: int) -> Array:
    """The numbers along the last axis, lowest bits first."""
    each = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return np.stack(each, -1).reshape(*packed.shape[:-1], -1)


def dequantized_product(operands: dict[str, Array | None], attributes: dict[str, Any]) -> Array:
    """By the documentation: (quantized_weight - zero_point) * scale, with the group that g_idx names for a column."""
    a, packed, step, zero = (operands[name] for name in "absz")
    assert a is not None and packed is not None and step is not None
    width, bits, block = (attributes[name] for name in ("K", "bits", "block_size"))
    groups = operands.get("g")
    groups = np.arange(width) // block if groups is None else groups
    weights = numbers(packed.reshape(len(packed), -1), bits)[:, :width].astype(np.float32)
    if zero is None:
        points = np.full(step.shape, 1 << (bits - 1), np.float32)
    else:
        points = zero if zero.dtype == np.float32 else numbers(zero, bits)[:, : step.shape[1]].astype(np.float32)
    return np.asarray(a @ ((weights - points[:, groups]) * step[:, groups]).T)


@pytest.mark.parametrize("zeros", ["none", "packed", "real"])
def test_groups_of_columns(zeros: str) -> None:
    """g_idx; ONNX Runtime's kernel forgets packed zero points with it."""
    operands = {**nbits(4, zeros, 64, 32), "g": random.integers(0, 2, 64).astype(np.int32)}
    attributes = {"K": 64, "N": 7, "bits": 4, "block_size": 32}
    found = run("MatMulNBits", operands, attributes)
    assert_close(found, [dequantized_product(operands, attributes)], 1e-5)
    if zeros != "packed":
        assert_as_onnxruntime("MatMulNBits", operands, attributes, constant=tuple("bszg"), tolerance=1e-5, symbols=None)


def test_odd_bits_are_refused() -> None:
    with pytest.raises(onnxc.UnsupportedError, match="weights of 3 bits"):
        run("MatMulNBits", nbits(4, "none", 64, 32), {"K": 64, "N": 7, "bits": 3, "block_size": 32})


def test_few_bits_with_bias() -> None:
    operands = {**nbits(4, "none", 64, 32), "g": None, "bias": real(7)}
    attributes = {"K": 64, "N": 7, "bits": 4, "block_size": 32}
    assert_as_onnxruntime("MatMulNBits", operands, attributes, constant=tuple("bs"), tolerance=1e-5, symbols=SYMBOLS)


def test_few_bits_in_f16() -> None:
    operands = nbits(4, "packed", 64, 32)
    for name in "as":
        array = operands[name]
        assert array is not None
        operands[name] = array.astype(np.float16)
    attributes = {"K": 64, "N": 7, "bits": 4, "block_size": 32}
    assert_as_onnxruntime("MatMulNBits", operands, attributes, constant=tuple("bsz"), tolerance=4e-3, symbols=None)


@pytest.mark.parametrize("kind", [0, 1])
def test_codes_of_four_bits(kind: int) -> None:
    operands = {"a": real(2, 3, 40), "b": u8(7 * 40 // 2), "s": scales(18)}
    attributes = {"K": 40, "N": 7, "block_size": 16, "quant_type": kind}
    assert_as_onnxruntime("MatMulBnb4", operands, attributes, constant=tuple("bs"), tolerance=1e-5, symbols=SYMBOLS)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gathered_rows(bits: int, zeros: bool) -> None:
    operands: dict[str, Array | None] = {
        "d": u8(9, 32 * bits // 8), "i": np.array([[1, 8, 3], [0, -1, 2]]), "s": scales(9, 2),
        "z": u8(9, -(-2 * bits // 8)) if zeros else None,
    }  # fmt: skip
    attributes = {"bits": bits, "block_size": 16, "gather_axis": 0, "quantize_axis": 1}
    assert_as_onnxruntime("GatherBlockQuantized", operands, attributes, constant=tuple("dsz"), symbols=SYMBOLS)


@pytest.mark.parametrize(("gathered", "blocked"), [(0, 1), (2, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [ml_dtypes.uint4, ml_dtypes.int4])
def test_gathered_types_of_four_bits(dtype: type, gathered: int, blocked: int) -> None:
    low, high = (0, 16) if dtype is ml_dtypes.uint4 else (-8, 8)
    data, zeros = (random.integers(low, high, shape).astype(dtype) for shape in ((3, 32, 5), (3, 2, 5)))
    operands = {"d": data, "i": np.array([[1, 2], [0, -1]]), "s": scales(3, 2, 5), "z": zeros}
    attributes = {"block_size": 16, "gather_axis": gathered, "quantize_axis": blocked}
    assert_as_onnxruntime("GatherBlockQuantized", operands, attributes, constant=tuple("dsz"), symbols={2: "rows"})


def test_integer_product_and_mean() -> None:
    """MulInteger and QLinearReduceMean have no kernel for CPUs."""
    a, b = u8(3, 4), u8(4)
    found = run("MulInteger", {"a": a, "za": byte(3), "b": b, "zb": byte(5)}, {})
    assert_close(found, [(a.astype(np.int32) - 3) * (b.astype(np.int32) - 5)], 0)
    x = u8(2, 5, 6)
    operands = {"a": x, "sx": scale(0.05), "zx": byte(100), "sy": scale(0.03), "zy": byte(90)}
    found = run("QLinearReduceMean", operands, {"axes": [1, -1], "keepdims": 0})
    mean = ((x.astype(np.float32) - 100) * 0.05).mean((1, 2))
    assert_close(found, [np.clip(np.round(mean / 0.03) + 90, 0, 255).astype(np.uint8)], 1)


@pytest.mark.parametrize("name", ["dynamic columns", "gemm", "attention"])
def test_products_on_gpu(name: str, gpu: None) -> None:
    op, operands, attributes = PRODUCTS[name]
    tolerance = 1.0 if "sy" in operands else 1e-5
    assert_as_onnxruntime(op, operands, attributes, tolerance=tolerance, target="cuda")


def test_few_bits_on_gpu(gpu: None) -> None:
    attributes = {"K": 40, "N": 7, "bits": 4, "block_size": 16}
    operands = nbits(4, "packed", 40, 16)
    assert_as_onnxruntime(
        "MatMulNBits", operands, attributes, constant=tuple("bsz"), tolerance=1e-5, target="cuda"
    )  # fmt: skip
    op, operands, attributes = BETWEEN[6]
    assert_as_onnxruntime(op, operands, attributes, tolerance=1, target="cuda")
