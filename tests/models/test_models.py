"""Real models, compiled once and run at every size, against ONNX Runtime; and their memory plans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxc
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnxc.ir.dims import evaluate
from onnxc.ir.program import ArenaPlan
from onnxc.passes.arena import offsets_for
from plan_checker import check_plan

from .engines import onnx_runtime
from .zoo import MODELS, ZooModel, relative_difference

TOLERANCE = 1e-4
"""Of the largest value, in f32."""
COMPILED = [model for model in MODELS.values() if not model.quantized]


@pytest.mark.parametrize("model", COMPILED, ids=lambda model: model.name)
def test_agrees_with_onnx_runtime(model: ZooModel) -> None:
    source = model.source()
    # Where all weights of a tensor are equal, classes stay so only if each is computed alike; logits reach 5e9, whose
    # last binary place is worth 512, and the softmax behind them sees it.
    algorithm = "off" if model.package == "onnx" else "auto"
    compiled, runtime = onnxc.compile(source, winograd=algorithm, strassen=algorithm), onnx_runtime(source)
    for case, inputs in model.cases().items():
        actual, expected = compiled.run(inputs), runtime(inputs)
        assert list(actual) == list(expected)
        worst = max(relative_difference(actual[name], expected[name]) for name in expected)
        if worst > TOLERANCE:
            assert_closer_to_the_truth(source, inputs, actual, expected, f"{case}: differs by {worst:.1e}")


Arrays = Mapping[str, NDArray[np.generic]]


def assert_closer_to_the_truth(
    source: Path | bytes, inputs: Arrays, actual: Arrays, expected: Arrays, what: str
) -> None:
    """Where rounding alone makes engines differ (a logarithm of what cancels to nearly nothing), f64 decides: no output
    may be further from it than ONNX Runtime's."""
    exact = onnxc.compile(in_f64(source)).run(
        {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in inputs.items()}
    )
    for name, truth in exact.items():
        ours, theirs = (relative_difference(a[name].astype(np.float64), truth) for a in (actual, expected))
        assert ours <= max(theirs, TOLERANCE), f"{what}; {name} is off by {ours:.1e}, ONNX Runtime by {theirs:.1e}"


def in_f64(source: Path | bytes) -> onnx.ModelProto:
    """The model with f64 wherever it has f32."""
    model = onnx.load_model_from_string(source) if isinstance(source, bytes) else onnx.load(source)
    graph = model.graph

    def widened(tensor: TensorProto) -> TensorProto:
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name)

    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(widened(tensor))
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
            if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(widened(attribute.t))
    del graph.value_info[:]
    return model


def check_arena(plan: ArenaPlan, sizes: Mapping[str, int]) -> bool:
    """Proves the layout of all arenas for the given sizes; False where the model has no such sizes (a window that is
    longer than its image)."""
    if any(evaluate(slot.bytes, sizes) < 0 for slots in plan.slots for slot in slots):
        return False
    for slots in plan.slots:
        own = [slot for slot in slots if slot.memory in plan.lifetimes]
        assert own == list(slots[: len(own)])
        sizes_in_bytes = [evaluate(slot.bytes, sizes) for slot in own]
        offsets = offsets_for([slot.below for slot in own], sizes_in_bytes)
        end = max((offset + size for offset, size in zip(offsets, sizes_in_bytes, strict=True)), default=0)
        spans = [plan.lifetimes[slot.memory] for slot in own]
        check_plan([(*span, o, s) for span, o, s in zip(spans, offsets, sizes_in_bytes, strict=True)], end)
    return True


@pytest.mark.parametrize("model", [m for m in COMPILED if m.package != "random"], ids=lambda model: model.name)
def test_memory_plan(model: ZooModel) -> None:
    """Within 5 % of the lower bound, and valid for other sizes than those that it was made for."""
    executable = onnxc.compile(model.source())
    if isinstance(executable, onnxc.Executable):
        executables = [executable]
    else:
        executables = [executable.specialized(inputs) for inputs in model.cases().values()]
    for each in executables:
        plan = each.compiled.arena
        assert plan.size <= 1.05 * plan.lower_bound
        checked = [check_arena(plan, dict.fromkeys(plan.hints, size)) for size in (1, 3, 40, 97, 640)]
        assert any(checked)
