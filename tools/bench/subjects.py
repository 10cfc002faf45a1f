"""What is timed: the sizes of a model's open axes, and inputs that suit what it does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from ...compiler.driver import imported
from ...compiler.options import Options
from ...ir.dims import Sum, symbols
from ...ir.errors import OnnxcError
from ...ir.graph import Graph, TensorType
from ..arrays import read_arrays
from ..check.inputs import bare_graph, made_inputs, ports_of, shapes_for


def leading_symbols(path: str) -> list[str]:
    """The symbols that are the first axes of inputs."""
    types = [value.type for value in _graph(path, onnx.load(path, load_external_data=False), {}).inputs]
    first = [type.shape[0] for type in types if isinstance(type, TensorType) and type.shape]
    return list(dict.fromkeys(symbols(dim)[0].name for dim in first if isinstance(dim, Sum)))


def inputs_of(
    path: str, dims: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], given: Sequence[str], seed: int
) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """(the size of each symbol, an array for each input). Sizes that nobody gave are usual ones."""
    proto = onnx.load(path, load_external_data=False)
    ports = ports_of(proto.graph, {tensor.name: tensor for tensor in proto.graph.initializer})
    arrays, fills = read_arrays(given, ports)
    found = shapes_for(ports, arrays, dims) | dict(shapes)
    sizes = _sizes(_graph(path, proto, {}), found)
    graph = _graph(path, proto, found)
    return dict(dims) | sizes, made_inputs(graph, arrays, fills, np.random.default_rng(seed))


def _graph(path: str, proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> Graph:
    """The graph; its inputs alone where there is none before values are seen."""
    try:
        return imported(path, Options(shapes=shapes))
    except OnnxcError:  # engines tell it, if it concerns them
        return bare_graph(proto.graph, {tensor.name: tensor for tensor in proto.graph.initializer}, shapes)


def _sizes(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The model's symbols, by the shapes of its inputs."""
    found: dict[str, int] = {}
    for value in graph.inputs:
        if isinstance(value.type, TensorType):
            for dim, size in zip(value.shape, shapes.get(value.name, ()), strict=False):
                parts = symbols(dim)
                if len(parts) == 1 and str(dim) == str(parts[0]):
                    found[parts[0].name] = size
    return found
