"""Products and convolutions of bytes on a GPU, from the model to the result: tensor cores, and the bits of a CPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from onnx import helper
from onnxc.backends.cuda import nvrtc
from onnxc.backends.cuda.build import kernel_texts
from onnxc.backends.cuda.source import prelude
from onnxc.compiler.driver import graph_of, program_of
from onnxc.compiler.options import Options
from onnxc.ir.target import Target
from single_node import model_of

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(23)
TYPES = {"u8": np.uint8, "i8": np.int8}
INSTRUCTIONS = {"u8": "u8", "i8": "s8"}


def bytes_of(shape: Sequence[int], kind: str) -> Array:
    info = np.iinfo(TYPES[kind])
    return RANDOM.integers(info.min, info.max + 1, shape).astype(TYPES[kind])


def on_gpu(model: onnx.ModelProto, inputs: dict[str, Array]) -> tuple[list[Array], str]:
    """What the model computes on the emulated GPU, and its kernels' text."""
    compiled = onnxc.compile(model, target="cuda")
    return list(compiled.run(inputs).values()), compiled.dump("cuda")


def product(a: str, b: str, rows: int, constant: bool, zeros: bool) -> tuple[onnx.ModelProto, dict[str, Array], Array]:
    operands = {"a": bytes_of((rows, 70), a), "b": bytes_of((70, 48), b)}
    if zeros:
        operands |= {"za": bytes_of((), a), "zb": bytes_of((), b)}
    node = helper.make_node("MatMulInteger", list(operands), ["y"])
    known = {name: array for name, array in operands.items() if name != "a" and (constant or name[0] == "z")}
    inputs = {name: array for name, array in operands.items() if name not in known}
    wide = {name: array.astype(np.int64) for name, array in operands.items()}
    expected = (wide["a"] - wide.get("za", 0)) @ (wide["b"] - wide.get("zb", 0))
    return model_of([node], inputs, known, ["y"]), inputs, expected


@pytest.mark.parametrize("zeros", [False, True], ids=["plain", "zeros"])
@pytest.mark.parametrize("constant", [False, True], ids=["given", "constant"])
@pytest.mark.parametrize(("a", "b"), [("u8", "i8"), ("i8", "i8"), ("u8", "u8"), ("i8", "u8")])
def test_products(a: str, b: str, constant: bool, zeros: bool, gpu: None) -> None:
    model, inputs, expected = product(a, b, 37, constant, zeros)
    (found,), text = on_gpu(model, inputs)
    np.testing.assert_array_equal(found, expected)
    taken_in = constant and zeros  # weights less their zero point, of either sign
    kinds = [f"{INSTRUCTIONS[a]}{kind}" for kind in (("s8", "u8") if taken_in else (INSTRUCTIONS[b],))]
    assert any(f"mma_m16n8k32_{kind}(" in text for kind in kinds)


@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows(rows: int, gpu: None) -> None:
    model, inputs, expected = product("u8", "i8", rows, True, True)
    (found,), _ = on_gpu(model, inputs)
    np.testing.assert_array_equal(found, expected)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "1x1": {"image": (2, 32, 5, 7), "filters": 24, "kernel": (1, 1)},
    "3x3": {"image": (1, 16, 9, 7), "filters": 20, "kernel": (3, 3), "pads": (1, 1, 1, 1)},
    "zero point": {"image": (1, 16, 9, 7), "filters": 20, "kernel": (3, 3), "pads": (1, 0, 2, 1), "zero": 9},
    "strides": {"image": (2, 16, 9, 9), "filters": 8, "kernel": (3, 3), "pads": (1, 1, 1, 1), "strides": (2, 2)},
    "few channels": {"image": (1, 3, 12, 12), "filters": 16, "kernel": (5, 5), "strides": (2, 2), "zero": 3},
    "groups": {"image": (1, 32, 6, 6), "filters": 64, "kernel": (3, 3), "group": 4, "pads": (1, 1, 1, 1)},
    "narrow groups": {"image": (1, 12, 6, 6), "filters": 12, "kernel": (3, 3), "group": 3, "pads": (1, 1, 1, 1)},
    "depthwise": {"image": (1, 24, 8, 8), "filters": 24, "kernel": (3, 3), "group": 24, "pads": (1, 1, 1, 1)},
    "depthwise, zero point": {"image": (1, 24, 8, 8), "filters": 24, "kernel": (3, 3), "group": 24, "zero": 5},
    "dilations": {"image": (1, 16, 9, 9), "filters": 8, "kernel": (3, 3), "dilations": (2, 2), "pads": (2, 2, 2, 2)},
    "one axis": {"image": (1, 8, 40), "filters": 8, "kernel": (5,), "pads": (2, 2), "zero": 200},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kind", ["u8", "i8"])
