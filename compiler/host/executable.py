"""Models that Python runs in part: its steps between compiled segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from ...ir.dtypes import BY_ONNX
from ...ir.errors import HostNeeded, ShapeError, UnsupportedError, ValueNeeded
from ...ir.graph import TensorType, Value
from ..binding import Port, bind_symbols
from ..compiled import Compiled
from ..deferred import Deferred
from ..dimensions import Symbols, input_types
from ..options import Options
from ..weights import Weights
from .expansion import expanded
from .kinds import NUMBERS, kind_of_type
from .plan import Plan, Planner
from .ports import fitting, port_of
from .segment import STRETCHED, Runnable, Segment

CompileSegment = Callable[[ModelProto, Options], Runnable]
CheckSegment = Callable[[ModelProto, Options], object]


class HostExecutable(Deferred):
    """Has the interface of an Executable. Text is given and taken as arrays of str, a sequence as a list, an optional
    as its value or None, a map as a dict. Calls from several threads at once are fine.

    Raises ShapeError where an argument does not fit, OnnxcError with the node's name where a step fails.
    """

    def __init__(
        self,
        model: ModelProto,
        options: Options,
        compile: CompileSegment,
        check: CheckSegment,
        reason: HostNeeded | ValueNeeded,
    ) -> None:
        """`reason` tells why the model is divided, and names the loops that Python must repeat, or the nodes that are
        compiled when values are known; `check` reads a segment's model without compiling it.

        Raises UnsupportedError where neither code nor Python can run a node, `reason` where there is nothing to divide.
        """
        self._reason = reason
        within = replace(options, dims=None, shapes=None)
        folder = Path(options.folder) if options.folder is not None else None
        model = expanded(model)
        constants = {tensor.name for tensor in model.graph.initializer}
        self._declared = [value for value in model.graph.input if value.name not in constants]
        self._results = list(model.graph.output)
        tensors = [value for value in self._declared if value.type.WhichOneof("value") == "tensor_type"]
        tensors = [value for value in tensors if value.type.tensor_type.HasField("shape")]
        types = input_types(tensors, Symbols(), options.dims, options.shapes, options.smallest)
        self._tensors = [Value(name, type) for name, type in types.items() if isinstance(type, TensorType)]

        def compiled(segment: ModelProto, smallest: int) -> Runnable:
            return compile(segment, replace(within, smallest=smallest))

        named = _named_nodes(reason)
        planner = Planner(model, compiled, Weights(None, folder))
        late = isinstance(reason, ValueNeeded)
        planner = replace(planner, cuts=named) if late else replace(planner, loops=named)
        self._plan = planner.plan()
        if not self._divided and not late:
            # Within a function that loop has another name: Python repeats all that there are.
            self._plan = replace(planner, loops=None).plan()
        if not self._divided:
            raise reason if late else UnsupportedError(str(reason)) from reason
        self._prepare(check, replace(within, smallest=STRETCHED))

    def _prepare(self, check: CheckSegment, options: Options) -> None:
        """Compiles the segments that read inputs of declared sizes; reads those whose inputs' sizes are open, so that
        what cannot be compiled is told now."""
        types = {value.name: value.type.tensor_type.elem_type for value in self._declared}
        shapes = {value.name: value.shape for value in self._tensors}
        for step in self._plan.steps:
            if not isinstance(step, Segment) or not shapes.keys() >= set(step.reads):
                continue
            sizes = {n: tuple(d if isinstance(d, int) else None for d in shapes[n]) for n in step.reads}
            with suppress(ValueNeeded, HostNeeded):
                if any(None in shape for shape in sizes.values()):
                    check(step.as_model({name: (types[name], shape) for name, shape in sizes.items()}), options)
                else:
                    known = {name: [size for size in shape if size is not None] for name, shape in sizes.items()}
                    zero = {name: np.zeros((), BY_ONNX[types[name]].numpy) for name in sizes}
                    step.compiled({name: np.broadcast_to(zero[name], shape) for name, shape in known.items()})

    @property
    def _divided(self) -> bool:
        kinds = [*self._plan.kinds, *(kind_of_type(value.type) for value in self._declared)]
        return not self._plan.whole or any(kind != NUMBERS for kind in kinds)

    @property
    def steps(self) -> Plan:
        """What runs: compiled segments and steps of Python, in order."""
        return self._plan

    @property
    def compiled(self) -> Compiled:
        """Raises UnsupportedError, naming the nodes that only Python can run."""
        steps = [f'"{step.name}" ({step.operator})' for step in self._plan.host_steps]
        nodes = ", ".join(steps[:_LISTED]) + (f" and {len(steps) - _LISTED} more" if len(steps) > _LISTED else "")
        what = f"runs {len(steps)} steps of this model: {nodes}" if steps else "hands on values that decide the code"
        raise UnsupportedError(
            f"Python {what}; ahead of time only operators on tensors of numbers are compiled: run the model by "
            f"onnxc.compile or onnxc run, or export it without these nodes ({self._reason})"
        ) from self._reason

    @property
    def inputs(self) -> tuple[Port, ...]:
        return tuple(map(port_of, self._declared))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return tuple(map(port_of, self._results))

    def dump(self, stage: str = "program") -> str:
        """The list of steps for the stage "program"; for others the texts of the segments that runs have compiled."""
        if stage == "program":
            return "\n".join(self._plan.lines()) + "\n"
        found = []
        for segment in self._plan.segments:
            for form in segment.forms():
                found.append(f'// segment from "{segment.name}"\n{form.dump(stage)}')
        return "\n".join(found) or "// no segment is compiled yet: each is when a run first sees its operands' types\n"

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name, for inputs by name; an optional that is not given is absent."""
        optional = {v.name for v in self._declared if v.type.WhichOneof("value") == "optional_type"}
        names = [value.name for value in self._declared]
        missing = [name for name in names if name not in inputs and name not in optional]
        unknown = [name for name in inputs if name not in names]
        if missing or unknown:
            wrong = (("missing", missing), ("unknown", unknown))
            parts = "; ".join(f"{what}: {', '.join(found)}" for what, found in wrong if found)
            raise ShapeError(f"inputs do not fit ({parts}); the model takes {', '.join(map(str, self.inputs))}")
        given = {value.name: fitting(inputs.get(value.name), value.type, value.name) for value in self._declared}
        bind_symbols(self._tensors, [given[value.name].shape for value in self._tensors])
        taken: set[int] = set()
        _arrays(list(given.values()), taken)
        found = self._plan.run([given[name] for name in names], {})
        return {value.name: _own(result, taken) for value, result in zip(self._results, found, strict=True)}


_LISTED = 8
"""Nodes that a message names."""


def _arrays(value: Any, found: set[int]) -> None:
    """Adds the identities of all arrays in a value."""
    if isinstance(value, list):
        for item in value:
            _arrays(item, found)
    else:
        found.add(id(value))


def _own(value: Any, taken: set[int]) -> Any:
    """A result that shares no memory with arguments, constants or other results, which are `taken`."""
    if isinstance(value, list):
        return [_own(item, taken) for item in value]
    if isinstance(value, np.ndarray) and (id(value) in taken or not (value.flags.owndata and value.flags.writeable)):
        value = value.copy()
    taken.add(id(value))
    return value


def _named_nodes(reason: BaseException | None) -> frozenset[str]:
    """The nodes that an error names, or one that it was raised from."""
    found: set[str] = set()
    while reason is not None:
        found.update(getattr(reason, "nodes", ()))
        reason = reason.__cause__
    return frozenset(found)
