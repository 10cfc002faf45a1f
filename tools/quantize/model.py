"""An ONNX model that is being rewritten, and the way from a file and back."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ...compiler.nodes import graphs_in
from ...compiler.weights import Weights, load_model
from ...ir.dtypes import BY_ONNX
from ...ir.errors import ModelError
from .graph import GraphDraft, Shared
from .settings import QuantizationError
from .widened import HALVES, widen

Array = NDArray[Any]
LARGEST_FILE = 1 << 30
"""Bytes of tensors from which on they are written into a file beside the model: protobuf ends at 2 GB."""
ALIGNED = 4096
SMALLEST_OUTSIDE = 1024
"""Bytes below which a tensor stays in the model's own file in any case."""


class Draft(GraphDraft):
    """A model open for rewriting, by its main graph.

    `proto` holds everything; tensors that lie in files beside the model stay there until they are asked for. `folder`
    is where those files are.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes | ModelProto,
        opset: int,
        folder: str | os.PathLike[str] | None = None,
        halves: int | None = None,
    ) -> None:
        """The model lifted to at least this opset, to at least `halves` where weights are 16-bit floats, which become
        f32 where it is None. ModelError where it cannot be read, QuantizationError where it
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
        proto, self.original_size = inlined(proto), sum(map(size_of, tensors_of(proto.graph)))
        half = halves is not None and any(tensor.data_type in HALVES for tensor in tensors_of(proto.graph))
        self.proto = lifted(proto, halves if half and halves else opset)
        self.widened = widen(self.proto, self.weights) if halves is None else 0
        super().__init__(self.proto.graph, Shared(self.proto, self.weights))

    @property
    def opset(self) -> int:
        return opset_of(self.proto)

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
        light, graph = ModelProto(), GraphProto()
        _copy(graph, self.graph, "initializer")
        _copy(light, self.proto, "graph")
        with beside.open("wb") as file:
            for tensor in self.graph.initializer:  # one after another: the weights are in memory only once
                self._write(tensor, graph.initializer.add(), file)
            for tensor in list(tensors_of(graph))[len(graph.initializer) :]:  # those inside nodes
                self._write(tensor, tensor, file)
        light.graph.CopyFrom(graph)
        path.write_bytes(light.SerializeToString(deterministic=True))
        return [path, beside]

    def _write(self, tensor: TensorProto, into: TensorProto, file: BinaryIO) -> None:
        """Puts a tensor's elements into the file and says so in `into`, where small ones go themselves."""
        if size_of(tensor) < SMALLEST_OUTSIDE or tensor.data_type == TensorProto.STRING:
            into.CopyFrom(tensor)
            self._embed(into)
            return
        data, name, dims, kind = self._payload(tensor), tensor.name, list(tensor.dims), tensor.data_type
        position = -(-file.tell() // ALIGNED) * ALIGNED
        file.seek(position)
        file.write(data)
        into.Clear()
        into.name, into.data_type, into.data_location = name, kind, TensorProto.EXTERNAL
        into.dims.extend(dims)
        for key, value in (("location", Path(file.name).name), ("offset", position), ("length", len(data))):
            into.external_data.add(key=key, value=str(value))

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


def _copy(into: Any, source: Any, without: str) -> None:
    """Copies all fields of a message of protobuf but one."""
    for field, value in source.ListFields():
        if field.name == without:
            continue
        if isinstance(value, int | float | str | bytes):
            setattr(into, field.name, value)
        else:
            getattr(into, field.name).MergeFrom(value)


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
