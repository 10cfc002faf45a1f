"""Every operator's definition against ONNX's own node cases, with fixed and with symbolic shapes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from node_cases import node_cases, run_case
from onnxc.ir.ops import REGISTRY

FAMILIES = (
    "contraction", "elementwise", "generators", "indexing", "movement", "normalisation", "pooling", "quantization",
    "reduction", "resize", "sampling", "special", "spectral",
)  # fmt: skip

OLDER = ("_opset19", "test_upsample")
"""Parts of the names of cases that are written for an older opset: the importer lifts those."""

REFUSED = {
    "test_training_dropout": "draws random numbers",
    "test_training_dropout_default": "draws random numbers",
    "test_training_dropout_default_mask": "draws random numbers",
    "test_training_dropout_mask": "draws random numbers",
}

NEEDS_NUMBERS = {
    "test_gathernd_example_int32": "the length of index tuples",
    "test_gathernd_example_float32": "the length of index tuples",
    "test_scatternd_max_with_element_indices": "the length of index tuples",
    "test_scatternd_min_with_element_indices": "the length of index tuples",
    "test_resize_downsample_sizes_linear_antialias": "the number of taps",
    "test_resize_downsample_sizes_cubic_antialias": "the number of taps",
    "test_resize_upsample_sizes_nearest_not_larger": "the lesser ratio",
    "test_resize_upsample_sizes_nearest_not_smaller": "the greater ratio",
    "test_resize_downsample_sizes_nearest_not_larger": "the lesser ratio",
    "test_resize_downsample_sizes_nearest_not_smaller": "the greater ratio",
}
"""What must be a number when compiling, for cases that cannot run with symbolic shapes."""


def cases_of(operators: set[str], skipped: dict[str, str]) -> list[Any]:
    """The cases of one node each that use the given operators."""
    return [
        case
        for name, case in node_cases().items()
        if len(case.model.graph.node) == 1
        and case.model.graph.node[0].op_type in operators
        and name not in skipped
        and not any(part in name for part in OLDER)
        and not any(attribute.HasField("g") for attribute in case.model.graph.node[0].attribute)
    ]


def failures(cases: list[Any], symbolic: bool) -> list[str]:
    found = []
    for case in cases:
        try:
            run_case(case, symbolic)
        except Exception as error:
            found.append(f"{case.name}: {type(error).__name__}: {str(error).strip()[:300]}")
    return found


@pytest.mark.parametrize("symbolic", [False, True], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cases_of_family(family: str, symbolic: bool) -> None:
    declared = set(importlib.import_module(f"onnxc.ir.ops.{family}").declare.operators)
    cases = cases_of(declared, REFUSED | (NEEDS_NUMBERS if symbolic else {}))
    assert cases, "no case uses this family: its name is wrong"
    assert not (found := failures(cases, symbolic)), "\n".join(found)


@pytest.mark.parametrize("symbolic", [False, True], ids=["fixed", "symbolic"])
def test_cases_of_several_nodes(symbolic: bool) -> None:
    """Graphs that ONNX made of functions, such as attention and losses, node by node."""
    rounds_elsewhere = ("bf16", "fp16", "bernoulli")
    cases = []
    for name, case in node_cases().items():
        nodes = case.model.graph.node
        known = all(node.op_type in REGISTRY or node.op_type == "Constant" for node in nodes)
        bodies = any(attribute.HasField("g") for node in nodes for attribute in node.attribute)
        if len(nodes) > 1 and known and not bodies and not any(part in name for part in (*rounds_elsewhere, "window")):
            cases.append(case)
    assert len(cases) > 250
    assert not (found := failures(cases, symbolic)), "\n".join(found)


def test_every_operator_is_in_a_family() -> None:
    declared: set[str] = set()
    more = ("attention", "control", "microsoft", "microsoft_attention", "microsoft_quantization")
    more += ("packed_weights", "random", "trees")
    for family in (*FAMILIES, *more):
        declared |= set(importlib.import_module(f"onnxc.ir.ops.{family}").declare.operators)
    assert declared == set(REGISTRY)
