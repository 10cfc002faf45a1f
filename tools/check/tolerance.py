"""How far rounding may carry a compiled model from its reference: an error model that follows the graph.

An operator of unit roundoff u whose element is made by N roundings is off by about sqrt(N) u relative to the size of
what it sums: roundings are of either sign, and their sum is bounded by LAMBDA sqrt(N) u with a probability of
1 - 2 exp(-LAMBDA^2/2) (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis", Theorem 2.4; the
certain bound N u of Higham 2002, "Accuracy and Stability of Numerical Algorithms", 3.1, is a gross overestimate for
long sums). N comes from the operator's declaration: the lengths of the sums in its definition, what is computed per
element, an elementary function as the FUNCTION roundings that its polynomial may be off. Along the graph these errors
add up: a value's is that of its worst operand and its operator's own.

This knows nothing of the numbers: what cancels or is exponentiated may be further off without any fault. Where a value
exceeds this tolerance, `noise` measures what rounding does to it on these very inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...ir import scalars as s
from ...ir.dims import Dim, evaluate, symbol
from ...ir.dtypes import BY_NAME, DType
from ...ir.errors import OnnxcError
from ...ir.graph import Graph, Node, TensorType, Value
from ...ir.infer import Inference
from ...ir.tensors import Tensor
from .compare import EXACT, Tolerance, unit_roundoff

LAMBDA = 4.0
"""Bounds hold for a sum with a probability of 99.93 %, and sums are rarely as long in fact (lanes and tiles)."""
FUNCTION = 16
"""Roundings that an elementary function counts as: 4 units, as both sides may be off by two."""
UNKNOWN_TRIPS = 16
"""Iterations of a loop whose number nothing tells."""
PRODUCTS = {"f16": "f16", "bf16": "bf16", "tf32": "f16"}
"""The type of whose unit roundoff products are by `--precision`; tf32 has as many bits as f16."""
STEPS = frozenset(("QuantizeLinear", "DynamicQuantizeLinear", "Round", "Floor", "Ceil", "Cast", "CastLike"))
"""Operators that turn a number near a tie into its neighbour."""
CHOICES = frozenset(("ArgMax", "ArgMin", "TopK", "Hardmax"))
"""Operators whose result jumps where two elements are nearly the same."""


def tolerances(graph: Graph, sizes: Mapping[str, int] | None = None, precision: str = "f32") -> dict[str, Tolerance]:
    """The tolerance for every value of an imported graph, by name; those of its outputs are among them.

    `sizes` are the symbols' values. Integers and truth values must be equal, but for one step where they come from
    floats by rounding; whether an index near a tie is right is not decided here.
    """
    model = _Errors(dict(sizes or {}), unit_roundoff(BY_NAME[PRODUCTS[precision]]) if precision in PRODUCTS else 0.0)
    model.graph(graph)
    return {name: _tolerance(name, error, model) for name, error in model.errors.items()}


def _tolerance(name: str, error: float, model: _Errors) -> Tolerance:
    if name in model.stepped:
        return Tolerance(steps=1)
    return Tolerance(LAMBDA * error) if name in model.floats else EXACT


def roundings(tensor: Tensor, sizes: Mapping[str, int]) -> int:
    """How many roundings make an element of a definition: the lengths of its sums, and what it computes once."""
    if tensor.kind == "opaque" or tensor.dtype.kind in ("string", "complex"):
        return _roundings_of_opaque(tensor, sizes)
    element = tensor.at([symbol(f"~{axis}") for axis in range(tensor.rank)])
    count = 0
    for node in s.walk(element, into_dims=False):
        if isinstance(node, s.Reduce):
            count += math.prod(_size(extent, sizes) for _, extent in node.ranges) if node.op in ("add", "mul") else 0
        elif isinstance(node, s.Unary) and node.op in s.MATH:
            count += FUNCTION
        elif node.dtype.is_float and isinstance(node, s.Unary | s.Binary | s.Fma | s.Cast):
            count += 1
    return max(count, 0)


def _roundings_of_opaque(tensor: Tensor, sizes: Mapping[str, int]) -> int:
    """Of what has no definition (recurrent layers, determinants): a row of each operand for each row of the first."""
    shapes = [source.shape for source in tensor.sources if source.dtype.is_float and source.rank]
    if not shapes:
        return 0
    return _size(shapes[0][0], sizes) * (sum(_size(shape[-1], sizes) for shape in shapes) + 4 * FUNCTION)


def _size(dim: Dim, sizes: Mapping[str, int]) -> int:
    """A dim as a number; what only the run tells counts as 1."""
    try:
        return max(evaluate(dim, sizes), 0)
    except (KeyError, ZeroDivisionError):
        return 1


@dataclass
class _Errors:
    """Relative errors of values by name, gathered in the graph's order; `least` is the roundoff of narrow products."""

    sizes: Mapping[str, int]
    least: float
    errors: dict[str, float] = field(default_factory=dict)
    floats: set[str] = field(default_factory=set)
    stepped: set[str] = field(default_factory=set)
    inference: Inference = field(default_factory=Inference)

    def graph(self, graph: Graph) -> None:
        for value in graph.inputs:
            self.errors.setdefault(value.name, 0.0)
        for node in graph.nodes:
            self.node(node)

    def node(self, node: Node) -> None:
        incoming = max((self.errors.get(value.name, 0.0) for value in node.reads), default=0.0)
        if node.regions:
            outgoing = self.regions(node, incoming)
        else:
            outgoing = {value.name: incoming for value in node.outputs}
            for value, count in self.own(node).items():
                outgoing[value.name] = incoming + self.unit(value) * math.sqrt(count)
        for value in node.outputs:
            self.errors[value.name] = outgoing[value.name]
            dtype = _dtype(value)
            if dtype is None:
                continue
            if dtype.kind in ("float", "complex"):
                self.floats.add(value.name)
            elif dtype.is_integer and self.rounds(node, incoming):
                self.stepped.add(value.name)

    def rounds(self, node: Node, incoming: float) -> bool:
        name = node.op.rpartition(".")[2]
        return (incoming > 0 and (name in STEPS or any(v.name in self.stepped for v in node.reads))) or (
            name.startswith(("QLinear", "Quantize", "DynamicQuantize"))
        )

    def unit(self, value: Value) -> float:
        dtype = _dtype(value)
        return 0.0 if dtype is None else max(unit_roundoff(dtype), self.least * bool(unit_roundoff(dtype)))

    def own(self, node: Node) -> dict[Value, int]:
        """The roundings of the node itself, by output."""
        if node.op == "Constant":
            self.inference.node(node)
            return {}
        names = [value.name for value in node.outputs]
        try:
            tensors = self.inference.definition(node.op, node.inputs, node.attributes, node.regions, names, node.origin)
        except OnnxcError:  # an operand's values that this walk does not follow
            return dict.fromkeys(node.outputs, FUNCTION)
        made = zip(node.outputs, tensors, strict=False)
        return {value: roundings(tensor, self.sizes) for value, tensor in made if isinstance(tensor, Tensor)}

    def regions(self, node: Node, incoming: float) -> dict[str, float]:
        """The worst branch; of a loop, what one iteration adds, as often as it runs."""
        found = dict.fromkeys((value.name for value in node.outputs), incoming)
        for region in node.regions.values():
            for value in region.inputs:
                self.errors[value.name] = incoming
            self.graph(region)
            added = max((self.errors.get(value.name, 0.0) for value in region.outputs), default=0.0) - incoming
            trips = 1 if node.op == "If" else self.trips(node)
            for name in found:
                found[name] = max(found[name], incoming + max(added, 0.0) * trips)
        return found

    def trips(self, node: Node) -> int:
        if node.op == "Loop":
            count = node.inputs[0] and self.inference.values.get(node.inputs[0].name)
            return int(count[0]) if count and isinstance(count[0], int) else UNKNOWN_TRIPS
        scans = node.attributes.get("num_scan_inputs", 0)
        sequence = node.inputs[-1] if node.inputs and scans else None
        if sequence is None or not isinstance(sequence.type, TensorType):
            return UNKNOWN_TRIPS
        axes = node.attributes.get("scan_input_axes", (0,))
        axis = axes[-1] if isinstance(axes, tuple) and axes and isinstance(axes[-1], int) else 0
        return _size(sequence.shape[axis], self.sizes)


def _dtype(value: Value) -> DType | None:
    return value.dtype if isinstance(value.type, TensorType) else None
