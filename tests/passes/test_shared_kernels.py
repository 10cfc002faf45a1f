"""Kernels of regions alike are made once, and are what making them again would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxc import Target
from onnxc.backends.kernels import calls
from onnxc.compiler.driver import graph_of, program_of
from onnxc.compiler.options import Options, target_of
from onnxc.ir.dtypes import F32
from onnxc.ir.graph import Node
from onnxc.ir.program import Program
from onnxc.ir.scalars import Buffer
from onnxc.ir.tensors import buffer_tensor
from onnxc.passes.regions import Region

RANDOM = np.random.default_rng(0)


def model(nodes: Sequence[onnx.NodeProto], weights: dict[str, Any], shape: Sequence[int]) -> onnx.ModelProto:
    x, y = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape), helper.make_empty_tensor_value_info("y")
    y.type.tensor_type.elem_type = TensorProto.FLOAT
    constants = [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def layers(count: int) -> onnx.ModelProto:
    """Linear layers alike, one in the middle without Relu, one of another width."""
    nodes, weights, last = [], {}, "x"
    for i in range(count):
        weights[f"w{i}"] = RANDOM.standard_normal((48, 48))
        weights[f"b{i}"] = RANDOM.standard_normal(48)
        name = "y" if i == count - 1 else f"z{i}"
        nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], [f"g{i}" if i % 3 else name]))
        if i % 3:
            nodes.append(helper.make_node("Relu", [f"g{i}"], [name]))
        last = name
    return model(nodes, weights, (20, 48))


def convolutions(kinds: Sequence[tuple[int, int]]) -> onnx.ModelProto:
    """3x3 convolutions of (channels, groups), all padded."""
    nodes, weights, last, before = [], {}, "x", kinds[0][0]
    for i, (channels, group) in enumerate(kinds):
        weights[f"w{i}"] = RANDOM.standard_normal((channels, before // group, 3, 3)) / 9
        weights[f"b{i}"] = RANDOM.standard_normal(channels)
        name = "y" if i == len(kinds) - 1 else f"z{i}"
        nodes.append(
            helper.make_node("Conv", [last, f"w{i}", f"b{i}"], [name], pads=[1] * 4, group=group, name=f"conv{i}")
        )
        last, before = name, channels
    return model(nodes, weights, (1, kinds[0][0], 14, 14))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Program, int]]:
    """Lowers a model and counts the bodies that were made."""
    bodies: list[str] = []
    kernel = calls._kernel

    def recorded(region: Region, name: str, *arguments: Any) -> Any:
        bodies.append(name)
        return kernel(region, name, *arguments)

    monkeypatch.setattr(calls, "_kernel", recorded)

    def lowered(proto: onnx.ModelProto, options: Options) -> tuple[Program, int]:
        bodies.clear()
        return program_of(graph_of(proto, options), target_of(options)), len(bodies)

    return lowered


OPTIONS = [{}, {"winograd": "auto"}, {"strassen": "auto"}, {"precision": "bf16"}, {"target": "haswell"}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda named: "".join(named) or "plain")
@pytest.mark.parametrize(
    ("proto", "most"),
    [
        (layers(7), 4),
        (convolutions([(32, 1)] * 4), 5),
        (convolutions([(32, 32)] * 3 + [(32, 1)] * 2 + [(64, 1)] * 2 + [(64, 64)] * 2), 16),
    ],
    ids=["layers", "convolutions", "kinds"],
)
def test_what_is_shared_is_the_same(
    proto: onnx.ModelProto,
    most: int,
    options: dict[str, Any],
    made: Callable[..., tuple[Program, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = Options(**options)
    if wanted.target is None:
        wanted = Options(target=Target.host(), **options)
    shared, few = made(proto, wanted)
    monkeypatch.setattr(Region, "signature", None)
    alone, many = made(proto, wanted)
    assert str(shared) == str(alone)
    assert {n: kernel.digest for n, kernel in shared.kernels.items()} == {
        n: kernel.digest for n, kernel in alone.kernels.items()
    }
    assert few < many or len(proto.graph.node) < 3
    if not options:
        assert few <= most


def test_what_a_signature_tells_apart() -> None:
    """Shapes, types, names and attributes; not the elements of constants."""

    def region(size: int = 9, weight: float = 1, name: str = "r", alignment: int = 64, **attributes: Any) -> Region:
        x, y = buffer_tensor("x0", F32, (size,)), Buffer("y0", F32, size)
        arrays = {"x0": np.full(size, weight, np.float32)}
        anchor = Node("Relu", (), (), attributes)
        return Region(name, (x,), ((y, x),), anchor, (x,), x, arrays, alignments={"x0": alignment})

    assert region().signature is not None and region().signature == region(weight=2).signature
    others = (region(8), region(name="s"), region(alignment=32), region(axis=1), region(axis=2), region(list=[1.0]))
    found = {region().signature, *(other.signature for other in others)}
    assert len(found) == 1 + len(others)
