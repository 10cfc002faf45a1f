"""Where a model holds 8-bit integers: the nodes that compute with them, and the values that are stored so.

Integers are where an engine gains by them: operands of convolutions and matrix products, what convolutions write, and
whatever only moves such values. What lies between (activations, normalisation, sums) computes in float between
DequantizeLinear and QuantizeLinear, and is fused into the product before it by engines that can. So the result of a
convolution is not rounded twice, before its activation and behind it, unless saturation is all the activation there is:
on YOLOv8n that is worth 10 dB, on YOLOX and an OCR model 4.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from onnx import NodeProto, TensorProto

from ...compiler.nodes import names_read
from .graph import GraphDraft
from .model import attribute
from .ranges import Grid, range_of, signal_to_noise
from .settings import Settings, Summary
from .statistics import Statistics, merged

ANCHORS = ("Conv", "MatMul", "Gemm")
"""Operators that have integer forms."""
WITHOUT: Mapping[str, str] = {
    "ConvTranspose": "as a convolution it would be too much work, or is none of two axes with known weights",
    "LSTM": "its ranges are only known at run time: --dynamic",
    "GRU": "there is no integer form of it: --weights-only int8",
    "RNN": "there is no integer form of it: --weights-only int8",
}
"""Operators with much work that stay in float, and why."""
CLAMPS = ("Relu", "Clip")
"""What the saturation of a quantised value can do in passing."""
MOVERS: Mapping[str, int | None] = {
    "Reshape": 1, "Flatten": 1, "Transpose": 1, "Squeeze": 1, "Unsqueeze": 1, "Identity": 1, "Slice": 1, "Split": 1,
    "Expand": 1, "Tile": 1, "Gather": 1, "DepthToSpace": 1, "SpaceToDepth": 1, "MaxPool": 1, "GlobalMaxPool": 1,
    "ReduceMax": 1, "Concat": None,
}  # fmt: skip
"""Operators whose results are elements of their first operands (of all for None): these share scale and zero point."""
ALIKE = 4.0
"""How much wider than that of one operand the common range of a Concat may be: two bits of it are lost then."""
LINEAR = ("Add", "Sub", "Mul", "AveragePool", "GlobalAveragePool", "ReduceMean")
"""Operators that read the result of a convolution as well in 8 bits, if none of their operands is a constant."""
PREPARING = ("Mul", "Add", "Sub", "Div", "Pad", "Cast")
"""What models do to their inputs at first."""
LEAST_INPUT = 36.0
"""Decibels between an input and its rounding to 8 bits, below which the first layer stays in float: images and Gaussian
noise have 38 and more, while speech (34) has quiet passages that 8 bits do not hold."""


@dataclass
class Places:
    """What is to be quantised, by names: nodes that compute with integers, and the values that are stored as such.

    `groups` gives for each value the one whose grid it has, `sources` the values whose elements decide that grid.
    """

    anchors: dict[str, NodeProto] = field(default_factory=dict)
    values: list[str] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    channels: dict[str, int | None] = field(default_factory=dict)


def data_of(node: NodeProto) -> list[str]:
    """The operands of a mover whose elements it moves."""
    return list(node.input[: MOVERS[node.op_type]])


def is_mover(node: NodeProto) -> bool:
    """Whether every element of the results is one of the operands'."""
    one_result = node.op_type == "Split" or not any(node.output[1:])
    return not node.domain and node.op_type in MOVERS and one_result


def refusal(node: NodeProto, draft: GraphDraft, types: Mapping[str, int]) -> str | None:
    """Why a node of an operator that has an integer form cannot have it; None where it can."""
    data, weight = node.input[0], node.input[1]
    if data in draft.constants:
        return "its left operand is a constant"
    known = draft.constants[weight].data_type if weight in draft.constants else types.get(weight)
    if known != TensorProto.FLOAT:
        name = TensorProto.DataType.Name(known) if known else "not known"
        return f"its operands are {name}, not FLOAT"
    if node.op_type != "MatMul" and weight not in draft.constants:
        return "its weights are computed"
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0):
            return "its left operand is transposed"
        if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
            return "alpha or beta is not 1"
    if node.op_type == "MatMul" and weight in draft.constants and len(draft.shape(weight)) < 2:
        return "its weights are a vector"
    return None


