"""Constant folding: what does not depend on the inputs is computed once, at compile time, by ONNX's reference.

What shape arithmetic knows to be numbers becomes constants too, and an If whose condition is known its branch.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from ..ir import scalars as s
from ..ir.dims import symbol
from ..ir.dtypes import BOOL, of_numpy
from ..ir.export import node_to_onnx, split_operator, static_array, with_static_operands
from ..ir.graph import Constant, Graph, Node, TensorType, Value, constant_node
from ..ir.ops import REGISTRY
from ..ir.ops.declare import identifier
from ..ir.tensors import Tensor
from .pipeline import Pass, register
from .rewriting import Rewriter, attribute_symbols, is_small, rename, tensor_bytes, until_stable

RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout")
)
"""Operators that give something else each time."""

FEW, SLOW = 1 << 12, 1 << 18
"""Elements of a result, and elements combined for all of them, up to which any operator is folded."""

PASSING = ("Transpose", "Reshape", "LSTM", "GRU", "RNN")
"""Operators that are no products themselves, but hand their operands to some."""

MISTAKEN = frozenset((("Resize", "complex"), *(("GridSample", kind) for kind in ("int", "uint"))))
"""Operators with kinds of element types that the reference gets wrong: it drops imaginary parts, or truncates after
each axis."""


@register
@dataclass(frozen=True)
class Fold(Pass):
    """Folds nodes of constant operands.

    A result of more than `large` bytes that has more than `growth` times the bytes of its operands is left to the run:
    a constant that is expanded costs memory, and expanding it costs little. All results together take at most `most`
    bytes, or eight times those of the graph's constants: a constant may double with every node. Without `dequantize`
    tensors of integers that stand for reals stay integers.
    """

    name = "fold"
    large: int = 1 << 16
    growth: float = 2.0
    most: int = 1 << 28
    dequantize: bool = True

    def run(self, graph: Graph) -> Graph:
        room = [max(self.most, 8 * sum(handle.array.nbytes for handle in graph.constants.values()))]
        return until_stable(lambda found: Folder(found, options=self, room=room).run(), graph)


class Folder(Rewriter):
    """The sweep of `Fold`."""

    def __init__(
        self, graph: Graph, parent: Folder | None = None, options: Fold | None = None, room: list[int] | None = None
    ) -> None:
        """`room` holds the bytes that all results may still take."""
        super().__init__(graph, parent)
        self.room: list[int] = room or (parent.room if parent else [Fold.most])
        self.options: Fold = options or (parent.options if parent else Fold())
        self.defined: Counter[str] = parent.defined if parent else _definitions(graph)

    def visit(self, node: Node) -> None:
        if node.op == "Constant":
            self.add(node)
        elif node.op == "If" and (taken := self.condition(node.inputs[0])) is not None:
            self.inline(node, node.regions["then_branch" if taken else "else_branch"])
        elif (
            (arrays := self.known_sizes(node)) is not None
            or (arrays := self.uniform_weights(node)) is not None
            or (arrays := self.evaluated(node)) is not None
        ):
            for value, array in zip(node.outputs, arrays, strict=True):
                self.define(value, array, node.origin)
        else:
            self.add(node)

    def define(self, value: Value, array: np.ndarray, origin: tuple[str, ...]) -> None:
        """Lets a constant be the definition of a value; a shape that was not known before is known now."""
        made = constant_node(value.name, array, TensorType(of_numpy(array.dtype), array.shape), origin)
        if made.output != value:
            self.replace(value, made.output)
        self.add(made)
        if value.dtype.is_integer and is_small(made.output):
            stem = identifier(value.name)
            self.sizes.update((f"{stem}_{k}", int(element)) for k, element in enumerate(array.reshape(-1).tolist()))

    # Values that shape arithmetic knows.

    def known_sizes(self, node: Node) -> Sequence[np.ndarray] | None:
        """The outputs, where shape arithmetic knows all their elements as integers or truth values."""
        if node.op not in REGISTRY or node.op in RANDOM or not node.outputs:
            return None
        if not all(is_small(value) and (value.dtype.is_integer or value.dtype == BOOL) for value in node.outputs):
            return None
        self.learn(node)
        found = []
        for value in node.outputs:
            known = self.inference.values.get(value.name)
            if known is None or not all(isinstance(element, int) for element in known):
                return None
            shape = [extent for extent in value.shape if isinstance(extent, int)]
            low, high = value.dtype.limits
            if any(not low <= element <= high for element in known if isinstance(element, int)):
                return None
            found.append(np.array(known, value.dtype.numpy).reshape(shape))
        return found

    def condition(self, value: Value | None) -> bool | None:
        """A condition that is known."""
        number = self.scalar(value)
        if number is None and value is not None:
            known = self.inference.values.get(value.name)
            number = known[0] if known is not None and isinstance(known[0], bool) else None
        return None if number is None else bool(number)

    def uniform_weights(self, node: Node) -> list[np.ndarray] | None:
        """Weights of a contraction that are all one number: an array that holds it once, whatever its size. Schedules
        pack such weights like any others."""
        shape = node.attributes.get("input")
        if node.op != "ConstantOfShape" or not isinstance(shape, tuple) or not node.output.tensor.static:
            return None
        readers = self.graph.users.get(node.output, ())
        if not any(reader.op in REGISTRY and REGISTRY[reader.op].heavy for reader in readers):
            return None
        handle = node.attributes.get("value")
        number = handle.array.reshape(-1)[0] if isinstance(handle, Constant) else np.float32(0)
        return [np.broadcast_to(np.asarray(number, node.output.dtype.numpy), node.output.shape)]  # type: ignore[arg-type]

    # Evaluation.

    def evaluated(self, node: Node) -> Sequence[np.ndarray] | None:
        """The outputs of a node of constants, by ONNX's reference; None where it may or can not be folded."""
        tensors = all(isinstance(value.type, TensorType) for value in (*node.operands, *node.outputs))
        if (node.op in RANDOM and not _is_seeded(node)) or node.regions or not node.outputs or not tensors:
            return None
        if (node.op, node.outputs[0].dtype.kind) in MISTAKEN:
            return None
        if node.op == "DequantizeLinear" and not self.options.dequantize and math.prod(node.output.shape) != 1:
            return None
        if any(attribute_symbols(attribute) for attribute in node.attributes.values()):
            return None
        arrays = [self.array(value) for value in node.operands]
        if any(array is None for array in arrays) or not self.worthwhile(node) or self.is_slow(node):
            return None
        feeds = {value.name: array for value, array in zip(node.operands, arrays, strict=True) if array is not None}
        try:
            results = evaluate(node, feeds)
        except Exception as error:  # the reference raises whatever its numpy code meets
            logging.getLogger(__name__).debug("%s is not folded: %s", node.where, error)
            return None
        for value, array in zip(node.outputs, results, strict=True):
            if value.dtype.kind != "string" and of_numpy(array.dtype) != value.dtype:
                return None
        return results

    def worthwhile(self, node: Node) -> bool:
        """Whether the outputs take no more memory than is allowed."""
        sizes = [tensor_bytes(value.type) for value in node.outputs]
        total = sum(size for size in sizes if size is not None)
        read = sum(tensor_bytes(value.type) or 0 for value in dict.fromkeys(node.operands))
        most = math.inf if self.is_weight(node) else max(self.options.large, self.options.growth * read, 0)
        if total > most or total > max(self.room[0], 4096):
            return False
        self.room[0] -= total
        return True

    def is_weight(self, node: Node) -> bool:
        """Whether the node makes reals of bytes for a product: schedules want weights that are constants."""
        if node.op != "DequantizeLinear" or node.operands[0].dtype.bits < 8:
            return False
        readers = self.graph.users.get(node.output, ())
        return any(n.op in PASSING or (n.op in REGISTRY and REGISTRY[n.op].heavy) for n in readers)

    def is_slow(self, node: Node) -> bool:
        """Whether ONNX's reference would take long: where each result is made of a window of its own, it loops in
        Python. The code that is compiled takes a thousandth of that."""
        operator = REGISTRY.get(node.op)
        count = sum(math.prod(d for d in value.shape if isinstance(d, int)) for value in node.outputs)
        read = sum(math.prod(d for d in value.shape if isinstance(d, int)) for value in node.operands)
        if operator is None or operator.products or count < FEW:
            return False
        names = [value.name for value in node.outputs]
        made = self.inference.definition(node.op, node.inputs, node.attributes, node.regions, names, node.origin)
        work = sum(_window(tensor) for tensor in made if isinstance(tensor, Tensor) and tensor.kind != "opaque") * count
        return work > max(2 * (read + count), SLOW)

    # Branches.

    def inline(self, node: Node, region: Graph) -> None:
        """The nodes of a branch in place of the If."""
        names: dict[Value, Value] = {}
        for inner in region.nodes:
            for value in inner.outputs:
                # Two branches may use one name, but a graph may not define what is used elsewhere.
                if self.defined[value.name] > 1:
                    names[value] = Value(self.names.fresh(value.name), value.type)
        for old, new in names.items():
            self.resize(old, new)
        region = rename(region, names)
        for inner in region.nodes:
            self.visit(inner.with_inputs(self.mapping))
        for value, result in zip(node.outputs, region.outputs, strict=True):
            result = self.mapping.get(result, result)
            own = result.name in self._producers and result not in self.graph.outputs
            if value in self.graph.outputs and not own:
                self.add(Node("Identity", (result,), (value,), origin=node.origin))
            else:
                self.replace(value, result)


