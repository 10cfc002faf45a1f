"""Bands: a pointwise convolution and the depthwise one after it, done by turns for some rows of the image at a time.

The first makes many channels, which the second reads once: of a whole image they would go through the caches that are
far from a core, or through memory, twice. In bands they stay in the nearest ones, in a memory of the rows of two turns
that is used round and round: each turn of the second does the rows for which the first has made all that they read.
(Inverted residuals: Sandler et al., "MobileNetV2", 2018, section 5, which keeps them small by groups of channels.)

Both are lowered for a band (the first as a convolution of a lower image, the second with the rows as sizes of its
kernel) and called in a loop of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from ..ir.dims import Dim, dim_max, dim_min, floordiv, product, substitute, symbol
from ..ir.graph import Attribute, Graph, Node, TensorType, Value
from ..ir.ops import REGISTRY
from ..ir.ops.declare import CHANNELS_LAST
from ..ir.ops.windows import Windows, sliding
from ..ir.program import Place, Repeat, Run, Step
from .regions import Call

if TYPE_CHECKING:
    from .lower import Lowering

BAND, RING = "band", "band_ring"
"""Attributes of a region's anchor: the names of two sizes of the kernel, the first row of the output to do and how
many; and of how many rows the image's memory is, row y being where y modulo that is. Only the sizes of the kernel show
whether a schedule knows the attributes."""
FIRST, ROWS = "band_first", "band_rows"
# Bytes a cycle from the caches behind the second level, and from the second.
FAR, NEAR = 8, 24
# Cycles of a call, by one thread and by several, which wait for each other.
CALL, MEETING = 300, 10000
# What the memory between the two may take of the second-level cache, and in how many turns it is filled.
SHARE = 3 / 8
FILLED = 2


@dataclass(frozen=True)
class Band:
    """What a schedule is told: the names of the sizes, and of how many rows the image's memory is."""

    first: str
    rows: str
    ring: int


def band_of(anchor: Node | None) -> Band | None:
    """The band that an anchor's attributes ask for."""
    names, ring = (None, None) if anchor is None else (anchor.attributes.get(BAND), anchor.attributes.get(RING))
    if not isinstance(names, tuple) or not isinstance(ring, int):
        return None
    return Band(str(names[0]), str(names[1]), ring)


class Pair:
    """Two nodes that may run in bands: the sizes that decide, and how many rows of the first a turn makes."""

    def __init__(self, first: Node, second: Node, windows: Windows) -> None:
        self.first, self.second, self.windows = first, second, windows
        height, width, channels = (int(str(d)) for d in first.output.shape[1:])
        self.images, self.height = first.output.shape[0], height
        self.line = width * channels * first.output.dtype.bytes
        self.rows = height

    @property
    def turns(self) -> int:
        """Of one image."""
        return self.height // self.rows

    @property
    def ring(self) -> int:
        """Elements of the memory between the two."""
        return FILLED * self.rows * self.line // self.first.output.dtype.bytes

    def divide(self, l2_bytes: int, threads: int) -> bool:
        """Chooses the rows; False where whole images are as good."""
        most = int(l2_bytes * SHARE * threads) // (FILLED * self.line)
        reach = (int(str(self.windows.kernel[0])) - 1) * self.windows.dilations[0]
        least = max(1, reach)  # so many rows are read of those that the turn before has made
        fitting = [rows for rows in range(least, most + 1) if self.height % rows == 0]
        if not fitting or self.height * self.line <= l2_bytes * threads * 3 / 4:
            return False
        self.rows = fitting[-1]
        saved = self.height * self.line * (1 / FAR - 1 / NEAR) / threads
        return saved > 2 * self.turns * (CALL if threads == 1 else MEETING)

    def until(self, turn: Dim) -> Dim:
        """The rows of the second that can be done after so many turns of the first; all of them after the last."""
        windows = self.windows
        reach = (windows.kernel[0] - 1) * windows.dilations[0]
        ready = floordiv(turn * self.rows - 1 + windows.before[0] - reach, windows.strides[0]) + 1
        output = windows.output[0]
        # None before the first turn, though rows above the image may need nothing of it.
        return dim_max(0, dim_min(output, dim_min(turn * output, ready + floordiv(turn, self.turns) * output)))


