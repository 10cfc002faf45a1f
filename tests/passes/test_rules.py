"""Every rule of the tables applies somewhere, and computes what it replaces; the mechanism matches what it should."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnxc.ir.dtypes import BOOL, F32, I32, I64, DType
from onnxc.ir.export import to_onnx
from onnxc.ir.graph import Graph, Names, Node, TensorType, Value, constant_node
from onnxc.ir.infer import Inference
from onnxc.passes.algebra import RULES
from onnxc.passes.rules import Apply, Operand, Rule, Variable, apply_rules, op, rule
from pass_checks import agree, check, parsed, random_inputs, reference, verify


class Instance:
    """A graph made of a rule's pattern, over inputs of one element type."""

    def __init__(self, item: Rule, dtype: DType, scalar_constants: bool) -> None:
        self.item, self.dtype, self.scalar_constants = item, dtype, scalar_constants
        self.names, self.inference = Names(), Inference()
        self.inputs: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.constants: dict[str, Value] = {}
        self.random = np.random.default_rng(len(item.title))
        result = self.value(item.pattern, dtype)
        self.graph = Graph("g", tuple(self.inputs.values()), (result,), tuple(self.nodes))

    def value(self, part: Operand, dtype: DType) -> Value:
        if isinstance(part, Apply):
            types = [dtype] * len(part.operands)
            if part.operator == "Where":
                types[0] = BOOL
            values = [None if p is None else self.value(p, t) for p, t in zip(part.operands, types, strict=True)]
            name = self.names.fresh("v")
            type = self.inference.outputs(part.operator, values, part.attributes, {}, [name])[0]
            node = Node(part.operator, tuple(values), (Value(name, type),), part.attributes)
            self.nodes.append(node)
            return node.output
        if isinstance(part, Variable) and not part.is_constant:
            return self.inputs.setdefault(part.name, Value(part.name, TensorType(dtype, (2, 3))))
        if isinstance(part, Variable):
            if part.name not in self.constants:
                default = self.random.integers(1, 9, () if self.scalar_constants else (3,))
                self.constants[part.name] = self.constant(self.item.examples.get(part.name, default), dtype)
            return self.constants[part.name]
        return self.constant(part, dtype)

    def constant(self, number: object, dtype: DType) -> Value:
        node = constant_node(
            self.names.fresh("c"), array := np.array(number, dtype.numpy), TensorType(dtype, array.shape)
        )
        self.nodes.append(node)
        return node.output


def instances(item: Rule) -> Iterator[Instance]:
    """The pattern in all the types that it and ONNX allow."""
    for dtype in (F32, I32, I64, BOOL):
        for scalar_constants in (True, False):
            numbers = list(item.examples.values())
            if dtype != F32 and any(float(n) != int(n) for n in numbers):  # type: ignore[arg-type]
                continue
            try:
                instance = Instance(item, dtype, scalar_constants)
                onnx.checker.check_model(to_onnx(instance.graph), full_check=True)
                reference(instance.graph, random_inputs(instance.graph))
            except Exception:  # not every operator exists in every type
                continue
            yield instance


@pytest.mark.parametrize("item", RULES, ids=lambda item: item.title)
def test_rule(item: Rule) -> None:
    fired = 0
    for instance in instances(item):
        before = instance.graph
        after = apply_rules(before, [item])
        verify(after)
        fired += after is not before
        if after is not before:
            assert all(node.op != "Identity" or node.operands[0] in before.inputs for node in after.nodes)
        with np.errstate(all="ignore"):
            agree(before, after)
            agree(before, apply_rules(before, RULES))
    assert fired, "the rule never applies"


def test_titles_tell_rules_apart() -> None:
    spelt = [(item.title, item.pattern) for item in RULES]
    assert len({str(item) for item in spelt}) == len(spelt)


def test_repeated_variables_stand_for_one_value() -> None:
    item = rule("x + x => 2 * x", lambda x: x + x, lambda x: x * 2)
    graph = parsed(
        "graph @g(%a: f32[2], %b: f32[2]) -> (%y: f32[2]) {\n %c = Add(%a, %b) : f32[2]\n %y = Add(%c, %c) : f32[2]\n}"
    )
    after = apply_rules(graph, [item])
    assert [node.op for node in after.nodes] == ["Add", "Constant", "Mul"]


def test_replacements_keep_types() -> None:
    """Adding zeros of a larger shape is more than a no-op."""
    check(
        "rules",
        """
        graph @g(%x: f32[3]) -> (%y: f32[2, 3]) {
          %zeros = constant [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]] : f32[2, 3]
          %y = Add(%x, %zeros) : f32[2, 3]
        }
        // CHECK: %y = Add(%x, %zeros)
        """,
    )


def test_attributes_must_match() -> None:
    item = rule("elu(x) => x", lambda x: op.Elu(x, alpha=2.0), lambda x: x)
    text = "graph @g(%x: f32[2]) -> (%y: f32[2]) {{\n %y = Elu(%x) {{alpha = {}}} : f32[2]\n}}"
    assert apply_rules(parsed(text.format("2.0")), [item]).nodes[0].op == "Identity"
    assert apply_rules(parsed(text.format("1.0")), [item]).nodes[0].op == "Elu"


def test_clamps_of_a_hard_swish() -> None:
    check(
        "rules",
        """
        graph @g(%x: f32[4]) -> (%y: f32[4]) {
          %three = constant 3.0 : f32[]
          %zero = constant 0.0 : f32[]
          %six = constant 6.0 : f32[]
          %a = Add(%x, %three) : f32[4]     // from "add"
          %b = Max(%zero, %a) : f32[4]      // from "max"
          %c = Min(%b, %six) : f32[4]       // from "min"
          %d = Mul(%x, %c) : f32[4]
          %y = Div(%d, %six) : f32[4]
        }
        // CHECK: %a = Add(%x, %three)
        // CHECK: %c = Clip(%a, %{{.*}}, %{{.*}})
        // CHECK-SAME: "max"
        // CHECK: %y = Div(%d, %six)
        """,
    )


def test_scaling_of_attention_scores() -> None:
    check(
        "rules",
        """
        graph @g(%x: f32[2, 4]) -> (%y: f32[2, 4]) {
          %eight = constant 8.0 : f32[]
          %log2 = constant 1.4426950408889634 : f32[]
          %a = Div(%x, %eight) : f32[2, 4]
          %y = Mul(%a, %log2) : f32[2, 4]
        }
        // CHECK: graph @g
        // CHECK-NEXT: constant 0.18033688 : f32[]
        // CHECK-NEXT: %y = Mul(%x,
        """.replace("CHECK-NEXT: constant", "CHECK: constant"),
    )
