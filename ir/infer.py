"""Types and symbolic values of a graph, node by node, from the operators' declarations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .dims import Dim, Sum, bounds, dim_max, symbol, symbols
from .dtypes import I32, I64
from .errors import LimitError, OnnxcError, ShapeError, UnsupportedError, ValueNeeded
from .graph import Attribute, Constant, Graph, Node, TensorType, Type, Value
from .guards import Guard, collecting_guards
from .intervals import OPEN, PROBE, Interval, interval, union
from .ops import REGISTRY
from .ops.declare import Context, identifier
from .ops.random import is_drawn
from .scalars import Scalar
from .symbolic import SymbolicValue, evaluate_scalar
from .tensors import Tensor, buffer_tensor, collecting_assumptions, opaque_tensor, unflatten

# Shape arithmetic handles a few numbers per tensor; larger ones are data.
SYMBOLIC_LIMIT = 64
MOST_STATIC = 1 << 13
"""Elements of an operand that decides shapes, at most."""


class Inference:
    """Walks a graph in order and holds what is known of each value.

    `values` maps a value's name to the tuple of its elements (row-major) where they are known, `partly` where only some
    are (the others are None), `ranges` to bounds of all elements; `assumptions` are pairs of dims taken for equal,
    `guards` those of the last definition that nothing proves;
    `bindings` tell for each symbol that only the run knows which element of which value it is.
    """

    def __init__(self, mark: str = "", probing: bool = False) -> None:
        """`mark` begins the names of the symbols that are made here; where `probing`, one element of each output is
        formed, so that operands of a wrong rank are found where the node is known."""
        self.mark = mark
        self.probing = probing
        self.values: dict[str, tuple[SymbolicValue, ...]] = {}
        self.partly: dict[str, tuple[SymbolicValue | None, ...]] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.ranges: dict[str, Interval] = {}
        self.assumptions: list[tuple[Dim, Dim]] = []
        self.bindings: dict[str, tuple[str, int]] = {}
        self.draw: tuple[Scalar, ...] = ()
        self.guards: list[Guard] = []

    def define(self, value: Value, array: np.ndarray) -> None:
        """Makes the content of a constant known."""
        self.arrays[value.name] = array
        if array.size <= SYMBOLIC_LIMIT and array.dtype.kind in "iufb":
            self.values[value.name] = tuple(array.reshape(-1).tolist())

    def outputs(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attributes: Mapping[str, Attribute],
        regions: Mapping[str, Graph] | None = None,
        output_names: Sequence[str] = ("out",),
        origin: Sequence[str] = (),
    ) -> tuple[Type, ...]:
        """The types of a node's outputs; remembers the outputs' values where they are known.

        Raises UnsupportedError for an unknown operator, ShapeError for operands that do not fit.
        """
        if op == "Constant":
            handle = attributes["value"]
            assert isinstance(handle, Constant)
            return (_array_type(handle.array),)
        tensors = self.definition(op, inputs, attributes, regions, output_names, origin)
        for name, tensor in zip(output_names, tensors, strict=False):
            if isinstance(tensor, Tensor) and name:
                # What reads outside an axis has no value: the run refuses it, should it come there.
                if not any(self.is_broken(guard) for guard in self.guards) and not is_drawn(op, attributes):
                    self._evaluate(name, tensor)
                if tensor.dtype in (I32, I64):
                    self._bound(name, tensor, REGISTRY[op].pointwise)
        return tuple(TensorType(t.dtype, t.shape) if isinstance(t, Tensor) else t for t in tensors)

    def definition(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attributes: Mapping[str, Attribute],
        regions: Mapping[str, Graph] | None = None,
        output_names: Sequence[str] = ("out",),
        origin: Sequence[str] = (),
        operands: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor | Type, ...]:
        """The node's outputs as tensors over its inputs; `operands` gives definitions to use in place of buffers."""
        operator = REGISTRY.get(op)
        where = f"{op} ({', '.join(origin)})" if origin else op
        if operator is None:
            raise UnsupportedError(f"{where}: no declaration of this operator; `onnxc ops` lists those there are")
        static = operator.static_positions(len(inputs))
        arguments: list[Any] = []
        for position, value in enumerate(inputs):
            if value is None:
                arguments.append(None)
            elif position in static:
                arguments.append(self.static(value))
            elif isinstance(value.type, TensorType):
                arguments.append(self._operand(value, (operands or {}).get(value.name)))
            else:
                arguments.append(value.type)
        types = tuple(None if value is None else value.type for value in inputs)
        known = tuple(None if value is None else self.values.get(value.name) for value in inputs)
        bodies = regions or {}

        def compose(name: str, *given: Tensor) -> tuple[Tensor, ...]:
            outside = {v.name: a for v, a in zip(inputs, arguments, strict=True) if v and isinstance(a, Tensor)}
            return self.compose(bodies[name], given, outside)

        try:
            with collecting_assumptions() as assumed, collecting_guards() as guards:
                context = Context(tuple(output_names), bodies, types, known, self.mark, compose, self.draw)
                result = operator(arguments, attributes, context)
            if self.probing:
                _probe(result)
        except ValueNeeded as error:
            raise ValueNeeded(f"{where}: {error}") from error
        except OnnxcError as error:
            self._blame_values(where, arguments, static, inputs, error)
            shapes = ", ".join(str(value.type) if value is not None else "absent" for value in inputs)
            raise type(error)(f"{where} on ({shapes}): {error}") from error
        except (
            TypeError,
            AssertionError,
            ValueError,
            KeyError,
            IndexError,
            AttributeError,
            ArithmeticError,
        ) as error:
            self._blame_values(where, arguments, static, inputs, error)
            shapes = ", ".join(str(value.type) if value is not None else "absent" for value in inputs)
            raise ShapeError(
                f"{where} on ({shapes}): operands or attributes do not fit the operator: {error}"
            ) from error
        self._assume(assumed)
        self.guards = guards
        return result

    def is_broken(self, guard: Guard) -> bool:
        """Whether known elements surely break a guard, be the sizes what they may."""
        found = self.elements(guard)
        if found is None or not found.size:
            return False
        least, end = guard.least, guard.end
        return (isinstance(least, int) and int(found.min()) < least) or (
            isinstance(end, int) and int(found.max()) >= end
        )

    def elements(self, guard: Guard) -> np.ndarray | None:
        """The elements that a guard speaks of, where they are known numbers."""
        buffer = guard.indices.buffer
        if buffer is None:
            return None
        array, known = self.arrays.get(buffer.name), self.values.get(buffer.name)
        if array is None and known is not None and all(type(number) is int for number in known):
            array = np.array(known, np.int64).reshape([int(str(extent)) for extent in guard.indices.shape])
        return array if array is None or guard.column is None else array[..., guard.column]

    def compose(self, region: Graph, inputs: Sequence[Tensor], outside: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """A region's outputs as tensors over its inputs and over what it reads from outside, by name."""
        found = {**outside, **{value.name: tensor for value, tensor in zip(region.inputs, inputs, strict=True)}}
        for node in region.nodes:
            names = [value.name for value in node.outputs]
            made = self.definition(node.op, node.inputs, node.attributes, node.regions, names, node.origin, found)
            found.update({n: tensor for n, tensor in zip(names, made, strict=False) if isinstance(tensor, Tensor)})
        return tuple(found[value.name] for value in region.outputs)

    def _operand(self, value: Value, given: Tensor | None) -> Tensor:
        """An input as a buffer or as given, with the range of its elements as far as that is known."""
        tensor = given or buffer_tensor(value.name, value.dtype, value.shape)
        if value.dtype in (I32, I64) and tensor.lower is None and tensor.upper is None:
            tensor.lower, tensor.upper = self._range(value.name)
        return tensor

    def _bound(self, name: str, tensor: Tensor, pointwise: bool) -> None:
        """Learns the bounds of an integer tensor: those declared, those of known elements, or by arithmetic."""
        found: Interval = tensor.lower, tensor.upper
        before = self.ranges.pop(name, None)
        if found == OPEN:
            found = self._range(name)
        if found == OPEN and pointwise and tensor.kind == "map":
            found = interval(tensor.at([symbol(f"{PROBE}{axis}", 0) for axis in range(tensor.rank)]), self._range)
        # Branches may give one name to values of their own: what is known holds for all of these.
        self.ranges[name] = found if before is None else union(before, found)

    def _range(self, name: str) -> Interval:
        found = self.ranges.get(name)
        if found is None:
            found = self.ranges[name] = self._known_range(name)
        return found

    def _known_range(self, name: str) -> Interval:
        array, known = self.arrays.get(name), self.values.get(name)
        if array is not None:
            return (int(array.min()), int(array.max())) if array.size else (0, 0)
        dims = known_dims(known)
        if not dims:
            return None, None
        lows = [bounds(dim)[0] for dim in dims]
        return (None if None in lows else min(low for low in lows if low is not None)), dim_max(*dims)

    def _blame_values(
        self,
        where: str,
        arguments: Sequence[Any],
        static: Mapping[int, str],
        inputs: Sequence[Value | None],
        error: Exception,
    ) -> None:
        """Raises ValueNeeded where the trouble is an operand that only the run tells."""
        for position in static:
            given, value = arguments[position], inputs[position]
            symbolic = given is not None and any(
                isinstance(item, Sum) and any(x.name in self.bindings for x in symbols(item)) for item in given
            )
            if symbolic and value is not None:
                raise ValueNeeded(f"{where}: %{value.name} decides the shape but is known only at run time") from error

    def static(self, value: Value) -> tuple[Any, ...]:
        """The elements of an operand that decides shapes; run-time symbols where they are not known."""
        known = self.values.get(value.name)
        if known is not None:
            return tuple(known)
        array = self.arrays.get(value.name)
        if array is not None and array.size > MOST_STATIC:
            raise LimitError(f"%{value.name} decides a shape by {array.size:,} numbers")
        if array is not None:
            return tuple(array.reshape(-1).tolist())
        count = math.prod(d for d in value.shape if isinstance(d, int)) if value.tensor.static else None
        if count is None or count > SYMBOLIC_LIMIT or not value.dtype.is_integer:
            raise ValueNeeded(f"%{value.name} decides a shape but is known only at run time, as {value.type}")
        elements: list[SymbolicValue] = []
        for element, part in enumerate(self.partly.get(value.name, (None,) * count)):
            if part is not None:
                elements.append(part)
                continue
            name = f"{self.mark}{identifier(value.name)}_{element}"
            self.bindings[name] = (value.name, element)
            elements.append(symbol(name, None))
        return tuple(elements)

    def _evaluate(self, name: str, tensor: Tensor) -> None:
        if tensor.kind == "opaque" or tensor.dtype.kind in ("complex", "string"):
            return
        size = tensor.size
        if not isinstance(size, int) or size > SYMBOLIC_LIMIT or (tensor.sources and not self._sources_known(tensor)):
            return
        with collecting_assumptions() as assumed:
            elements = [evaluate_scalar(tensor.at(unflatten(flat, tensor.shape)), self._lookup) for flat in range(size)]
        known = tuple(element for element in elements if element is not None)
        if len(known) == size:
            self.values[name] = known
        elif known:
            self.partly[name] = tuple(elements)
        self._assume(assumed)

    def _assume(self, pairs: Sequence[tuple[Dim, Dim]]) -> None:
        self.assumptions += [pair for pair in pairs if pair not in self.assumptions]

    def _sources_known(self, tensor: Tensor) -> bool:
        """A cheap test that spares building elements of data tensors: the sources, or some of integers, are known."""
        enough = any if tensor.dtype.is_integer else all
        return enough(
            self._sources_known(source) if source.buffer is None else self._is_known(source.buffer.name)
            for source in tensor.sources
        )

    def _is_known(self, name: str) -> bool:
        return name in self.values or name in self.partly or name in self.arrays

    def _lookup(self, name: str, offset: int) -> SymbolicValue | None:
        known = self.values.get(name) or self.partly.get(name)
        if known is not None:
            return known[offset] if 0 <= offset < len(known) else None
        array = self.arrays.get(name)
        if array is not None and array.dtype.kind in "iufb" and 0 <= offset < array.size:
            value: int | float | bool = array.reshape(-1)[offset].item()
            return value
        return None

    def graph(self, graph: Graph) -> None:
        """Learns all that the nodes of a typed graph tell, regions included."""
        for node in graph.nodes:
            self.node(node)

    def node(self, node: Node) -> tuple[Type, ...]:
        """The inferred types of one node of a typed graph; its regions are walked too."""
        if node.op == "Constant":
            handle = node.attributes["value"]
            assert isinstance(handle, Constant)
            self.define(node.output, handle.array)
            return (node.output.type,)
        for region in node.regions.values():
            self.graph(region)
        if node.op == "Fused":
            for outer, inner in zip(node.outputs, node.regions["body"].outputs, strict=True):
                if inner.name in self.values:
                    self.values[outer.name] = self.values[inner.name]
                if inner.name in self.ranges:
                    self.ranges[outer.name] = self.ranges[inner.name]
            return tuple(value.type for value in node.regions["body"].outputs)
        names = [value.name for value in node.outputs]
        return self.outputs(node.op, node.inputs, node.attributes, node.regions, names, node.origin)


def _probe(outputs: Sequence[Tensor | Type]) -> None:
    """Forms the expression of an element of each output; raises what the operator's definition meets."""
    for tensor in outputs:
        if isinstance(tensor, Tensor) and tensor.kind != "opaque":
            tensor.at(tuple(0 if d == 1 else symbol(f"i{axis}", 0, d - 1) for axis, d in enumerate(tensor.shape)))


def _array_type(array: np.ndarray) -> TensorType:
    from .dtypes import of_numpy

    return TensorType(of_numpy(array.dtype), tuple(int(d) for d in array.shape))


def known_dims(values: Sequence[SymbolicValue] | None) -> tuple[Dim, ...] | None:
    """Values that are all ints or dims, as dims; else None."""
    if values is None or not all(isinstance(v, int | Sum) and not isinstance(v, bool) for v in values):
        return None
    return tuple(v for v in values if isinstance(v, int | Sum))


__all__ = ["I64", "Inference", "known_dims", "opaque_tensor"]
