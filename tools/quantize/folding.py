"""What is folded into weights before they are quantised: what is added to each channel behind a convolution, batch
normalisation, Gemm's factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from .graph import GraphDraft
from .model import attribute

Array = NDArray[Any]


CONVOLUTIONS = ("Conv", "ConvTranspose")


def _followed(draft: GraphDraft) -> Iterator[tuple[NodeProto, NodeProto]]:
    """The convolutions whose results one node alone reads, each with that node."""
    readers, fixed = draft.readers(), draft.fixed()
    for node in list(draft.graph.node):
        following = readers.get(node.output[0], []) if node.output else []
        if node.op_type in CONVOLUTIONS and not node.domain and node.output[0] not in fixed and len(following) == 1:
            yield node, following[0]


def fold_biases(draft: GraphDraft) -> None:
    """Adds constants for each channel to the biases of convolutions whose results nobody else reads."""
    gone = set[str]()
    nodes = list(draft.graph.node)
    for node, add in _followed(draft):
        other = next((name for name in add.input if name != node.output[0]), "")
        if add.op_type != "Add" or add.domain or not (_is_conv(node, draft) and draft.is_float(other)):
            continue
        channels, rank = _filters(node, draft), len(draft.shape(node.input[1]))
        shape = (*(1,) * (rank - len(draft.shape(other))), *draft.shape(other))
        if len(shape) != rank or shape != (1, shape[1], *(1,) * (rank - 2)) or shape[1] not in (1, channels):
            continue
        bias = draft.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(channels, np.float32)
        name = draft.add_constant(f"{node.name}_folded_sum", bias + draft.array(other).reshape(-1))
        del node.input[2:]
        node.input.append(name)
        node.output[0] = add.output[0]
        gone.add(add.name)
    draft.replace_nodes(node for node in nodes if node.name not in gone)


def _filters(node: NodeProto, draft: GraphDraft) -> int:
    """How many channels a convolution's result has."""
    weights = draft.shape(node.input[1])
    return weights[0] if node.op_type == "Conv" else weights[1] * int(attribute(node, "group", 1))


def _by_filter(node: NodeProto, factor: Array, weights: Array) -> Array:
    """The weights of each filter times its factor."""
    if node.op_type == "Conv":
        return np.asarray(weights * factor.reshape(-1, *[1] * (weights.ndim - 1)))
    groups = attribute(node, "group", 1)  # [channels, filters of a group, *kernel]
    parts = weights.reshape(groups, -1, *weights.shape[1:])
    return np.asarray((parts * factor.reshape(groups, 1, -1, *[1] * (weights.ndim - 2))).reshape(weights.shape))


def fold_batch_norms(draft: GraphDraft) -> int:
    """Multiplies BatchNormalization into the convolutions whose results nobody else reads (Jacob et al. 2018, 3.2); how
    many there were."""
    gone = dict[str, str]()
    nodes = list(draft.graph.node)
    for node, norm in _followed(draft):
        if not (_is_conv(node, draft) and _is_norm(norm, node, draft)):
            continue
        scale, shift, mean, variance = (draft.array(name).astype(np.float64) for name in norm.input[1:5])
        factor = scale / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
        weights = draft.array(node.input[1])
        bias = draft.array(node.input[2]).astype(np.float64) if len(node.input) > 2 and node.input[2] else 0.0
        folded = _by_filter(node, factor, weights)
        name = draft.add_constant(f"{node.input[1]}_folded", folded.astype(np.float32))
        shifted = draft.add_constant(f"{node.name}_folded_bias", ((bias - mean) * factor + shift).astype(np.float32))
        del node.input[1:]
        node.input.extend([name, shifted])
        gone[norm.name] = node.name
        node.output[0] = norm.output[0]
    draft.replace_nodes(node for node in nodes if node.name not in gone)
    return len(gone)


def _is_conv(node: NodeProto, draft: GraphDraft) -> bool:
    return all(draft.is_float(name) for name in node.input[1:] if name)


def _is_norm(norm: NodeProto, conv: NodeProto, draft: GraphDraft) -> bool:
    """Whether the node normalises this convolution's result by statistics that are constants."""
    return (
        norm.op_type == "BatchNormalization"
        and norm.input[0] == conv.output[0]
        and not any(norm.output[1:])
        and not attribute(norm, "training_mode", 0)
        and all(draft.is_float(name) for name in norm.input[1:5])
    )


def fold_factors(draft: GraphDraft) -> None:
    """Multiplies alpha and beta of Gemm into its constants."""
    for node in draft.graph.node:
        if node.op_type != "Gemm" or node.domain:
            continue
        for place, name in ((1, "alpha"), (2, "beta")):
            factor = attribute(node, name, 1.0)
            operand = node.input[place] if len(node.input) > place else ""
            if factor == 1.0 or not draft.is_float(operand):
                continue
            scaled = (draft.array(operand).astype(np.float64) * factor).astype(np.float32)
            node.input[place] = draft.add_constant(f"{operand}_scaled", scaled)
            kept = [entry for entry in node.attribute if entry.name != name]
            del node.attribute[:]
            node.attribute.extend(kept)


__all__ = ["fold_batch_norms", "fold_biases", "fold_factors"]