def anchors_of(
    draft: GraphDraft, settings: Settings, summary: Summary, refused: Mapping[str, str]
) -> dict[str, NodeProto]:
    """The nodes that are to compute with integers, by name; those that are not go into the summary."""
    types = draft.types()
    found = {}
    for node in draft.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in (*ANCHORS, *WITHOUT):
            continue
        if node.op_type == "LSTM" and settings.dynamic:
            continue
        reason = "it is to be kept" if settings.kept(node) else WITHOUT.get(node.op_type)
        reason = reason or refused.get(node.name) or refusal(node, draft, types)
        if reason is None:
            found[node.name] = node
        else:
            summary.leave(node, reason)
    return found


def find_places(
    draft: GraphDraft, settings: Settings, summary: Summary, refused: Mapping[str, str] | None = None
) -> Places:
    """The nodes to quantise, but for those that are `refused` (reasons by name), and the values between them."""
    places = Places(anchors_of(draft, settings, summary, refused or {}))
    readers, fixed = draft.readers(), draft.fixed()
    nodes = list(draft.graph.node)
    anchors = places.anchors
    ahead = _reaching(nodes, anchors)
    stored: set[str] = set()
    for node in nodes:
        if node.name in anchors:
            stored.update(name for name in node.input[:2] if name not in draft.constants)
            places.channels[node.input[0]] = 1 if node.op_type == "Conv" else -1
            result = behind_clamp(node, readers, fixed)
            written = node.op_type == "Conv" and node.output[0] in ahead
            if written and (settings.integer_outputs or _read_as_it_is(result, draft, readers, anchors)):
                stored.add(result)
    for node in reversed(nodes):  # towards the producers
        if not is_mover(node) or settings.kept(node) or not stored.intersection(node.output):
            continue
        operands = [name for name in data_of(node) if name not in draft.constants]
        if len(operands) == len(data_of(node)) and all(
            _all_stored(name, readers, fixed, anchors, stored) for name in operands
        ):
            stored.update(operands)
    for node in nodes:  # towards the consumers
        moved = is_mover(node) and not settings.kept(node) and all(name in stored for name in data_of(node))
        if moved and ahead.intersection(node.output) and not fixed.intersection(node.output):
            stored.update(filter(None, node.output))
    order = draft.given() + [name for node in nodes for name in node.output]
    places.values = [name for name in dict.fromkeys(order) if name in stored]
    places.channels = {name: places.channels.get(name) for name in places.values}
    return places


def of_integers(
    name: str, draft: GraphDraft, definers: Mapping[str, NodeProto], stored: Collection[str], places: Places
) -> bool:
    """Whether a stored value was computed of nothing but stored ones."""
    node = definers.get(name)
    if node is not None and node.op_type in CLAMPS and node.input[0] not in stored:
        node = definers.get(node.input[0])
    if node is None:
        return False
    computed = [operand for operand in node.input if operand and operand not in draft.constants]
    return node.name in places.anchors or all(operand in stored for operand in computed)


def behind_clamp(node: NodeProto, readers: Mapping[str, Sequence[NodeProto]], fixed: set[str]) -> str:
    """The node's result, behind the activation that its saturation may do."""
    result = node.output[0]
    following = readers.get(result, ())
    if len(following) == 1 and following[0].op_type in CLAMPS and result not in fixed:
        return str(following[0].output[0])
    return str(result)


def _read_as_it_is(
    name: str, draft: GraphDraft, readers: Mapping[str, Sequence[NodeProto]], anchors: Mapping[str, NodeProto]
) -> bool:
    """Whether all readers of a value, those behind movers too, take it as well in 8 bits."""
    for node in readers.get(name, ()):
        if is_mover(node) and name in data_of(node):
            if not all(_read_as_it_is(result, draft, readers, anchors) for result in node.output if result):
                return False
        elif node.name not in anchors and (
            node.op_type not in LINEAR or any(draft.is_float(operand) for operand in node.input)
        ):
            return False
    return True


