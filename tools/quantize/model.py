"""An ONNX model that is being rewritten: its nodes in order, constants by name, and the way back to a file."""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ...compiler.nodes import all_names, graphs_in, in_order, names_read, node_name
from ...compiler.weights import Weights, load_model
from ...ir.dtypes import BY_ONNX
from ...ir.errors import ModelError
from ..check.evaluate import RANDOM, by_reference
from .settings import QuantizationError

Array = NDArray[Any]
LARGEST_FILE = 1 << 30
"""Bytes of tensors from which on they are written into a file beside the model: protobuf ends at 2 GB."""
ALIGNED = 4096
SMALLEST_OUTSIDE = 1024
"""Bytes below which a tensor stays in the model's own file in any case."""
LARGEST_FOLDED = 1 << 28
NEVER_FOLDED = RANDOM | {"QuantizeLinear", "DequantizeLinear", "Constant"}


class Draft:
    """A model open for rewriting.

    `proto` holds everything; tensors that lie in files beside the model stay there until they are asked for. `folder`
    is where those files are. Nodes of the main graph are in order, each with a name of its own, and no constant is a
    node.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes | ModelProto,
        opset: int,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """The model lifted to at least this opset. ModelError where it cannot be read, QuantizationError where it
        cannot be lifted."""
        proto, weights = load_model(model, folder)
        proto = copy.deepcopy(proto) if isinstance(model, ModelProto) else proto
        if folder is None and isinstance(model, str | os.PathLike):
            folder = Path(model).parent
        for tensor in tensors_of(proto.graph):  # what the loader left in the model's own file
            if tensor.external_data and tensor.data_location != TensorProto.EXTERNAL:
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(weights.array(tensor)), tensor.name))
        self.folder = None if folder is None else str(folder)
        self.weights = Weights(None, None if folder is None else Path(folder))
        self.proto = lifted(inlined(proto), opset)
        self.constants: dict[str, TensorProto] = {}
        self._used: set[str] = set()
        self._arrays: dict[str, Array] = {}
        self._normalise()

    @property
    def graph(self) -> GraphProto:
        return self.proto.graph

    @property
    def opset(self) -> int:
        return opset_of(self.proto)

    def _normalise(self) -> None:
        graph = self.graph
        nodes = []
        for index, node in in_order(graph.node):
            node.name = node_name(node, index)
            if node.op_type == "Constant" and not node.domain and node.attribute[0].name == "value":
                graph.initializer.append(node.attribute[0].t)
                graph.initializer[-1].name = node.output[0]
            else:
                nodes.append(node)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        taken: Counter[str] = Counter()
        for node in nodes:  # two nodes of one name cannot be told apart
            taken[node.name] += 1
            if taken[node.name] > 1:
                node.name = f"{node.name}_{taken[node.name]}"
        self.replace_nodes(nodes)
        # Initializers that are inputs too may be overridden; nobody who quantises them does.
        inputs = [value for value in graph.input if value.name not in self.constants]
        del graph.input[:]
        graph.input.extend(inputs)
        self._used = set(names_read(nodes)) | set(all_names(graph)) | {node.name for node in nodes}

    def replace_nodes(self, nodes: Iterable[NodeProto]) -> None:
        """Other nodes for the main graph."""
        kept = [copy.copy(node) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(kept)

    def array(self, name: str) -> Array:
        """A constant's elements (read-only)."""
        if name not in self._arrays:
            self._arrays[name] = np.asarray(self.weights.array(self.constants[name]))
        return self._arrays[name]

    def forget(self) -> None:
        """Drops the arrays that were read."""
        self._arrays.clear()

    def is_float(self, name: str) -> bool:
        """Whether this is a constant of f32."""
        return name in self.constants and self.constants[name].data_type == TensorProto.FLOAT

    def shape(self, name: str) -> tuple[int, ...]:
        """A constant's shape."""
        return tuple(self.constants[name].dims)

    def unused(self, name: str) -> str:
        """A name that no value has yet: this one, or with a number behind it."""
        found, number = name, 2
        while found in self._used:
            found, number = f"{name}_{number}", number + 1
        self._used.add(found)
        return found

    def add_constant(self, name: str, array: Array | TensorProto, graph: GraphProto | None = None) -> str:
        """A further constant, of the main graph or another; its name, which is new."""
        name = self.unused(name)
        tensor = array if isinstance(array, TensorProto) else numpy_helper.from_array(np.asarray(array), name)
        tensor.name = name
        (self.graph if graph is None else graph).initializer.append(tensor)
        if graph is None or graph is self.graph:
            self.constants[name] = self.graph.initializer[-1]
        return name

    def readers(self) -> dict[str, list[NodeProto]]:
        """The nodes that read each value, those included whose inner graphs do."""
        found: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for name in dict.fromkeys(filter(None, names_read([node]))):
                found.setdefault(name, []).append(node)
        return found

    def definers(self) -> dict[str, NodeProto]:
        """The node that defines each value."""
        return {name: node for node in self.graph.node for name in node.output if name}

    def fixed(self) -> set[str]:
        """Values that must stay under their names: the model's outputs, and what inner graphs read."""
        inner = (name for node in self.graph.node for graph in graphs_in(node) for name in names_read(graph.node))
        results = (value.name for node in self.graph.node for graph in graphs_in(node) for value in graph.output)
        return {value.name for value in self.graph.output} | set(inner) | set(results)

    def types(self) -> dict[str, int]:
        """The element types that ONNX's inference knows."""
        try:
            found = onnx.shape_inference.infer_shapes(self.proto).graph
        except Exception:  # it raises its own kinds, and protobuf's for what is larger than 2 GB
            found = self.graph
        values = [*found.value_info, *found.input, *found.output]
        known = {value.name: value.type.tensor_type.elem_type for value in values if value.type.HasField("tensor_type")}
        return known | {name: tensor.data_type for name, tensor in self.constants.items()}

    def fold_constants(self) -> None:
        """Evaluates nodes that read nothing but constants, by ONNX's reference."""
        nodes = []
        for node in self.graph.node:
            reads = [name for name in node.input if name]
            size = sum(math.prod(self.shape(name)) for name in reads if name in self.constants)
            plain = not node.domain and node.op_type not in NEVER_FOLDED and not graphs_in(node)
            if not (plain and reads and all(name in self.constants for name in reads)) or size > LARGEST_FOLDED:
                nodes.append(node)
                continue
            try:
                results = by_reference(self._alone(node), {name: self.array(name) for name in reads})
                tensors = [numpy_helper.from_array(np.asarray(result)) for result in results]
            except Exception:  # the reference raises what it likes for what it does not know
                nodes.append(node)
                continue
            for name, tensor in zip(filter(None, node.output), tensors, strict=True):
                tensor.name = name
                self.graph.initializer.append(tensor)
                self.constants[name] = self.graph.initializer[-1]
        self.replace_nodes(nodes)

    def _alone(self, node: NodeProto) -> ModelProto:
        """A model of one node whose operands are inputs."""
        inputs = [
            helper.make_tensor_value_info(name, self.constants[name].data_type, self.shape(name))
            for name in dict.fromkeys(node.input)
            if name
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        graph = helper.make_graph([node], "node", inputs, outputs)
        return helper.make_model(graph, opset_imports=list(self.proto.opset_import))

    def clean(self) -> None:
        """Removes nodes and constants that nobody reads, and what was declared of values that are gone."""
        needed = {value.name for value in self.graph.output}
        nodes = []
        for node in reversed(self.graph.node):
            if needed.intersection(node.output) or (not any(node.output)):
                nodes.append(node)
                needed.update(names_read([node]))
        self.replace_nodes(reversed(nodes))
        kept = [tensor for tensor in self.graph.initializer if tensor.name in needed]
        if len(kept) < len(self.graph.initializer):
            del self.graph.initializer[:]
            self.graph.initializer.extend(kept)
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        del self.graph.value_info[:]

    def size(self) -> int:
        """What the tensors of the model take."""
        return sum(size_of(tensor) for tensor in tensors_of(self.graph))

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Writes the model, its larger tensors beside it where protobuf could not hold them all; the files."""
        path = Path(path)
        if self.size() < LARGEST_FILE:
            path.write_bytes(self.embedded().SerializeToString(deterministic=True))
            return [path]
        beside = path.with_name(f"{path.name}.data")
        light = ModelProto()
        light.CopyFrom(self.proto)
        position = 0
        with beside.open("wb") as file:
            for tensor in tensors_of(light.graph):
                if size_of(tensor) < SMALLEST_OUTSIDE or tensor.data_type == TensorProto.STRING:
                    self._embed(tensor)
                    continue
                data = self._payload(tensor)
                file.write(bytes(-position % ALIGNED))
                position += -position % ALIGNED
                file.write(data)
                name, dims, kind = tensor.name, list(tensor.dims), tensor.data_type
                tensor.Clear()
                tensor.name, tensor.data_type, tensor.data_location = name, kind, TensorProto.EXTERNAL
                tensor.dims.extend(dims)
                for key, value in (("location", beside.name), ("offset", position), ("length", len(data))):
                    tensor.external_data.add(key=key, value=str(value))
                position += len(data)
        path.write_bytes(light.SerializeToString(deterministic=True))
        return [path, beside]

    def embedded(self) -> ModelProto:
        """The model with all tensors in it."""
        for tensor in tensors_of(self.graph):
            self._embed(tensor)
        return self.proto

    def _embed(self, tensor: TensorProto) -> None:
        if tensor.data_location == TensorProto.EXTERNAL:
            data, name = self._payload(tensor), tensor.name
            dims, kind = list(tensor.dims), tensor.data_type
            tensor.Clear()
            tensor.name, tensor.data_type, tensor.raw_data = name, kind, data
            tensor.dims.extend(dims)

    def _payload(self, tensor: TensorProto) -> bytes:
        """A tensor's elements as they stand in a file."""
        if tensor.HasField("raw_data"):
            return bytes(tensor.raw_data)
        array = np.asarray(self.weights.array(tensor))
        return bytes(numpy_helper.from_array(array).raw_data)


def tensors_of(graph: GraphProto) -> Iterator[TensorProto]:
    """All tensors of a graph and of the graphs in its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for inner in graphs_in(node):
            yield from tensors_of(inner)


def size_of(tensor: TensorProto) -> int:
    """Bytes of a tensor's elements."""
    dtype = BY_ONNX.get(tensor.data_type)
    return int(math.prod(tensor.dims) * (dtype.bits if dtype is not None else 64) + 7) // 8


def opset_of(proto: ModelProto) -> int:
    """The opset of ONNX's own operators."""
    return int(max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=1))


