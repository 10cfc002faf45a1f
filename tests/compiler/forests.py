"""Random decision trees as ONNX models, and what one node of ai.onnx.ml gives in the reference and in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper

Array = npt.NDArray[Any]
BRANCHES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ")


def model_of(
    op: str,
    inputs: Mapping[str, Array],
    outputs: int = 1,
    opset: int = 3,
    shapes: Mapping[str, list[int]] | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node of ai.onnx.ml, the rows of its inputs symbolic."""
    names = [f"y{number}" for number in range(outputs)]
    values = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(array.dtype),
            (shapes or {}).get(name, ["rows", *array.shape[1:]][: array.ndim]),
        )
        for name, array in inputs.items()
    ]
    node = helper.make_node(op, list(inputs), names, domain="ai.onnx.ml", **attributes)
    graph = helper.make_graph([node], "node", values, [helper.make_empty_tensor_value_info(name) for name in names])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def runtime(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Array]:
    """What ONNX Runtime computes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(inputs)))


def forest(
    random: np.random.Generator,
    trees: int,
    depth: int,
    features: int,
    modes: tuple[str, ...] = BRANCHES,
    missing: bool = False,
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """The attributes nodes_* of random trees, of full depth or less, and (tree, node) of their leaves."""
    found: dict[str, list[Any]] = {
        f"nodes_{name}": []
        for name in ("treeids", "nodeids", "featureids", "values", "modes", "truenodeids", "falsenodeids")
    }
    tracks: list[int] = []
    leaves: list[tuple[int, int]] = []
    for tree in range(trees):
        waiting, number = [(0, 0)], 1
        while waiting:
            node, level = waiting.pop(0)
            leaf = level == depth or (level > 0 and random.random() < 0.15)
            row = [tree, node, int(random.integers(features)), float(np.float32(random.integers(-4, 5) / 2))]
            children = (0, 0) if leaf else (number, number + 1)
            row += ["LEAF" if leaf else str(random.choice(modes)), *children]
            if leaf:
                leaves.append((tree, node))
            else:
                waiting += [(number, level + 1), (number + 1, level + 1)]
                number += 2
            for values, item in zip(found.values(), row, strict=True):
                values.append(item)
            tracks.append(int(missing and not leaf and random.random() < 0.5))
    if missing:
        found["nodes_missing_value_tracks_true"] = tracks
    return found, leaves


def leaves_of(prefix: str, leaves: list[tuple[int, int]], ids: list[int], weights: Array) -> dict[str, Any]:
    """The attributes class_* or target_*: one entry for each leaf."""
    return {
        f"{prefix}_treeids": [tree for tree, _ in leaves],
        f"{prefix}_nodeids": [node for _, node in leaves],
        f"{prefix}_ids": ids,
        f"{prefix}_weights": [float(weight) for weight in weights],
    }


def table(random: np.random.Generator, rows: int, features: int, dtype: Any = np.float32, nan: bool = False) -> Array:
    """Features that often equal a threshold."""
    x = random.integers(-5, 6, (rows, features)) / 2
    if nan:
        x[random.random(x.shape) < 0.2] = np.nan
    return np.asarray(x.astype(dtype))