def refused_by_data(
    draft: GraphDraft, places: Places, statistics: Mapping[str, Statistics], settings: Settings
) -> dict[str, str]:
    """The nodes that the data says are to stay in float, with the reason: those that it never reaches, and those that
    read an input of the model of which 8 bits hold too little, unless nothing would be left."""
    unseen = {node.name for node in places.anchors.values() if not statistics[node.input[0]].histogram.seen}
    coarse = {}
    for node in places.anchors.values():
        name = node.input[0]
        if node.name not in unseen and _is_input(name, draft):
            histogram = statistics[name].histogram
            decibels = signal_to_noise(histogram, range_of(histogram, settings))
            if decibels < LEAST_INPUT:
                coarse[node.name] = f"8 bits hold too little of the model's input ({decibels:.0f} dB)"
    found = dict.fromkeys(unseen, "no sample gets here")
    return found | (coarse if len(found) + len(coarse) < len(places.anchors) else {})


def _is_input(name: str, draft: GraphDraft) -> bool:
    """Whether a value is an input of the model, prepared perhaps."""
    definers = draft.definers()
    node = definers.get(name)
    while node is not None and (is_mover(node) or node.op_type in PREPARING):
        computed = [operand for operand in node.input if operand and operand not in draft.constants]
        if not computed:
            return False
        name, node = computed[0], definers.get(computed[0])
    if draft.outer is not None:
        return name in draft.captured() and _is_input(name, draft.outer)
    return name in draft.given()


def _reaching(nodes: Sequence[NodeProto], anchors: Mapping[str, NodeProto]) -> set[str]:
    """The values on which an operand of an anchor depends."""
    found: set[str] = set()
    for node in reversed(nodes):
        if node.name in anchors or found.intersection(node.output):
            found.update(names_read([node]))
    return found


def _all_stored(
    name: str,
    readers: Mapping[str, Sequence[NodeProto]],
    fixed: set[str],
    anchors: Mapping[str, NodeProto],
    stored: set[str],
) -> bool:
    """Whether nobody would read the value as a float if it were stored in integers."""
    return name not in fixed and all(
        node.name in anchors or (is_mover(node) and name in data_of(node) and bool(stored.intersection(node.output)))
        for node in readers.get(name, ())
    )


def grids_of(
    draft: GraphDraft, places: Places, statistics: Mapping[str, Statistics], settings: Settings
) -> dict[str, Grid]:
    """The grid of each stored value; `places.groups` tells which have the same."""
    stored = set(places.values)
    leader = {name: name for name in places.values}
    sources: dict[str, list[str]] = {name: [name] for name in places.values}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    def join(names: Iterable[str], result: str) -> None:
        heads = list(dict.fromkeys(map(find, names)))
        for head in heads[1:]:
            leader[head] = heads[0]
            sources[heads[0]] += sources.pop(head)
        own = find(result)
        if own != heads[0]:
            leader[own] = heads[0]
            sources.pop(own)

    for node in draft.graph.node:
        results = [name for name in node.output if name in stored]
        if not is_mover(node) or not results or not all(name in stored for name in data_of(node)):
            continue
        operands = data_of(node)
        spans = [_span(statistics[name]) for name in operands]
        if max(spans) <= ALIKE * min(spans):
            for result in results:
                join(operands, result)
    chosen = {
        head: range_of(merged([statistics[n] for n in names]).histogram, settings) for head, names in sources.items()
    }
    places.groups = {name: find(name) for name in places.values}
    return {name: chosen[head] for name, head in places.groups.items()}


def _span(statistics: Statistics) -> float:
    histogram = statistics.histogram
    return max(histogram.high, 0.0) - min(histogram.low, 0.0) if histogram.seen else 0.0


__all__ = ["ANCHORS", "CLAMPS", "MOVERS", "Places", "find_places", "grids_of", "refused_by_data"]
