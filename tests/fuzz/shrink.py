"""The smallest graph that shows a difference: outputs go, and nodes give way to inputs that hold what they computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from fuzz.compare import pruned, quiet, reads
from fuzz.graphs import Case
from onnx import helper
from onnx.reference import ReferenceEvaluator

Values = Mapping[str, Any]


def part(case: Case, values: Sequence[Values], outputs: Sequence[str], cut: Collection[str]) -> Case:
    """The case of these outputs alone, whose graph begins with the values in `cut`, given as inputs."""
    model = pruned(case.model, outputs, cut)
    there = {value.name for value in model.graph.input} | {tensor.name for tensor in model.graph.initializer}
    needed = {name for node in model.graph.node for name in reads(node)} | set(outputs)
    for name in sorted(needed & set(cut) - there):
        arrays = [np.asarray(run[name]) for run in values]
        sizes = zip(*(array.shape for array in arrays), strict=True)
        dims = (
            [n[0] if len(set(n)) == 1 else f"{name}_{axis}" for axis, n in enumerate(sizes)] if arrays[0].ndim else []
        )
        kind = helper.np_dtype_to_tensor_dtype(arrays[0].dtype)
        model.graph.input.append(helper.make_tensor_value_info(name, kind, dims))
    inputs = model.graph.input
    feeds = tuple({value.name: np.asarray(run[value.name]) for value in inputs} for run in values)
    return Case(model, feeds, tuple({name: run[name] for name in outputs} for run in values))


def shrunk(case: Case, fails: Callable[[Case], bool]) -> Case:
    """The smallest part of a failing case that fails too, as far as single steps find it."""
    values = []
    for inputs, expected in zip(case.inputs, case.expected, strict=True):
        try:
            with quiet():
                found = ReferenceEvaluator(case.model).run(None, dict(inputs), intermediate=True)
        except Exception:  # an operator that the reference lacks: only what was known before
            found = {}
        values.append({**found, **inputs, **expected})
    names = [value.name for value in case.model.graph.output]
    for name in names:
        if len(names) > 1 and fails(smaller := part(case, values, [name], ())):
            case, names = smaller, [name]
            break
    cut: set[str] = set()
    for node in list(case.model.graph.node):
        known = {name for name in node.output if name and all(isinstance(run.get(name), np.ndarray) for run in values)}
        if known and not known & set(names) and fails(smaller := part(case, values, names, cut | known)):
            case, cut = smaller, cut | known
    return case
