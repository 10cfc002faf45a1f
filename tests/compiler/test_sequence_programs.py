"""Random programs on sequences against ONNX's reference, and against ONNX Runtime where both can run them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxc
import onnxruntime
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxc.compiler.host.executable import HostExecutable
from onnxc.compiler.interface import Interface

FLOAT, TEXT = onnx.TensorProto.FLOAT, onnx.TensorProto.STRING


@dataclass
class Program:
    """Nodes as they come, with the length of each sequence.

    The ranks of elements differ where `mixed`; a `whole` program has nothing that only the run can tell.
    """

    draw: Any
    dtype: int
    mixed: bool
    whole: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    declared: list[onnx.ValueInfoProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    sequences: dict[str, int] = field(default_factory=dict)
    tensors: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)
    count: Any = field(default_factory=itertools.count)

    def name(self) -> str:
        return f"v{next(self.count)}"

    def array(self) -> np.ndarray:
        shape = (2, 3) if not self.mixed else self.draw(st.sampled_from([(), (2,), (3, 1), (0, 2), (1, 2, 2)]))
        number = next(self.count)
        if self.dtype == TEXT:
            return np.array([f"t{number}.{i}" for i in range(int(np.prod(shape)))], object).reshape(shape)
        return np.full(shape, number, np.float32) + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    def given(self, name: str, value: Any, type: onnx.TypeProto) -> str:
        self.inputs[name] = value
        self.declared.append(onnx.ValueInfoProto(name=name, type=type))
        return name

    def tensor(self) -> str:
        """A tensor that is there, or a new input or constant."""
        if self.tensors and self.draw(st.booleans()):
            return str(self.draw(st.sampled_from(self.tensors)))
        name, array = self.name(), self.array()
        if self.draw(st.booleans()):
            self.constants.append(numpy_helper.from_array(array, name))
        else:
            self.given(name, array, helper.make_tensor_type_proto(self.dtype, array.shape))
        self.tensors.append(name)
        return name

    def position(self, least: int, most: int) -> str:
        """A position, known while the model is read or only by the run."""
        name, value = self.name(), np.array(self.draw(st.integers(least, most)))
        if self.whole or self.draw(st.booleans()):
            self.constants.append(numpy_helper.from_array(value, name))
            return name
        return self.given(name, value, helper.make_tensor_type_proto(onnx.TensorProto.INT64, []))

    def sequence(self) -> str:
        """A sequence that is there, with some elements."""
        return str(self.draw(st.sampled_from([name for name, length in self.sequences.items() if length])))

    def add(self, op: str, *inputs: str, length: int | None = None, **attributes: Any) -> str:
        name = self.name()
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        if length is not None:
            self.sequences[name] = length
        return name

    def step(self) -> None:
        kind = self.draw(
            st.sampled_from(["construct", "insert", "erase", "at", "length", "join", "map", "given", "same"])
        )
        if not any(self.sequences.values()) or kind == "construct":
            items = [self.tensor() for _ in range(self.draw(st.integers(1, 4)))]
            self.add("SequenceConstruct", *items, length=len(items))
        elif kind == "given" and not self.whole:
            items = [self.array() for _ in range(self.draw(st.integers(0, 3)))]
            name = self.name()
            element = helper.make_tensor_type_proto(self.dtype, None)
            self.given(name, items, helper.make_sequence_type_proto(element))
            self.sequences[name] = len(items)
        elif kind == "insert":
            sequence = self.sequence()
            count = self.sequences[sequence]
            # The reference puts what is inserted at the position `count` to the front.
            place = [] if self.draw(st.booleans()) else [self.position(-count, count - 1)]
            self.add("SequenceInsert", sequence, self.tensor(), *place, length=count + 1)
        elif kind == "erase":
            sequence = self.sequence()
            count = self.sequences[sequence]
            place = [] if self.draw(st.booleans()) else [self.position(-count, count - 1)]
            self.add("SequenceErase", sequence, *place, length=count - 1)
        elif kind == "at":
            sequence = self.sequence()
            count = self.sequences[sequence]
            self.tensors.append(self.add("SequenceAt", sequence, self.position(-count, count - 1)))
        elif kind == "length":
            self.numbers.append(self.add("SequenceLength", self.sequence()))
        elif kind == "join" and not self.mixed:
            rows = self.add("ConcatFromSequence", self.sequence(), axis=self.draw(st.sampled_from([0, 1])), new_axis=1)
            split = self.add("SplitToSequence", rows, axis=2, keepdims=0, length=3)
            self.tensors.append(self.add("ConcatFromSequence", split, axis=0))
            self.mixed = True  # from here on elements differ
        elif kind == "map":
            sequence = self.sequence()
            body = helper.make_graph(
                [helper.make_node("Identity" if self.dtype == TEXT else "Neg", ["element"], ["made"])],
                "body",
                [helper.make_tensor_value_info("element", self.dtype, None)],
                [helper.make_tensor_value_info("made", self.dtype, None)],
            )
            self.add("SequenceMap", sequence, body=body, length=self.sequences[sequence])
        elif kind == "same":
            sequence = self.sequence()
            self.add("Identity", sequence, length=self.sequences[sequence])

    def model(self) -> onnx.ModelProto:
        """The program, with all that it computes as outputs but for what is given."""
        made = {name for node in self.nodes for name in node.output}
        outputs = []
        shown = {*self.tensors, *self.numbers} | (set() if self.whole else set(self.sequences))
        for name in made & shown:
            dtype = onnx.TensorProto.INT64 if name in self.numbers else self.dtype
            type = helper.make_tensor_type_proto(dtype, None)
            if name in self.sequences:
                type = helper.make_sequence_type_proto(type)
            outputs.append(onnx.ValueInfoProto(name=name, type=type))
        outputs.sort(key=lambda value: value.name)
        graph = helper.make_graph(self.nodes, "program", self.declared, outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert isinstance(found, list)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        np.testing.assert_array_equal(found, np.asarray(expected), strict=np.asarray(expected).dtype.kind not in "OSU")


@settings(max_examples=60)
@given(st.data(), st.sampled_from([FLOAT, TEXT]), st.booleans(), st.booleans(), st.integers(2, 9))
def test_programs(data: st.DataObject, dtype: int, mixed: bool, whole: bool, steps: int) -> None:
    program = Program(data.draw, FLOAT if whole else dtype, mixed, whole)
    for _ in range(steps):
        program.step()
    model = program.model()
    if not model.graph.output:
        return
    executable = onnxc.compile(model)
    assert isinstance(executable, Interface if whole else HostExecutable | Interface)
    found = executable.run(program.inputs)
    expected = ReferenceEvaluator(model).run(None, program.inputs)
    for value, wanted in zip(model.graph.output, expected, strict=True):
        assert_same(found[value.name], wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        second = session.run(None, program.inputs)
    except Exception:  # sequences of text by position, outputs that are inputs: it refuses much of this
        return
    for value, wanted in zip(model.graph.output, second, strict=True):
        assert_same(found[value.name], wanted)
