"""Which values of a quantised model stand for which of the float model that it was made of.

Quantizers keep the names of most values; where they do not (operators on integers, folded normalisations), nodes are
found again by what they read: the same operator on values that are known already, with weights that are nearly the
same. A quantizer may drop what it has folded: a normalisation goes into the weights before it, a Relu or Clip into the
range of the type, so that the value after quantization stands for more than the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from onnx import NodeProto

from ...ir.errors import OnnxcError
from .evaluate import by_reference
from .subject import Subject

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
FOLDED = frozenset(("BatchNormalization", "Identity", "Dropout", "Add", "Sub", "Mul", "Div"))
"""Operators that a quantizer folds into weights before them, arithmetic with constants."""
CLIPPED = frozenset(("Relu", "Clip"))
"""Operators that the end of a quantised range may stand for."""
ALIKE: Mapping[str, str] = {
    "MatMulNBits": "MatMul", "DynamicQuantizeMatMul": "MatMul", "DynamicQuantizeLSTM": "LSTM",
    "MatMulInteger": "MatMul", "ConvInteger": "Conv", "GatherBlockQuantized": "Gather", "QAttention": "Attention",
    "QEmbedLayerNormalization": "EmbedLayerNormalization",
}  # fmt: skip
"""Operators on quantised tensors by those on floats."""


@dataclass(frozen=True)
class Side:
    """One of the two models, and what is read where."""

    subject: Subject

    @cached_property
    def readers(self) -> dict[str, list[NodeProto]]:
        found: dict[str, list[NodeProto]] = {}
        for node, reads in zip(self.subject.nodes, self.subject.reads, strict=True):
            for name in reads:
                found.setdefault(name, []).append(node)
        return found

    def producer(self, name: str) -> NodeProto | None:
        position = self.subject.definer.get(name)
        return None if position is None else self.subject.nodes[position]

    def is_known(self, name: str) -> bool:
        """Whether this is a constant, or computed of nothing but constants."""
        if name in self.subject.constants:
            return True
        position = self.subject.definer.get(name)
        return position is not None and self._known[position]

    @cached_property
    def _known(self) -> list[bool]:
        """Of each node whether all that it reads is known."""
        known = set(self.subject.constants)
        found = []
        for node, reads in zip(self.subject.nodes, self.subject.reads, strict=True):
            found.append(bool(reads) and known.issuperset(reads))
            known.update(name for name in node.output if found[-1])
        return found

    def constant(self, name: str) -> Any:
        """The elements of a constant, of one that is quantised as floats; None for what is none."""
        node = self.producer(name)
        if node is not None and node.op_type == DEQUANTIZE and self.is_known(node.input[0]):
            reads = [n for n in node.input if n]
            if not all(n in self.subject.constants for n in reads):
                return None
            model = self.subject.model([node], {}, [node.output[0]])
            try:
                return by_reference(model, {})[0]
            except Exception:  # the reference raises what it likes for types it does not know
                return None
        return self.subject.constants.get(name)

    def operators_after(self, name: str) -> set[str]:
        """The operators that read a value, also through quantization."""
        found: set[str] = set()
        waiting, seen = [name], {name}
        while waiting:
            for node in self.readers.get(waiting.pop(), ()):
                if node.op_type in (QUANTIZE, DEQUANTIZE):
                    waiting += [output for output in node.output if output not in seen]
                    seen.update(node.output)
                else:
                    found.add(node.op_type)
        return found


@dataclass
class Pairing:
    """Values of the quantised model by those of the float model: `stands` for floats as they are computed or
    dequantised again, `whole` for quantised ones; `nodes` of it by those of the float model. `added` are nodes that the
    float model needs to have a counterpart for values that only differ by constant `factors`.

    Raises OnnxcError where not one input is the same.
    """

    quantised: Side
    plain: Side
    stands: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    added: list[NodeProto] = field(default_factory=list)
    factors: dict[str, Any] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        left, right = self.quantised.subject.inputs, self.plain.subject.inputs
        same = [(name, name) for name in left if name in right]
        if not same and len(left) == len(right):
            same = list(zip(left, right, strict=True))
        if not same:
            raise OnnxcError(f"the baseline has other inputs ({', '.join(right)}) than the model ({', '.join(left)})")
        self.stands.update(same)
        for node in self.quantised.subject.nodes:
            self._node(node)

    def _node(self, node: NodeProto) -> None:
        if node.op_type == QUANTIZE:
            source = self.stands.get(node.input[0])
            if source is not None:
                self.whole[node.output[0]] = self._after(node.input[0], source)
        elif node.op_type == DEQUANTIZE:
            source = self.whole.get(node.input[0])
            if source is not None:
                self.stands[node.output[0]] = source
        else:
            found = self._named(node) or self._alike(node) or self._scaled(node)
            if found is not None:
                self._used.add(found)

    def unknown(self) -> list[str]:
        """The nodes of the quantised model that are no part of what computes a value with a counterpart."""
        nodes, definer = self.quantised.subject.nodes, self.quantised.subject.definer
        waiting = [definer[name] for name in self.stands if name in definer]
        seen = set(waiting)
        while waiting:
            for name in self.quantised.subject.reads[waiting.pop()]:
                position = definer.get(name)
                if position is not None and position not in seen:
                    seen.add(position)
                    waiting.append(position)
        return [node.name for position, node in enumerate(nodes) if position not in seen]

    def _of(self, name: str) -> str | None:
        """What a value of the quantised model stands for, quantised or not."""
        return self.stands.get(name) or self.whole.get(name)

    def _put(self, node: NodeProto, outputs: Sequence[str], other: str) -> str:
        """Notes that outputs of a node are these values."""
        integer = node.input and node.input[0] in self.whole
        for name, value in zip(node.output, outputs, strict=False):
            if name and value:
                (self.whole if integer else self.stands)[name] = value
        self.nodes[node.name] = other
        return other

    def _named(self, node: NodeProto) -> str | None:
        """The node of the float model that defines a value of the same name; the node before it where that is a Relu
        and this is what was folded with it."""
        other = self.plain.producer(node.output[0])
        if other is None:
            return None
        kind = _kind(node)
        if other.op_type != kind and other.op_type in CLIPPED:
            before = self.plain.producer(other.input[0])
            if before is not None and before.op_type in (kind, *FOLDED):
                return self._put(node, [other.input[0]], before.name)
        if other.op_type != kind and node.output[0].isdigit() and self._sources(node) != self._reads(other):
            return None  # values that were only counted, each model in its own way
        after = self.quantised.operators_after(node.output[0])
        defined = [name if name in self.plain.subject.definer else "" for name in node.output]
        return self._put(node, [self._past(name, FOLDED, after) if name else "" for name in defined], other.name)

    def _reads(self, other: NodeProto) -> set[str]:
        """The values that a node of the float model reads, but for constants."""
        return {name for name in other.input if name and not self.plain.is_known(name)}

    def _sources(self, node: NodeProto) -> set[str]:
        """The values of the float model that a node of the quantised one is computed of."""
        found: set[str] = set()
        waiting, seen = [*node.input], set(node.input)
        while waiting:
            name = waiting.pop()
            source = self._of(name)
            before = self.quantised.producer(name)
            if source is not None:
                found.add(source)
            elif before is not None:
                waiting += [read for read in before.input if read not in seen]
                seen.update(before.input)
        return found

    def _alike(self, node: NodeProto) -> str | None:
        """The node that does the same with the same values."""
        best: tuple[float, NodeProto] | None = None
        for other in self._candidates(node):
            error = self._error(node, other)
            if np.isfinite(error) and (best is None or error < best[0]):
                best = error, other
        if best is None:
            return None
        other = best[1]
        after = self.quantised.operators_after(node.output[0])
        outputs = [self._past(name, FOLDED, after) if name else "" for name in other.output]
        return self._put(node, outputs, other.name)

    def _scaled(self, node: NodeProto) -> str | None:
        """A product with constants that the quantizer put before a scale, to make channels alike (Xiao et al. 2023,
        "SmoothQuant"): the float model gets the same one."""
        if node.op_type not in ("Mul", "Div") or len(node.input) != 2 or node.output[0] in self.plain.subject.definer:
            return None
        reads = [self.stands.get(name) for name in node.input]
        place = 0 if reads[0] else 1
        factor = node.input[1 - place]
        array = self.quantised.subject.constants.get(factor)
        if reads[place] is None or array is None or not np.issubdtype(np.asarray(array).dtype, np.floating):
            return None
        made = NodeProto()
        made.CopyFrom(node)
        made.input[place] = reads[place]
        made.input[1 - place] = f"{node.output[0]}.factor"
        self.factors[f"{node.output[0]}.factor"] = array
        self.added.append(made)
        return self._put(node, [node.output[0]], node.name)

    def _candidates(self, node: NodeProto) -> Iterator[NodeProto]:
        seen: set[str] = set()
        for name in node.input:
            source = self._of(name)
            for other in self.plain.readers.get(source, ()) if source else ():
                fits = other.op_type == _kind(node) and other.name not in self._used
                if fits and other.name not in seen and self._reads_the_same(node, other):
                    seen.add(other.name)
                    yield other

    def _reads_the_same(self, node: NodeProto, other: NodeProto) -> bool:
        """Whether all values that are known to stand for another are read by the other node too."""
        theirs = list(other.input)
        for name in node.input:
            source = self._of(name)
            if source is not None:
                if source not in theirs:
                    return False
                theirs.remove(source)
        return True

    def _error(self, node: NodeProto, other: NodeProto) -> float:
        """How far the weights of two nodes are apart, relative to their size; 0 where none can be compared, infinite
        where they have other shapes."""
        errors = [0.0]
        for mine, theirs in zip(node.input, other.input, strict=False):
            if not (mine and theirs and self.quantised.is_known(mine) and self.plain.is_known(theirs)):
                continue
            a, b = self.quantised.constant(mine), self.plain.constant(theirs)
            if a is None or b is None or not np.issubdtype(np.asarray(b).dtype, np.floating):
                continue
            if np.shape(a) != np.shape(b):
                return np.inf
            size = float(np.linalg.norm(np.asarray(b, np.float64)))
            if not FOLDED.intersection(self.plain.operators_after(other.output[0])):
                gap = float(np.linalg.norm(np.subtract(a, b, dtype=np.float64)))
                errors.append(gap / size if size else gap)
        return max(errors)

    def _after(self, name: str, source: str) -> str:
        """What a value stands for once it is quantised: the range of the type may clip it as an operator did."""
        return self._past(source, CLIPPED, self.quantised.operators_after(name))

    def _past(self, source: str, operators: frozenset[str], after: set[str]) -> str:
        """The value behind operators that the quantised model has no more."""
        while True:
            readers = self.plain.readers.get(source, [])
            if len(readers) != 1 or readers[0].op_type not in operators or readers[0].op_type in after:
                return source
            others = [name for name in readers[0].input if name and name != source]
            if source in self.plain.subject.outputs or not all(self.plain.is_known(name) for name in others):
                return source
            source = readers[0].output[0]


def _kind(node: NodeProto) -> str:
    return ALIKE.get(node.op_type, node.op_type)
