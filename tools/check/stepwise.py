"""A model's nodes run one after another, each by onnxc's code for it alone.

Nodes that are alike (operator, attributes, types and shapes of what they read) share their code: a model of hundreds of
layers has some dozens of kinds. What is compiled is small, whatever the model's size, and every value is there to be
looked at; a model compiled whole, with all its values as outputs, takes minutes.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from onnx import NodeProto, helper

from ...compiler.driver import compile_model
from ...compiler.nodes import graphs_in, names_read
from ...compiler.options import Options
from ...ir.dtypes import of_numpy
from ...ir.errors import OnnxcError, UnsupportedError
from .evaluate import Evaluator
from .subject import SMALL, Subject
from .windows import factors

FIXED = frozenset(("ConvTranspose", "ConvInteger", "DeformConv", "LSTM", "GRU", "RNN", "DynamicQuantizeLSTM",
                   "MatMulNBits", "GatherBlockQuantized", "QAttention"))  # fmt: skip
"""Operators whose code is made for their weights: these have to be constants of it."""

SIZES = frozenset(("int32", "int64", "bool"))
"""Types of what may decide shapes, of which a compiler has to know the elements."""


@dataclass(frozen=True)
class Step:
    """A node, and how it looks under names that do not tell it from others of its kind."""

    node: NodeProto

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The values that it reads, also in the graphs in it, each once."""
        return tuple(dict.fromkeys(filter(None, names_read([self.node]))))

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        return tuple(filter(None, self.node.output))

    @cached_property
    def alias(self) -> dict[str, str]:
        """The name in `kind` of each value that is read; graphs in a node keep those they have."""
        keeps = bool(graphs_in(self.node))
        return {name: name if keeps else f"x{number}" for number, name in enumerate(self.reads)}

    @cached_property
    def kind(self) -> NodeProto:
        """The node under such names."""
        made = NodeProto()
        made.CopyFrom(self.node)
        made.name = made.op_type
        made.ClearField("doc_string")
        made.ClearField("metadata_props")
        made.input[:] = [self.alias[name] if name else "" for name in self.node.input]
        made.output[:] = [f"y{number}" if name else "" for number, name in enumerate(self.node.output)]
        return made

    @cached_property
    def text(self) -> bytes:
        return bytes(self.kind.SerializeToString(deterministic=True))


PRODUCT = Step(helper.make_node("MatMul", ["filters", "columns"], ["sums"]))


Sizes: TypeAlias = tuple[tuple[int | str, ...], ...]


@dataclass
class _Code:
    """Code for the nodes of a kind whose operands have these sizes; names stand for any, the same one each time."""

    sizes: Sizes
    run: Callable[[Mapping[str, Any]], Sequence[Any]]
    constants: Mapping[str, Any]

    def fits(self, shapes: Sizes) -> bool:
        found: dict[int | str, int | str] = {}
        return [len(own) for own in self.sizes] == [len(shape) for shape in shapes] and all(
            a == b if isinstance(a, int) else found.setdefault(a, b) == b for a, b in _axes(self.sizes, shapes)
        )


def _axes(sizes: Sizes, others: Sizes) -> Iterator[tuple[int | str, int | str]]:
    """Both sizes of each axis."""
    for own, other in zip(sizes, others, strict=True):
        yield from zip(own, other, strict=True)