def _window(tensor: Tensor) -> int:
    """How many elements an element of a definition combines."""
    element = tensor.at([symbol(f"~{axis}") for axis in range(tensor.rank)])
    ranges = [part.ranges for part in s.walk(element, into_dims=False) if isinstance(part, s.Reduce)]
    return max((math.prod(e for _, e in found if isinstance(e, int)) for found in ranges), default=1)


def _is_seeded(node: Node) -> bool:
    """Whether a random operator gives what its seed says: in ONNX's reference numpy's numbers for that seed."""
    return node.op in ("RandomNormal", "RandomUniform") and node.attributes.get("seed") is not None


def _definitions(graph: Graph) -> Counter[str]:
    """How many graphs, regions counted one by one, define each name."""
    found = Counter(value.name for value in graph.inputs)
    for node in graph.walk():
        found.update(value.name for value in node.outputs)
        found.update(value.name for region in node.regions.values() for value in region.inputs)
    return found


def evaluate(node: Node, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of one node on arrays, by `onnx.reference`; raises what that raises, OnnxcError where ONNX has no
    such operator."""
    from onnx.reference import ReferenceEvaluator

    if node.op == "Erf":  # the reference rounds f64 to f32
        return [np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype) for x in feeds.values()]
    node, contents = with_static_operands(node)
    arrays = {value.name: static_array(value, elements) for value, elements in contents.items()} | dict(feeds)
    function = onnx.FunctionProto(name="fold", domain="fold", input=list(arrays))
    function.output.extend(value.name for value in node.outputs)
    function.node.extend(node_to_onnx(node))
    function.opset_import.add(domain="", version=onnx.defs.onnx_opset_version())
    domain = split_operator(node.op)[0]
    if domain:
        function.opset_import.add(domain=domain, version=1)
    with np.errstate(all="ignore"):
        return [np.asarray(result) for result in ReferenceEvaluator(function).run(None, arrays, {})]
