"""A model of a hundred nodes, and faults planted in the compiler, for the tests of `onnxc check`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxc.backends.cpu import schedules
from onnxc.ir.graph import Graph, Node, constant_node
from onnxc.ir.scalars import Buffer
from onnxc.ir.target import Target
from onnxc.ir.tensors import Tensor
from onnxc.passes.pipeline import Pass
from onnxc.passes.regions import Lowered, Region

BLOCKS = 12


def hundred_nodes(blocks: int = BLOCKS) -> onnx.ModelProto:
    """Residual blocks of convolution, normalisation and a hand-written gelu, then a linear layer: 8 nodes a block."""
    random = np.random.default_rng(7)
    weights: dict[str, np.ndarray] = {
        "half": np.float32(0.5), "root": np.float32(np.sqrt(2)), "one": np.float32(1), "shape": np.int64([0, 128]),
        "linear": random.normal(0, 0.01, (128, 10)).astype(np.float32),
    }  # fmt: skip
    nodes, value = [], "image"

    def add(op: str, *inputs: str, name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [f"{name}:0"], name, **attributes))
        return f"{name}:0"

    for block in range(blocks):
        weights[f"w{block}"] = random.normal(0, 0.1, (8, 8, 3, 3)).astype(np.float32)
        weights |= {f"{part}{block}": random.uniform(0.5, 1.5, 8).astype(np.float32) for part in ("scale", "variance")}
        weights |= {f"{part}{block}": random.normal(0, 0.1, 8).astype(np.float32) for part in ("bias", "mean")}
        conv = add("Conv", value, f"w{block}", name=f"conv{block}", pads=[1, 1, 1, 1])
        normalised = add(
            "BatchNormalization",
            *(conv, f"scale{block}", f"bias{block}", f"mean{block}", f"variance{block}"),
            name=f"norm{block}",
        )
        quotient = add("Div", normalised, "root", name=f"div{block}")
        curve = add("Erf", quotient, name=f"erf{block}")
        shifted = add("Add", curve, "one", name=f"shift{block}")
        product = add("Mul", normalised, shifted, name=f"mul{block}")
        gelu = add("Mul", product, "half", name=f"gelu{block}")
        value = add("Add", gelu, value, name=f"residual{block}")
    flat = add("Reshape", value, "shape", name="flatten")
    add("MatMul", flat, "linear", name="classify")
    nodes.append(helper.make_node("Softmax", ["classify:0"], ["probability"], "softmax"))
    graph = helper.make_graph(
        nodes,
        "hundred",
        [helper.make_tensor_value_info("image", 1, ["batch", 8, 4, 4])],
        [helper.make_tensor_value_info("probability", 1, ["batch", 10])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def after_pass(patch: pytest.MonkeyPatch, kind: type[Pass], change: Callable[[Graph], Graph]) -> None:
    """Makes a pass spoil what it gives; every time it runs, so that its first run is the guilty one."""
    right = kind.run
    patch.setattr(kind, "run", lambda self, graph: change(right(self, graph)))


def change_nodes(wanted: Callable[[Node], bool], change: Callable[[Node], Node]) -> Callable[[Graph], Graph]:
    """A change of the nodes that are wanted, those in regions included."""

    def visit(graph: Graph) -> Graph:
        nodes = []
        for node in graph.nodes:
            regions = {name: visit(region) for name, region in node.regions.items()}
            node = replace(node, regions=regions) if regions else node
            nodes.append(change(node) if wanted(node) else node)
        return replace(graph, nodes=tuple(nodes))

    return visit


def comes_from(*names: str) -> Callable[[Node], bool]:
    """Whether a node comes from these ONNX nodes, among others."""
    return lambda node: set(names) <= set(node.origin)


def spoil_constant(node: Node) -> Node:
    """The same constant with one element changed."""
    array = np.array(node.attributes["value"].array)  # type: ignore[union-attr]
    array.reshape(-1)[0] += 1
    return constant_node(node.output.name, array, node.output.tensor, node.origin)


def swap_operands(node: Node) -> Node:
    return replace(node, inputs=(node.inputs[1], node.inputs[0], *node.inputs[2:]))


def _doubled(outputs: Sequence[tuple[Buffer, Tensor]]) -> tuple[tuple[Buffer, Tensor], ...]:
    return tuple((buffer, tensor + tensor) for buffer, tensor in outputs)


def spoil_kernel(patch: pytest.MonkeyPatch, wanted: Callable[[Region], bool], schedules: Any = schedules) -> None:
    """Makes the CPU's schedules (or those of a GPU) double what the kernels of regions that are wanted store."""
    right = schedules.schedule

    def wrong(region: Region, target: Target) -> Lowered | None:
        if wanted(region):
            inline = region.inline
            whole = None if inline is None else lambda: _doubled(inline())
            region = replace(region, outputs=_doubled(region.outputs), inline=whole)
        return right(region, target)

    patch.setattr(schedules, "schedule", wrong)
