"""Where a quantised model loses the accuracy of the float model that it was made of.

Of each tensor the signal-to-noise ratio is measured twice: alone (its own quantization, and that of the weights that
made it, everything before in floats) and accumulated (everything before quantised). Both models run node by node
(`stepwise`). The quantised one has three parts, whose values are compared with the float model's:

- `q:` the quantised model as it is,
- `a:` each of its nodes on the values of the float model: what the quantization of one tensor, or the weights of one
  layer, change by themselves,
- `l:` the quantization of a tensor after that: a layer's weights and its result together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto

from ...compiler.options import Options
from ...ir.dtypes import of_numpy
from ...ir.errors import ModelError, OnnxcError
from .measured import Extent, Grid, Power, Reference, channel_axis
from .operator_form import as_pairs
from .pairing import DEQUANTIZE, QUANTIZE, Pairing, Side
from .stepwise import Step, Stepwise
from .subject import subject_of

Array = NDArray[Any]
IMAGES = frozenset(("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "BatchNormalization",
                    "InstanceNormalization", "Resize", "ConvInteger"))  # fmt: skip
MATRICES = frozenset(("MatMul", "Gemm", "LayerNormalization", "LSTM", "GRU", "RNN", "Attention", "MatMulInteger",
                      "MatMulNBits", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention"))  # fmt: skip
OLDEST = 13
"""The opset from which on scales may differ by channel, and operators take axes as operands."""


@dataclass
class Layer:
    """What is known of one tensor and of the weights it is computed with.

    `value` is its name in the float model, `computed` and `quantised` those in the quantised model: before quantization
    ("" for inputs) and after ("" for what stays in floats). `nodes` are the quantised model's nodes that compute it, of
    which the first has the operator,
    `weights` the constants that they read quantised. `rounding` tells what quantising the tensor changes, `weighing`
    what its weights change, `alone` both, `accumulated` all.
    """

    value: str
    computed: str
    quantised: str
    before: str
    nodes: tuple[str, ...]
    operator: str
    weights: tuple[str, ...]
    shape: tuple[int, ...] = ()
    rounding: Power | None = None
    weighing: Power | None = None
    alone: Power = field(default_factory=Power)
    accumulated: Power = field(default_factory=Power)
    extent: Extent = field(default_factory=Extent)
    grid: Grid | None = None
    remark: str = ""


@dataclass(frozen=True)
class Sensitivities:
    """All layers, worst first; what of the quantised model has no counterpart in the float model; and the samples."""

    layers: tuple[Layer, ...]
    outputs: Mapping[str, Power]
    unknown: tuple[str, ...]
    samples: int


class Comparison:
    """A quantised model beside the float model that it was made of."""

    def __init__(self, quantised: Any, plain: Any, options: Options) -> None:
        self.options = options
        self.quantised = Side(as_pairs(subject_of(_recent(quantised, options), options.folder)))
        self.plain = Side(subject_of(plain))
        self.pairs = Pairing(self.quantised, self.plain)
        subject = self.plain.subject
        nodes, constants = (*subject.nodes, *self.pairs.added), {**subject.constants, **self.pairs.factors}
        self.plain = Side(replace(subject, nodes=nodes, constants=constants))
        self.stands: dict[str, str] = {}
        self.ranks: dict[str, int] = {}
        alone = replace(options, dims=None, shapes=None, folder=None)
        self.first, self.second = (Stepwise(side.subject, alone) for side in (self.plain, self.quantised))

    def plain_steps(self, wanted: Iterable[str]) -> list[Step]:
        """The nodes of the float model that these values hang on."""
        return [Step(node) for node in needed(self.plain.subject.nodes, wanted)]

    def plain_values(
        self, sample: Mapping[str, Array], steps: Sequence[Step], wanted: Collection[str]
    ) -> dict[str, Array]:
        """The float model's values, inputs too."""
        found = {name: np.asarray(array) for name, array in sample.items() if name in wanted}

        def seen(name: str, array: Any) -> None:
            if name in wanted:
                found[name] = array

        self.first.follow(steps, sample, seen)
        return found

    def run(
        self, samples: Iterable[Mapping[str, Array]], progress: Callable[[str], None] = lambda what: None
    ) -> Sensitivities:
        """Measures on these inputs (of the float model, by name). ModelError where there are none."""
        count, measurement = 0, None
        for sample in samples:
            count += 1
            progress(f"sample {count}")
            if measurement is None:
                layers = self.layers(sample)
                axes = {name: channel_axis(rank, self.is_image(name)) for name, rank in self.ranks.items()}
                measurement = _Measurement(self, layers, axes)
            measurement.run(sample)
        if measurement is None:
            raise ModelError("there are no samples")
        return self._found(measurement.layers, count)

    def _found(self, layers: Sequence[Layer], count: int) -> Sensitivities:
        from .causes import remark

        for layer in layers:
            layer.remark = remark(layer, self)
        ranked = sorted(layers, key=lambda layer: layer.alone.lowest)  # stable: the earlier of two equals first
        last = {layer.quantised or layer.computed: layer.accumulated for layer in layers}
        outputs = {name: last[name] for name in self.quantised.subject.outputs if name in last}
        return Sensitivities(tuple(ranked), outputs, tuple(self.pairs.unknown()), count)

    def layers(self, sample: Mapping[str, Array]) -> list[Layer]:
        """One for each tensor that has a counterpart, in the order of computation."""
        self.stands = self._comparable(sample)
        found: list[Layer] = []
        quantised: set[str] = set()
        subject = self.quantised.subject
        for name in subject.inputs:
            found += self._quantised(name, quantised)
        for node in subject.nodes:
            for name in node.output:
                if name not in self.stands or name in quantised:
                    continue
                if node.op_type != DEQUANTIZE:
                    later = list(self._quantised(name, quantised))
                    found += later or [self._layer(name, "")]
                else:  # computed in integers
                    quantised.add(name)
                    found.append(self._layer("", name))
        return found

    @property
    def inputs(self) -> dict[str, str]:
        """The float model's input for each of the quantised model's."""
        stands, plain = self.pairs.stands, self.plain.subject.inputs
        names = self.quantised.subject.inputs
        return {name: stands.get(name, plain[min(place, len(plain) - 1)]) for place, name in enumerate(names)}

    def _comparable(self, sample: Mapping[str, Array]) -> dict[str, str]:
        """Which floats stand for which, of those of one shape: an optimizer may use a name for something else."""
        arrays = {name: sample[other] for name, other in self.inputs.items()}
        left = _shapes(self.second, arrays, self.pairs.stands)
        right = _shapes(self.first, sample, set(self.pairs.stands.values()))
        stands = {
            name: other for name, other in self.pairs.stands.items()
            if name in left and other in right and left[name] == right[other]
        }  # fmt: skip
        self.ranks = {other: len(right[other]) for other in stands.values()}
        return stands

    def _quantised(self, name: str, seen: set[str]) -> Iterator[Layer]:
        """The layers of a value that is quantised: one for each way in which it is."""
        for reader in self.quantised.readers.get(name, ()):
            if reader.op_type != QUANTIZE or reader.input[0] != name:
                continue
            again = [r.output[0] for r in self.quantised.readers.get(reader.output[0], ()) if r.op_type == DEQUANTIZE]
            known = [other for other in again if other in self.stands and other not in seen]
            seen.update(again)
            if known:
                yield self._layer("" if name in self.quantised.subject.inputs else name, known[0])

    def _layer(self, computed: str, quantised: str) -> Layer:
        nodes, weights = self._made_of(computed) if computed else ((), ())
        value = self.stands[quantised or computed]
        weighty = [node for node in nodes if node.op_type in MATRICES | IMAGES]
        first = next(iter(weighty or nodes), None)
        names = [node.name for node in (first, *nodes) if node is not None]
        return Layer(
            value, computed, quantised, self.stands.get(computed, ""), tuple(dict.fromkeys(names)),
            first.op_type if first is not None else "", weights, grid=self._grid(quantised),
        )  # fmt: skip

    def _made_of(self, name: str) -> tuple[tuple[NodeProto, ...], tuple[str, ...]]:
        """The nodes that compute a value from others that have a counterpart, the last first, and the quantised
        constants that they read."""
        subject, nodes, weights = self.quantised.subject, [], []
        waiting, seen = [name], {name}
        while waiting:
            node = self.quantised.producer(waiting.pop(0))
            if node is None:
                continue
            if node.op_type not in (QUANTIZE, DEQUANTIZE):
                nodes.append(node)
            for read in subject.reads[subject.definer[node.output[0] or name]]:
                known = read in subject.constants
                dequantised = node.op_type == DEQUANTIZE and read == node.input[0]
                if known and (dequantised or _is_packed(subject.constants[read])):
                    weights.append(read)
                if read not in seen and read not in self.stands and read not in subject.constants:
                    seen.add(read)
                    waiting.append(read)
        return tuple(nodes), tuple(weights)

    def _grid(self, quantised: str) -> Grid | None:
        """What a dequantised value can be, where its scale is a constant."""
        node = self.quantised.producer(quantised) if quantised else None
        return None if node is None else self.grid(node)

    def grid(self, node: NodeProto) -> Grid | None:
        """What a DequantizeLinear gives at least and at most; None where its scale is computed or there are blocks."""
        constants = self.quantised.subject.constants
        names = [name for name in node.input[1:] if name]
        if not names or any(name not in constants for name in names):
            return None
        scale = np.asarray(constants[names[0]], np.float64)
        known = constants.get(node.input[0]) if len(names) == 1 else constants[names[1]]
        dtype = of_numpy(np.asarray(known).dtype) if known is not None else of_numpy(np.dtype(np.uint8))
        if not dtype.is_integer or scale.ndim > 1:
            return None
        zero = np.asarray(constants[names[1]] if len(names) > 1 else 0).astype(np.float64).reshape(-1)
        least, most = (float(limit) for limit in dtype.limits)
        scale = scale.reshape(-1)
        return Grid((least - zero) * scale, (most - zero) * scale, scale, zero, int(most - least) + 1)

    def plain_node(self, name: str) -> NodeProto | None:
        """The float model's node for one of the quantised model's."""
        place = self.plain.subject.places.get(self.pairs.nodes.get(name, ""))
        return None if place is None else self.plain.subject.nodes[place]

    def is_image(self, value: str) -> bool:
        """Whether a value of the float model has its channels in the second axis, by the operators before it."""
        for _ in range(len(self.plain.subject.nodes)):
            node = self.plain.producer(value)
            if node is None or node.op_type in MATRICES or not node.input or not node.input[0]:
                return node is None
            if node.op_type in IMAGES:
                return True
            value = node.input[0]
        return False


