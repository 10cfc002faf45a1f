"""A model taken apart: its nodes in order, each under a name, and its weights as arrays; and parts of it as models."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from ...compiler.nodes import graphs_in, in_order, names_read, node_name
from ...compiler.weights import Weights, load_model
from ...ir.dtypes import of_numpy

Array = NDArray[Any]
SMALL = 64
"""Integers up to which a tensor may decide shapes: such operands stand in a part of a model as constants."""


@dataclass(frozen=True)
class Subject:
    """An ONNX model as nodes and arrays. `proto` holds opsets and functions; its graph is not looked at.

    A node's name is that by which the compiler's origins call it.
    """

    proto: ModelProto
    nodes: tuple[NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Array]

    @cached_property
    def reads(self) -> tuple[tuple[str, ...], ...]:
        """The names that each node reads, those for the graphs in it included."""
        return tuple(tuple(dict.fromkeys(filter(None, names_read([node])))) for node in self.nodes)

    @cached_property
    def definer(self) -> dict[str, int]:
        """The position of the node that defines each value."""
        return {name: i for i, node in enumerate(self.nodes) for name in node.output if name}

    @cached_property
    def values(self) -> tuple[str, ...]:
        """What nodes define, in order."""
        return tuple(self.definer)

    @cached_property
    def places(self) -> dict[str, int]:
        """The position of every node by name; of those in branches and bodies that of the node around."""
        found: dict[str, int] = {}
        for position, node in enumerate(self.nodes):
            for name in _names([node]):
                found.setdefault(name, position)
        return {**found, **{node.name: position for position, node in enumerate(self.nodes)}}

    def named(self, origins: Collection[str]) -> set[int]:
        """The positions of the nodes that origins name; the name of a node in a function begins with the caller's."""
        found = set()
        for origin in origins:
            while origin and origin not in self.places:
                origin = origin.rpartition("/")[0]
            found.update([self.places[origin]] if origin else [])
        return found

    def model(
        self, nodes: Sequence[NodeProto], arrays: Mapping[str, Any], outputs: Sequence[str],
        inputs: Sequence[str] = (), constants: bool = True,
    ) -> ModelProto:  # fmt: skip
        """A model of some nodes: what they read are inputs with the types of `arrays`, or constants (inputs too, of no
        type, without `constants`). `inputs` are inputs even if nobody reads them, in this order before the others."""
        defined = {name for node in nodes for name in node.output}
        read = [name for name in dict.fromkeys((*inputs, *names_read(nodes), *outputs)) if name and name not in defined]
        graph = GraphProto(name="part", node=nodes)
        for name in read:
            if name in self.constants and not constants:
                graph.input.add(name=name)
            elif name in self.constants:
                graph.initializer.append(numpy_helper.from_array(np.asarray(self.constants[name]), name))
            elif name in arrays:
                graph.input.append(value_info(name, arrays[name]))
        for name in outputs:
            known = name in arrays
            graph.output.append(value_info(name, arrays[name]) if known else onnx.ValueInfoProto(name=name))
        model = ModelProto(ir_version=max(self.proto.ir_version, 8), producer_name="onnxc check", graph=graph)
        model.opset_import.extend(self.proto.opset_import)
        model.functions.extend(self.proto.functions)
        return model


def _names(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """The names of nodes, and of those in the graphs in them."""
    for index, node in enumerate(nodes):
        yield node_name(node, index)
        for graph in graphs_in(node):
            yield from _names(graph.node)


def value_info(name: str, array: Any) -> onnx.ValueInfoProto:
    """The declaration of a value like this array; of a list a sequence of tensors."""
    helper = onnx.helper
    if isinstance(array, list | tuple):
        element = of_numpy(np.asarray(array[0]).dtype).onnx if array else TensorProto.FLOAT
        return helper.make_tensor_sequence_value_info(name, element, None)
    return helper.make_tensor_value_info(name, of_numpy(np.asarray(array).dtype).onnx, np.shape(array))


def subject_of(model: str | os.PathLike[str] | bytes | ModelProto, folder: str | None = None) -> Subject:
    """The model taken apart. ModelError where it cannot be read."""
    proto, weights = load_model(model, folder)
    graph = proto.graph
    constants = {tensor.name: weights.array(tensor) for tensor in graph.initializer}
    constants |= {tensor.values.name: weights.dense(tensor) for tensor in graph.sparse_initializer}
    nodes = []
    for index, node in in_order(graph.node):
        own = NodeProto()
        own.CopyFrom(node)
        own.name = node_name(node, index)
        for tensor in _tensors([own]):
            _restore(tensor, weights)
        if node.op_type == "Constant" and not node.domain and node.attribute[0].name == "value":
            constants[own.output[0]] = numpy_helper.to_array(own.attribute[0].t)
        else:
            nodes.append(own)
    bare = ModelProto(ir_version=proto.ir_version)
    bare.opset_import.extend(proto.opset_import)
    bare.functions.extend(proto.functions)
    for tensor in _tensors(node for function in bare.functions for node in function.node):
        _restore(tensor, weights)
    inputs = tuple(value.name for value in graph.input if value.name not in constants)
    return Subject(bare, tuple(nodes), inputs, tuple(value.name for value in graph.output), constants)


def _tensors(nodes: Iterator[NodeProto] | Sequence[NodeProto]) -> Iterator[TensorProto]:
    """All tensors that stand in nodes or in the graphs in them."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for graph in graphs_in(node):
            yield from graph.initializer
            yield from _tensors(graph.node)


def _restore(tensor: TensorProto, weights: Weights) -> None:
    """Gives a tensor back what the loader left in the file."""
    if tensor.external_data:
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(weights.array(tensor)), tensor.name))


def with_constants(subject: Subject, arrays: Mapping[str, Array]) -> Subject:
    """The subject with some of its inputs as constants."""
    left = tuple(name for name in subject.inputs if name not in arrays)
    return replace(subject, inputs=left, constants={**subject.constants, **arrays})