@dataclass
class Stepwise:
    """Runs nodes of a subject, also under other names for what is no constant."""

    subject: Subject
    options: Options
    made: dict[Any, list[_Code]] = field(default_factory=dict)
    steady: dict[str, Any] = field(default_factory=dict)

    def follow(self, steps: Sequence[Step], values: Mapping[str, Any], seen: Callable[[str, Any], None]) -> None:
        """Runs steps in order on `values`; `seen` is told every result. Results are dropped after their last reader."""
        constants = self.subject.constants
        here = dict(values)
        last = {name: position for position, step in enumerate(steps) for name in step.reads}
        fixed = {name for step in steps if step.node.op_type in FIXED for name in step.reads}
        for position, step in enumerate(steps):
            if not set(step.outputs) <= self.steady.keys():
                known = ChainMap(constants, self.steady, here)  # type: ignore[arg-type]
                feeds = {name: known[name] for name in step.reads if name in known}
                unchanging = {name for name in feeds if name in constants or name in self.steady}
                results = self.run(step, feeds, unchanging)
                kept = self.steady if len(unchanging) == len(feeds) and fixed.intersection(step.outputs) else here
                kept.update(zip(step.outputs, results, strict=False))
                for name, value in zip(step.outputs, results, strict=False):
                    seen(name, value)
            for name in (*step.reads, *step.outputs):
                if last.get(name, -1) <= position:
                    here.pop(name, None)

    def run(self, step: Step, feeds: Mapping[str, Any], unchanging: Collection[str] = ()) -> Sequence[Any]:
        """The results of a step for what it reads, of which `unchanging` are the same arrays each time.

        Raises UnsupportedError where neither onnxc nor another engine can run the node.
        """
        if step.node.op_type == "Conv":
            image, weights, *bias = (feeds[name] for name in step.node.input if name)
            found = factors(step.node, image, weights)
            if found is not None:
                (sums,) = self.run(PRODUCT, dict(zip(PRODUCT.reads, found[:2], strict=True)))
                result = sums.reshape(found[2])
                return [result + bias[0].reshape(-1, *(1,) * (result.ndim - 2)) if bias else result]
        arrays = {step.alias[name]: array for name, array in feeds.items()}
        fixed = {
            step.alias[name]: array for name, array in feeds.items()
            if _is_small(array) or (step.node.op_type in FIXED and name in unchanging)
        }  # fmt: skip
        told = [(name, array.tobytes() if array.size <= SMALL else id(array)) for name, array in fixed.items()]
        key = step.text, tuple(told), tuple((name, _type(array)) for name, array in arrays.items())
        shapes = tuple(np.shape(array) for name, array in arrays.items() if name not in fixed)
        codes = self.made.setdefault(key, [])
        code = next((code for code in codes if code.fits(shapes)), None)
        if code is None:
            code = self._code(step, arrays, fixed, shapes, codes[-1] if codes else None)
            codes.append(code)
        return code.run(arrays)

    def _code(
        self, step: Step, arrays: Mapping[str, Any], fixed: Mapping[str, Any], exact: Sizes, before: _Code | None
    ) -> _Code:
        """Code for these shapes; where there is some for others, code that leaves open what differs."""
        if before is not None and [len(sizes) for sizes in before.sizes] == [len(shape) for shape in exact]:
            names: dict[tuple[int | str, int | str], int | str] = {}
            for a, b in _axes(before.sizes, exact):  # axes that were alike both times share a name
                names.setdefault((a, b), a if a == b else f"size{len(names)}")
            sizes = tuple(
                tuple(names[pair] for pair in zip(own, shape, strict=True))
                for own, shape in zip(before.sizes, exact, strict=True)
            )
            try:
                return _Code(sizes, self._compiled(step, arrays, fixed, sizes), fixed)
            except OnnxcError:  # the node needs to know them
                pass
        try:
            return _Code(exact, self._compiled(step, arrays, fixed, exact), fixed)
        except OnnxcError as error:
            reason = error
            evaluator = Evaluator(replace(self.subject, constants=fixed), ("onnxruntime", "reference"))

            def run(feeds: Mapping[str, Any]) -> Sequence[Any]:
                try:
                    return evaluator.node(step.kind, dict(feeds))[0]
                except OnnxcError:
                    sizes = ", ".join(str(list(shape)) for shape in exact)
                    raise UnsupportedError(
                        f'node "{step.node.name}" ({step.node.op_type}) cannot be run on operands of shapes {sizes}: '
                        f"{reason} (made-up inputs may not suit the model: see --input, --shape and --data)"
                    ) from reason

            return _Code(exact, run, fixed)

    def _compiled(
        self, step: Step, arrays: Mapping[str, Any], fixed: Mapping[str, Any], sizes: Sizes
    ) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
        outputs = list(filter(None, step.kind.output))
        model = replace(self.subject, constants=fixed).model([step.kind], arrays, outputs)
        open_ = dict(zip((name for name in arrays if name not in fixed), sizes, strict=True))
        for value in model.graph.input:
            for axis, size in enumerate(open_.get(value.name, ())):
                if isinstance(size, str):
                    value.type.tensor_type.shape.dim[axis].dim_param = size
        code = compile_model(model, self.options)
        taken = [port.name for port in code.inputs]
        return lambda feeds: list(code.run({name: feeds[name] for name in taken}).values())


def _is_small(array: Any) -> bool:
    """Whether these are numbers that may decide shapes."""
    return isinstance(array, np.ndarray | np.generic) and array.size <= SMALL and array.dtype.name in SIZES


def _type(value: Any) -> str:
    return "sequence" if isinstance(value, list | tuple) else str(of_numpy(np.asarray(value).dtype))
