"""QuantizeLinear and DequantizeLinear: every type, one scale for all, per axis and per block, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxc
import pytest
from gpu import emulated_gpu
from onnx import helper
from onnxc.ir.dtypes import BF16, BY_NAME, F16, F32, DType
from single_node import assert_equal, compiled, model_of, reference

TYPES = [BY_NAME[name] for name in (
    "u8", "i8", "u16", "i16", "u4", "i4", "u2", "i2", "f8e4m3fn", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz", "f4e2m1",
    "f6e2m3", "f6e3m2",
)]  # fmt: skip
GRANULARITIES: dict[str, tuple[dict[str, int], tuple[int, ...]]] = {
    "one": ({}, ()),
    "first axis": ({"axis": 0}, (6,)),
    "last axis": ({"axis": -1}, (7,)),
    "blocks of the middle axis": ({"axis": 1, "block_size": 2}, (6, 3, 7)),
    "blocks of the last axis, the last one smaller": ({"axis": 2, "block_size": 3}, (6, 5, 3)),
    "blocks of the first axis": ({"axis": -3, "block_size": 3}, (2, 5, 7)),
}
SHAPE = (6, 5, 7)
RNG = np.random.default_rng(5)


def scales(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """Powers of two times small odd numbers: exact in all types, quotients are halves now and then."""
    return np.asarray(RNG.choice([0.25, 0.5, 1, 2, 1.5, 3], shape)).astype(dtype.numpy)


def quantizing(
    dtype: DType, scale: DType = F32, x: DType = F32, **attributes: Any
) -> tuple[Any, dict[str, np.ndarray]]:
    """A model that quantizes and dequantizes in all granularities, and its inputs."""
    low, high = (max(-300.0, dtype.limits[0]), min(300.0, dtype.limits[1]))
    inputs = {"x": (RNG.integers(-2 * 300, 2 * 300, SHAPE) * (high / 600)).astype(x.numpy)}
    inputs["q"] = RNG.uniform(low, high, SHAPE).astype(dtype.numpy)
    nodes, outputs = [], []
    for number, (given, shape) in enumerate(GRANULARITIES.values()):
        zeros = RNG.integers(int(max(low, -9)), int(min(high, 9)), shape, endpoint=True)
        zeros = zeros * dtype.is_integer
        inputs |= {f"scale{number}": scales(shape, scale), f"zero{number}": zeros.astype(dtype.numpy)}
        names = [f"scale{number}", f"zero{number}"]
        nodes.append(helper.make_node("QuantizeLinear", ["x", *names], [f"a{number}"], **given, **attributes))
        nodes.append(helper.make_node("DequantizeLinear", ["q", *names], [f"b{number}"], **given))
        outputs += [f"a{number}", f"b{number}"]
        if not attributes:
            nodes.append(helper.make_node("DequantizeLinear", ["q", names[0]], [f"c{number}"], **given))
            nodes.append(
                helper.make_node("QuantizeLinear", ["x", names[0]], [f"d{number}"], output_dtype=dtype.onnx, **given)
            )
            outputs += [f"c{number}", f"d{number}"]
    return model_of(nodes, inputs, {}, outputs, opset=28), inputs


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_all_types_and_granularities(dtype: DType) -> None:
    model, inputs = quantizing(dtype)
    with np.errstate(all="ignore"):
        assert_equal(compiled(model, inputs), reference(model, inputs))


@pytest.mark.parametrize("scale", [F16, BF16], ids=str)
def test_types_of_scales(scale: DType) -> None:
    model, inputs = quantizing(BY_NAME["i8"], scale, scale)
    assert_equal(compiled(model, inputs), reference(model, inputs))


def test_the_division_is_done_in_the_precision_asked_for() -> None:
    model, inputs = quantizing(BY_NAME["i16"], F16, F16, precision=F32.onnx)
    assert_equal(compiled(model, inputs), reference(model, inputs))


def test_float8_that_does_not_saturate() -> None:
    model, inputs = quantizing(BY_NAME["f8e4m3fn"], saturate=0)
    with np.errstate(all="ignore"):
        pairs = zip(compiled(model, inputs), reference(model, inputs), strict=True)
    assert_equal(*zip(*[(a.astype(np.float32), b.astype(np.float32)) for a, b in pairs], strict=True))


@pytest.mark.parametrize("output", [F16, BF16, F32], ids=str)
def test_exponents_as_scales(output: DType) -> None:
    """Microscaling: floats of 4 bits in blocks of 32, with a power of two each."""
    rng = np.random.default_rng(6)
    inputs = {
        "q": rng.uniform(-6, 6, (4, 64)).astype(BY_NAME["f4e2m1"].numpy),
        "scale": (2.0 ** rng.integers(-5, 5, (4, 2))).astype(BY_NAME["f8e8m0"].numpy),
    }
    node = helper.make_node("DequantizeLinear", ["q", "scale"], ["y"], axis=1, block_size=32, output_dtype=output.onnx)
    (found,) = compiled(model_of([node], inputs, {}, ["y"], opset=28), inputs)
    wanted = inputs["q"].astype(np.float32) * np.repeat(inputs["scale"].astype(np.float32), 32, 1)
    assert found.dtype == output.numpy
    np.testing.assert_array_equal(found.astype(np.float32), wanted)


@pytest.mark.parametrize("name", ["f8e5m2", "i4", "u2", "f6e3m2"])
def test_scales_and_zero_points_that_are_constants(name: str) -> None:
    """Those of a single element are literals in kernels."""
    model, inputs = quantizing(BY_NAME[name])
    wanted = compiled(model, inputs)
    fixed = {name: array for name, array in inputs.items() if name not in ("x", "q")}
    given = {name: array for name, array in inputs.items() if name not in fixed}
    outputs = [value.name for value in model.graph.output]
    assert_equal(compiled(model_of(list(model.graph.node), given, fixed, outputs, opset=28), given), wanted)


@pytest.mark.parametrize("name", ["f8e4m3fn", "i4", "f4e2m1", "u16"])
def test_the_same_on_a_gpu(name: str) -> None:
    model, inputs = quantizing(BY_NAME[name])
    wanted = compiled(model, inputs)
    with emulated_gpu():
        found = onnxc.compile(model, target="cuda").run(inputs)
    assert_equal(list(found.values()), wanted)