def inlined(proto: ModelProto) -> ModelProto:
    """The model without functions of its own: what they hold is to be quantised too."""
    if not proto.functions:
        return proto
    try:
        return onnx.inliner.inline_local_functions(proto)
    except Exception as error:  # it raises its own kinds
        raise ModelError(f"the model's functions cannot be expanded ({error}); export it without functions") from error


def lifted(proto: ModelProto, opset: int) -> ModelProto:
    """The model with at least this opset, by ONNX's version converter."""
    found = opset_of(proto)
    if found < opset:
        try:
            proto = onnx.version_converter.convert_version(proto, opset)
        except Exception as error:  # it raises its own kinds, RuntimeError for the most part
            reason = " ".join(str(error).split())[:300]
            raise QuantizationError(
                f"the model has opset {found}, what it is to become needs {opset}, and ONNX's converter cannot lift it "
                f"({reason}); export it with opset {opset} or newer"
            ) from error
    least = helper.find_min_ir_version_for(list(proto.opset_import), ignore_unknown=True)
    proto.ir_version = max(proto.ir_version, least)
    return proto


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """A node's attribute, or what stands for it where it is not given."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def make_node(operator: str, inputs: Sequence[str], output: str, name: str, **attributes: Any) -> NodeProto:
    """A node of one output."""
    return helper.make_node(operator, inputs, [output], name, **attributes)


__all__ = ["Draft", "attribute", "lifted", "make_node", "opset_of", "size_of", "tensors_of"]