def _shapes(steps: Stepwise, arrays: Mapping[str, Array], wanted: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of those of the values that are floats, inputs too, for inputs of certain sizes."""
    found: dict[str, tuple[int, ...]] = {}

    def seen(name: str, array: Any) -> None:
        if name in wanted and isinstance(array, np.ndarray) and of_numpy(array.dtype).is_float:
            found[name] = array.shape

    for name, array in arrays.items():
        seen(name, array)
    steps.follow([Step(node) for node in needed(steps.subject.nodes, wanted)], arrays, seen)
    return found


def _is_packed(array: Any) -> bool:
    """Whether a constant is of a type that weights are quantised to."""
    return of_numpy(np.asarray(array).dtype).bits <= 8 and np.size(array) > 64


def _recent(model: Any, options: Options) -> Any:
    """The model lifted to an opset that can say what is said here, where it is older and can be."""
    from ..quantize.model import lifted, opset_of

    proto = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
    try:
        return proto if opset_of(proto) >= OLDEST else lifted(proto, OLDEST)
    except OnnxcError:
        return proto


class _Measurement:
    """The parts that are run on every sample (see above), and what is summed up of their values."""

    def __init__(self, comparison: Comparison, layers: Sequence[Layer], axes: Mapping[str, int | None]) -> None:
        self.comparison, self.layers, self.axes = comparison, layers, axes
        self.compared: dict[str, list[tuple[str, Power]]] = {}
        for layer in layers:
            self._measure(layer)
        self.plain = comparison.plain_steps(self.wanted)
        nodes = needed(list(self._nodes()), self.compared)
        self.parts = [Step(node) for node in nodes]

    @property
    def wanted(self) -> set[str]:
        """The values of the float model that others are compared with."""
        return {layer.value for layer in self.layers} | {layer.before for layer in self.layers if layer.before}

    def run(self, sample: Mapping[str, Array]) -> None:
        """Adds what one sample shows."""
        values = self.comparison.plain_values(sample, self.plain, self.wanted)
        references = {name: Reference.of(array, self.axes[name]) for name, array in values.items()}

        def seen(name: str, array: Any) -> None:
            for value, power in self.compared.get(name, ()):
                power.add(references[value].signal, references[value].noise(array))

        feeds = {f"f:{name}": array for name, array in values.items()}
        feeds |= {mine: sample[theirs] for mine, theirs in self.comparison.inputs.items()}
        self.comparison.second.follow(self.parts, feeds, seen)
        for layer in self.layers:
            layer.shape = values[layer.value].shape
            grid = layer.grid.ends if layer.grid else None
            layer.extent.add(values[layer.value], self.axes[layer.value], grid)

    def _nodes(self) -> Iterator[NodeProto]:
        """The nodes of all parts, their values under other names."""
        comparison = self.comparison
        subject, pairs = comparison.quantised.subject, comparison.pairs
        kept = comparison.stands

        def given(prefix: str) -> Callable[[str], str]:
            def name(read: str) -> str:
                if read in subject.constants or read in subject.inputs:
                    return read
                if comparison.quantised.is_known(read):
                    return f"q:{read}"
                return f"f:{comparison.stands[read]}" if prefix == "a:" and read in kept else f"{prefix}{read}"

            return name

        def layered(read: str) -> str:
            if read in pairs.whole:
                return f"l:{read}"
            producer = comparison.quantised.producer(read)
            computed = producer is not None and producer.op_type != DEQUANTIZE and read in kept
            return f"a:{read}" if computed else given("a:")(read)

        for node in subject.nodes:
            yield renamed(node, given("q:"), "q:")
            if comparison.quantised.is_known(next(filter(None, node.output))):
                continue
            yield renamed(node, given("a:"), "a:")
            if node.op_type in (QUANTIZE, DEQUANTIZE) or any(name in pairs.whole for name in node.input):
                yield renamed(node, layered, "l:")

    def _measure(self, layer: Layer) -> None:
        """Notes what is compared for a layer."""
        rounding, weighing = Power(), Power()
        if layer.quantised:
            layer.rounding = rounding
            pairs = [
                ("a:", layer.quantised, layer.value, rounding),
                ("q:", layer.quantised, layer.value, layer.accumulated),
            ]
            if layer.computed:
                pairs.append(("l:", layer.quantised, layer.value, layer.alone))
            else:
                layer.alone = rounding
        else:
            pairs = [("q:", layer.computed, layer.value, layer.accumulated)]
            layer.alone = weighing
        if layer.computed:
            layer.weighing = weighing
            pairs.append(("a:", layer.computed, layer.before, weighing))
        for prefix, name, value, power in pairs:
            self.compared.setdefault(f"{prefix}{name}", []).append((value, power))


def renamed(node: NodeProto, read: Callable[[str], str], prefix: str) -> NodeProto:
    """The node with other names for what it reads and defines; in its graphs for what they take from around them."""
    made = NodeProto()
    made.CopyFrom(node)
    made.name = f"{prefix}{node.name}"
    for place, name in enumerate(node.input):
        made.input[place] = read(name) if name else ""
    for place, name in enumerate(node.output):
        made.output[place] = f"{prefix}{name}" if name else ""
    for attribute in made.attribute:
        if attribute.HasField("g"):
            _rename_in(attribute.g, read)
    return made


def _rename_in(graph: onnx.GraphProto, read: Callable[[str], str]) -> None:
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {name for node in graph.node for name in node.output}

    def outer(name: str) -> str:
        return name if name in own else read(name)

    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = outer(name) if name else ""
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename_in(attribute.g, outer)
    for value in graph.output:
        value.name = outer(value.name)


def needed(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """The nodes that outputs hang on, in order."""
    from ...compiler.nodes import names_read

    wanted, found = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            found.append(node)
            wanted.update(names_read([node]))
    return found[::-1]