def test_convolutions(name: str, kind: str, gpu: None) -> None:
    given = dict(CONVOLUTIONS[name])
    shape, filters, kernel = given.pop("image"), given.pop("filters"), given.pop("kernel")
    zero = np.array(given.pop("zero", 0) - (128 if kind == "i8" else 0), np.int64).astype(TYPES[kind])
    x, w = bytes_of(shape, kind), bytes_of((filters, shape[1] // given.get("group", 1), *kernel), "i8")
    node = helper.make_node("ConvInteger", ["x", "w", "zero"], ["y"], **given)
    model = model_of([node], {"x": x}, {"w": w, "zero": zero}, ["y"])
    (found,), text = on_gpu(model, {"x": x})
    (expected,) = onnxc.compile(model).run({"x": x}).values()
    np.testing.assert_array_equal(found, expected)
    assert "depthwise" in text or f"mma_m16n8k32_{INSTRUCTIONS[kind]}s8(" in text


def quantized_block(kind: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A residual block as quantizers write it: convolutions of every kind, each between DequantizeLinear and
    QuantizeLinear."""
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Array] = {}
    low = -128 if kind == "i8" else 0

    def constant(name: str, array: Array) -> str:
        constants[name] = array
        return name

    def quantized(x: str, scale: float, zero: int) -> str:
        names = [constant(f"{x}_s", np.float32(scale)), constant(f"{x}_z", np.array(zero, TYPES[kind]))]
        nodes.append(helper.make_node("QuantizeLinear", [x, *names], [f"{x}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{x}_q", *names], [f"{x}_d"]))
        return f"{x}_d"

    def convolved(x: str, name: str, filters: int, depth: int, size: int, group: int = 1) -> str:
        shape = (filters, depth, size, size)
        scales = constant(f"{name}_ws", RANDOM.uniform(0.005, 0.01, filters).astype(np.float32))
        constant(f"{name}_b", RANDOM.normal(size=filters).astype(np.float32) * 0.1)
        weights = constant(f"{name}_w", bytes_of(shape, "i8"))
        nodes.append(helper.make_node("DequantizeLinear", [weights, scales], [f"{name}_wd"], axis=0))
        pads = (size // 2,) * 4
        nodes.append(helper.make_node("Conv", [x, f"{name}_wd", f"{name}_b"], [name], pads=pads, group=group))
        return name

    def activated(x: str) -> str:
        nodes.append(helper.make_node("Relu", [x], [f"{x}_r"]))
        return f"{x}_r"

    first = quantized("x", 0.02, low + 128)
    wide = quantized(activated(convolved(first, "expand", 32, 3, 3)), 0.05, low)
    deep = quantized(activated(convolved(wide, "deep", 32, 1, 3, 32)), 0.08, low)
    narrow = quantized(convolved(deep, "project", 32, 32, 1), 0.2, low + 120)
    nodes.append(helper.make_node("Add", [narrow, wide], ["sum"]))
    out = quantized(activated("sum"), 0.2, low)
    nodes.append(helper.make_node("GlobalAveragePool", [out], ["mean"]))
    nodes.append(helper.make_node("Identity", [quantized("mean", 0.01, low)], ["y"]))
    x = RANDOM.normal(size=(2, 3, 9, 9)).astype(np.float32)
    return model_of(nodes, {"x": x}, constants, ["y"]), {"x": x}


@pytest.mark.parametrize("kind", ["u8", "i8"])
def test_a_quantized_block(kind: str, gpu: None) -> None:
    """The kernels between the first and the last QuantizeLinear take and give bytes; the results are the CPU's."""
    model, inputs = quantized_block(kind)
    (found,), text = on_gpu(model, inputs)
    (expected,) = onnxc.compile(model).run(inputs).values()
    np.testing.assert_array_equal(found, expected)
    heads = re.findall(r"^\w*(?:conv|depthwise)\w*\(.*y0.*\)$", text, re.MULTILINE)
    assert len(heads) == 3 and all(f"{kind}* __restrict__ y0" in head for head in heads)
    assert text.count(f"mma_m16n8k32_{INSTRUCTIONS[kind]}s8(") >= 2
    assert "rounded_product" in text  # what ONNX rounds twice is not rounded once


@pytest.mark.skipif(not nvrtc.is_available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_kernels_of_bytes_compile_and_do_not_spill(architecture: str) -> None:
    model, _ = quantized_block("u8")
    target = Target.parse(f"cuda:{architecture}")
    program = program_of(graph_of(model, Options(target)), target)
    results = nvrtc.compile_kernels(prelude(), kernel_texts(program.kernels), architecture)
    assert any("mma" in name for name in results)
    assert not any(result.resources[name].spill_store_bytes for name, result in results.items())
