"""Operators on quantised tensors (QLinearConv and its kin) in the form of pairs: DequantizeLinear, the operator on
floats, QuantizeLinear. That is how ONNX and com.microsoft define them, and the form in which layers of a float model
are found again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, helper

from ...compiler.functions import domain_of
from .subject import Subject

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Form:
    """How an operator names its operands: `plain` ones, then `operands` quantised by (x, scale, zero point), where
    position -1 is nothing; the scale and zero point of the `result`, which is left in floats without; a `bias` of
    integers whose scale is the product of the operands', or (`added`) of floats. The scale of operand 1 is along
    `axis` of it where it has several elements. `repeated`: triples from the first operand on to the last.
    """

    operator: str
    operands: tuple[tuple[int, int, int], ...]
    result: tuple[int, int] | None
    axis: int = 0
    bias: int | None = None
    added: int | None = None
    plain: tuple[int, ...] = ()
    repeated: bool = False


_TWO, _ONE = ((0, 1, 2), (3, 4, 5)), ((0, 1, 2),)
FORMS: Mapping[tuple[str, str], Form] = {
    ("", "QLinearConv"): Form("Conv", _TWO, (6, 7), 0, bias=8),
    ("", "QLinearMatMul"): Form("MatMul", _TWO, (6, 7), -1),
    (MICROSOFT, "QLinearConv"): Form("Conv", _TWO, (6, 7), 0, bias=8),
    (MICROSOFT, "QGemm"): Form("Gemm", _TWO, (7, 8), -1, bias=6),
    (MICROSOFT, "QLinearAdd"): Form("Add", _TWO, (6, 7)),
    (MICROSOFT, "QLinearMul"): Form("Mul", _TWO, (6, 7)),
    (MICROSOFT, "QLinearSigmoid"): Form("Sigmoid", _ONE, (3, 4)),
    (MICROSOFT, "QLinearLeakyRelu"): Form("LeakyRelu", _ONE, (3, 4)),
    (MICROSOFT, "QLinearSoftmax"): Form("Softmax", _ONE, (3, 4)),
    (MICROSOFT, "QLinearGlobalAveragePool"): Form("GlobalAveragePool", _ONE, (3, 4)),
    (MICROSOFT, "QLinearAveragePool"): Form("AveragePool", _ONE, (3, 4)),
    (MICROSOFT, "QLinearWhere"): Form("Where", ((1, 2, 3), (4, 5, 6)), (7, 8), plain=(0,)),
    (MICROSOFT, "QLinearConcat"): Form("Concat", ((2, 3, 4),), (0, 1), repeated=True),
    (MICROSOFT, "MatMulIntegerToFloat"): Form("MatMul", ((0, 2, 4), (1, 3, 5)), None, -1, added=6),
}  # fmt: skip
"""By domain and operator."""
OWN = frozenset(("channels_last", "opset"))
"""Attributes that the operators on floats do not have."""


def as_pairs(subject: Subject) -> Subject:
    """The subject with the operators of FORMS as pairs; a node keeps its name."""
    found = _Rewriting(subject)
    nodes = [new for node in subject.nodes for new in found.rewritten(node)]
    return replace(subject, nodes=tuple(nodes), constants={**subject.constants, **found.constants})


class _Rewriting:
    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.constants: dict[str, Any] = {}
        self.dequantised: dict[tuple[str, str, str], str] = {}

    def rewritten(self, node: NodeProto) -> Iterator[NodeProto]:
        form = FORMS.get((domain_of(node.domain), node.op_type))
        attributes = {a.name: a for a in node.attribute}
        if form is None or attributes.get("channels_last", AttributeProto()).i:
            yield node
            return
        names = [*node.input, *[""] * 9]
        operands: Sequence[tuple[int, int, int]] = form.operands
        if form.repeated:
            operands = [(i, i + 1, i + 2) for i in range(operands[0][0], len(node.input), 3)]
        reads = [names[i] for i in form.plain]
        axis = 0 if attributes.get("transB", AttributeProto()).i else form.axis
        for number, positions in enumerate(operands):
            x, scale, zero = (names[i] for i in positions)
            yield from self.operand(node, reads, x, scale, zero, axis if number else 1)
        result = names[form.result[0]] if form.result else ""
        floats = f"{node.output[0]}.float" if result else node.output[0]
        if form.bias is not None and names[form.bias]:
            yield from self.bias(node, reads, names[form.bias], *(names[p[1]] for p in form.operands))
        last = f"{floats}.product" if form.added is not None and names[form.added] else floats
        kept = [a for name, a in attributes.items() if name not in OWN and (form.operator, name) != ("Gemm", "beta")]
        made = helper.make_node(form.operator, reads, [last], node.name)
        made.attribute.extend(kept)
        yield made
        if last != floats:
            yield helper.make_node("Add", [last, names[form.added or 0]], [floats], f"{node.name}/Add")
        if result:
            zero = names[(form.result or (0, 0))[1]]
            ends = [floats, self.scalar(result), *filter(None, [self.scalar(zero)])]
            yield helper.make_node("QuantizeLinear", ends, list(node.output), f"{node.name}/QuantizeLinear")
            yield from self.operand(node, [], node.output[0], result, zero, 1)  # to be looked at

    def operand(
        self, node: NodeProto, reads: list[str], x: str, scale: str, zero: str, axis: int
    ) -> Iterator[NodeProto]:
        """Adds the dequantised operand to `reads`, and yields the node that makes it where there is none yet."""
        key = (x, scale, zero)
        if key not in self.dequantised:
            self.dequantised[key] = name = f"{x}.dequantized{len(self.dequantised)}"
            ends = [x, self.scalar(scale), *filter(None, [self.scalar(zero, scale)])]
            several = np.size(self.subject.constants.get(scale, 0)) > 1
            more: dict[str, Any] = {"axis": axis} if several else {}
            yield helper.make_node("DequantizeLinear", ends, [name], f"{node.name}/DequantizeLinear/{x}", **more)
        reads.append(self.dequantised[key])

    def bias(self, node: NodeProto, reads: list[str], bias: str, *scales: str) -> Iterator[NodeProto]:
        product, name = f"{node.output[0]}.{bias}.scale", f"{node.output[0]}.{bias}.dequantized"
        alpha = next((a.f for a in node.attribute if a.name == "alpha"), 1.0)
        known = [self.subject.constants.get(scale) for scale in scales]
        if any(scale is None for scale in known):  # scales that are computed: the operator takes no bias in floats
            yield helper.make_node("Mul", [self.scalar(scale) for scale in scales], [product], f"{node.name}/Mul")
        else:
            factors = [np.asarray(scale, np.float32) for scale in known]
            self.constants[product] = _scalar(np.float32(alpha) * factors[0].reshape(-1)[:1] * factors[1])
        more: dict[str, Any] = {"axis": 0} if np.size(self.constants.get(product, 0)) > 1 else {}
        yield helper.make_node(
            "DequantizeLinear", [bias, product], [name], f"{node.name}/DequantizeLinear/bias", **more
        )
        reads.append(name)

    def scalar(self, name: str, scale: str = "") -> str:
        """A constant of one element with no axes (as along the axis of a scale of several it would be too short); of
        the zero point of such a scale one for each."""
        array = self.subject.constants.get(name)
        if array is None:
            return name
        count = np.size(self.subject.constants.get(scale, 0))
        if np.size(array) == 1 and count > 1:
            self.constants[f"{name}.{count}"] = np.broadcast_to(np.reshape(array, -1), (count,))
            return f"{name}.{count}"
        if np.size(array) == 1 and np.ndim(array):
            self.constants[f"{name}.scalar"] = _scalar(array)
            return f"{name}.scalar"
        return name


def _scalar(array: Any) -> Any:
    """An array of one element without axes, another as it is."""
    return np.reshape(array, ()) if np.size(array) == 1 else np.asarray(array)