def find_pair(graph: Graph, position: int, l2_bytes: int, threads: int) -> Pair | None:
    """The node at a position and the next one as a pair that is better done in bands; None for others."""
    first = graph.nodes[position]
    expand = _anchor(first) if first.op == "Fused" else None
    second = expand and next((node for node in islice(graph.nodes, position + 1, None) if node.op != "Constant"), None)
    if expand is None or second is None:
        return None
    depthwise = _anchor(second)
    if depthwise is None or depthwise.inputs[0] != first.output:
        return None
    weights, attributes = depthwise.inputs[1], depthwise.attributes
    assert weights is not None
    channels = first.output.shape[-1]
    if weights.shape[:2] != (channels, 1) or attributes.get("group") != channels or not _pointwise(expand):
        return None
    readers = [node for node in second.regions["body"].nodes if first.output in node.operands]
    if readers != [depthwise] or graph.users.get(first.output) != (second,) or first.output in graph.outputs:
        return None
    names = ("strides", "dilations", "pads", "auto_pad")
    options = {name: attributes[name] for name in names if attributes.get(name) is not None}
    windows = sliding(first.output.shape[1:-1], weights.shape[2:], **options)  # type: ignore[arg-type]
    pair = Pair(first, second, windows)
    return pair if pair.divide(l2_bytes, threads) else None


def _anchor(node: Node) -> Node | None:
    """The convolution over images of known size with which a fused node begins, all after it elementwise."""
    if (
        node.op != "Fused"
        or len(node.outputs) != 1
        or any(not isinstance(v.type, TensorType) for v in (*node.operands, *node.outputs))
    ):
        return None
    anchor, *rest = (inner for inner in node.regions["body"].nodes if inner.op != "Constant")
    shape = node.output.shape
    if anchor.op != "Conv" or anchor.attributes.get("layout") != CHANNELS_LAST or len(shape) != 4:
        return None
    image = anchor.inputs[0]
    if image is None or not all(isinstance(d, int) for d in (*shape[1:], *image.shape[1:])) or 0 in shape:
        return None
    alike = all(REGISTRY[inner.op].pointwise and inner.output.shape == shape for inner in rest)
    return anchor if alike and anchor.output.shape == shape else None


def _pointwise(anchor: Node) -> bool:
    """Whether each pixel of a convolution is made of the same pixel of its image."""
    weights, attributes = anchor.inputs[1], anchor.attributes
    ones = all(set(attributes.get(name) or (1,)) == {1} for name in ("strides", "dilations"))  # type: ignore[arg-type]
    plain = not any(attributes.get("pads") or ()) and attributes.get("auto_pad") in (None, "", "NOTSET", "VALID")  # type: ignore[arg-type]
    return weights is not None and weights.shape[2:] == (1, 1) and attributes.get("group", 1) == 1 and ones and plain


def lower_pair(
    lowering: Lowering, graph: Graph, position: int, claimed: Mapping[str, Place]
) -> tuple[Node, Sequence[Step]] | None:
    """Where the node at a position and the one after it are done in bands: that one, and the steps of both."""
    target = lowering.target
    pair = find_pair(graph, position, target.l2_bytes, target.threads) if target.kind == "cpu" else None
    if pair is None:
        return None
    results = [node.output for node in (pair.first, pair.second)]
    for value, size in zip(results, (pair.ring, product(results[1].shape)), strict=True):
        place = claimed.get(value.name) or lowering.arena(value.name, value.dtype, size)
        lowering.places[value.name] = place
    steps = in_bands(lowering, pair)
    if steps is not None:
        return pair.second, steps
    for value in results:
        place = lowering.places.pop(value.name)
        if value.name not in claimed:
            del lowering.memories[place.memory]
    return None


