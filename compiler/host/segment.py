"""Compiled parts of a model that Python runs: each is compiled when its operands' types are seen for the first time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

from ...ir.dtypes import of_numpy
from ...ir.errors import ValueNeeded
from ..nodes import operator_name

KEPT = 16
"""Compiled forms of a segment that are kept."""
STRETCHED = 2
"""The smallest size of an axis whose size the code does not know: what has one element may be broadcast."""


class Runnable(Protocol):
    """What compiling gives."""

    def run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The outputs by name, for inputs by name."""

    def dump(self, stage: str = "graph") -> str:
        """The text of a stage."""


Compile = Callable[[ModelProto, int], Runnable]
"""Compiles a model whose sizes, where they are open, are of some smallest size or more."""


class Segment:
    """Nodes on tensors of numbers alone, compiled together.

    There is a compiled form for each setting of element types and ranks; sizes stay open but for those below
    `STRETCHED` and for those that the model declares, unless the code depends on them.
    """

    operator = "compiled"

    def __init__(
        self,
        model: ModelProto,
        nodes: Sequence[NodeProto],
        constants: Mapping[str, TensorProto],
        reads: Sequence[str],
        writes: Sequence[str],
        declared: Mapping[str, Sequence[int | None]],
        compile: Compile,
    ) -> None:
        """`model` is the whole model, for its opsets and functions; `constants` are those that the nodes read."""
        self.nodes = tuple(nodes)
        self.reads, self.writes = tuple(reads), tuple(writes)
        self._constants = constants
        self._model = model
        self._declared = declared
        self._compile = compile
        self._fixed = False
        self._known: OrderedDict[tuple[object, ...], Runnable] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.nodes[0].name

    def lines(self) -> list[str]:
        """The description of this step."""
        names = ", ".join(f'"{node.name}" ({operator_name(node)})' for node in self.nodes)
        return [f"compiled ({', '.join(self.reads)}) -> ({', '.join(self.writes)}): {names}"]

    def run(self, values: Mapping[str, Any]) -> Sequence[Any]:
        """What the segment writes. Raises what compiling raises, and ShapeError where operands do not fit."""
        given = {name: np.asarray(values[name]) for name in self.reads}
        while True:
            try:
                found = self.compiled(given).run(given)
                return [found[name] for name in self.writes]
            except ValueNeeded:
                if self._fixed:
                    raise
                self._fixed = True  # from now on for each setting of the sizes

    def compiled(self, given: Mapping[str, np.ndarray]) -> Runnable:
        """The compiled form for operands of these types and shapes."""
        shapes = {name: self._shape(name, array.shape) for name, array in given.items()}
        key = tuple((array.dtype, shapes[name]) for name, array in given.items())
        with self._lock:
            found = self._known.get(key)
            if found is None:
                types = {name: (of_numpy(array.dtype).onnx, shapes[name]) for name, array in given.items()}
                found = self._known[key] = self._compile(self.as_model(types), STRETCHED)
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
            else:
                self._known.move_to_end(key)
            return found

    def forms(self) -> list[Runnable]:
        """The forms that are compiled so far."""
        with self._lock:
            return list(self._known.values())

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int | None, ...]:
        if self._fixed:
            return shape
        declared = self._declared.get(name, ())
        known = declared if len(declared) == len(shape) else (None,) * len(shape)
        return tuple(size if size < STRETCHED or size == d else None for size, d in zip(shape, known, strict=True))

    def as_model(self, types: Mapping[str, tuple[int, tuple[int | None, ...]]]) -> ModelProto:
        """The segment as a model whose inputs have these types: ONNX's number of the element type, and the sizes."""
        graph = onnx.GraphProto(name=self.name, node=self.nodes)
        graph.initializer.extend(self._constants.values())
        graph.input.extend(onnx.helper.make_tensor_value_info(name, *type) for name, type in types.items())
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.writes)
        return ModelProto(
            ir_version=self._model.ir_version,
            opset_import=self._model.opset_import,
            functions=self._model.functions,
            graph=graph,
        )