def in_bands(lowering: Lowering, pair: Pair) -> Sequence[Step] | None:
    """The steps of a pair whose results have places; None where a schedule does not know bands."""
    index = lowering.fresh_symbol(BAND)
    step = symbol(index, 0, pair.images * pair.turns - 1)
    turn, image = step % pair.turns, step // pair.turns
    expanded = _Part(lowering, pair.first, pair.rows, lambda line: step * pair.rows * line)
    depthwise = _Part(lowering, pair.second, None, lambda line: image * int(str(pair.windows.output[0])) * line)
    between = lowering.places[pair.first.output.name]
    expanded.places[pair.first.output.name] = _moved(between, turn % FILLED * (pair.ring // FILLED))
    depthwise.places[pair.first.output.name] = between
    sizes = {FIRST: pair.until(turn), ROWS: pair.until(turn + 1) - pair.until(turn)}
    second = depthwise.steps(sizes, {BAND: (FIRST, ROWS), RING: FILLED * pair.rows})
    first = second and expanded.steps({}, {})
    return [Repeat(index, pair.images * pair.turns, None, (*first, *second))] if first and second else None


def _moved(place: Place, by: Dim) -> Place:
    return Place(place.memory, place.offset + by)


class _Part:
    """A node of a pair for one turn: for `rows` of one image (None: all of them, the kernel being told which).

    `places` are those of what it reads and makes, moved by `start` of the elements of a row.
    """

    def __init__(self, lowering: Lowering, node: Node, rows: int | None, start: Callable[[Dim], Dim]) -> None:
        self.lowering, self.node = lowering, node
        self.places: dict[str, Place] = {}
        self.types: dict[str, TensorType] = {}
        self.known = True
        anchor = _anchor(node)
        assert anchor is not None and anchor.inputs[0] is not None
        image = anchor.inputs[0]
        values = [v for inner in node.regions["body"].nodes for v in (*inner.operands, *inner.outputs)]
        for value in dict.fromkeys((*values, *node.outputs)):
            own = value.shape
            if value.name in lowering.arrays:
                self.known &= value in anchor.operands or len(own) < 3 or own[-3] == 1
            elif len(own) == 4 and own[:3] == (image if value == image else node.output).shape[:3]:
                lines = own[1] if rows is None else rows
                self.types[value.name] = TensorType(value.dtype, (1, lines, *own[2:]))
                if value.name in lowering.places:
                    self.places[value.name] = _moved(lowering.places[value.name], start(own[2] * own[3]))
            else:
                self.known &= all(d == 1 for d in own[:-1])

    def steps(self, sizes: Mapping[str, Dim], attributes: Mapping[str, Attribute]) -> tuple[Run, ...] | None:
        """The call for a turn by a kernel that takes exactly these sizes, its anchor having the attributes; None where
        the schedule's is another."""
        lowering = self.lowering
        if not self.known:
            return None
        before = dict(lowering.places)
        lowering.places.update(self.places)
        try:
            region = lowering._region_of(self._node())
            anchor = region.anchor
            assert anchor is not None
            region = replace(region, anchor=replace(anchor, attributes={**anchor.attributes, **attributes}))
            lowered = lowering.schedule(region, lowering.target)
            if lowered is None or lowered.workspaces or len(lowered.calls) != 1:
                return None
            (call,) = lowered.calls
            if not isinstance(call, Call) or {str(size) for size in call.sizes} != set(sizes):
                return None
            (run,) = lowering.emit(region, [lowering.places[self.node.output.name]])
            assert isinstance(run, Run)
            return (replace(run, sizes=tuple(substitute(size, sizes) for size in run.sizes)),)
        finally:
            made = {name: place for name, place in lowering.places.items() if name not in before}
            lowering.places = {**before, **made}

    def _node(self) -> Node:
        """The node over the values of one turn."""

        def value(old: Value) -> Value:
            return Value(old.name, self.types.get(old.name, old.type))

        def changed(node: Node) -> Node:
            operands = tuple(None if v is None else value(v) for v in node.inputs)
            return replace(node, inputs=operands, outputs=tuple(map(value, node.outputs)))

        body = self.node.regions["body"]
        outputs = tuple(map(value, body.outputs))
        inner = replace(
            body, inputs=tuple(map(value, body.inputs)), outputs=outputs, nodes=tuple(map(changed, body.nodes))
        )
        return replace(changed(self.node), regions={"body": inner})
