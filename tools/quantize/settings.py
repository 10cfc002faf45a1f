"""How to quantise, and what is told about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from onnx import NodeProto

from ...ir.errors import OnnxcError

METHODS = ("mse", "minmax", "percentile", "entropy")
ACTIVATIONS = ("u8", "i8")
WIDTHS = {"int4": 4, "int8": 8}
"""Bits of weights that alone are quantised."""
Progress: TypeAlias = Callable[[str, int, "int | None"], None]
"""Told what is done, how far it is, and of how much (None: nobody knows)."""


class QuantizationError(OnnxcError):
    """A model or its calibration data cannot be used for quantization; the message says what to do."""


@dataclass(frozen=True)
class Settings:
    """How to quantise a model.

    `method` chooses the ranges of activations, `percentile` is what that method keeps of the values on either side.
    `activations` are u8 or i8, with a zero point or `symmetric` around zero; weights are i8 per
    channel or `per_tensor`.
    `correction`: biases make up for the mean error that rounded weights give each channel.
    `smooth`: channels of very different size that share a scale are made alike by factors that go into the weights.
    `integer_outputs`: every convolution writes integers, also before a smooth activation, which costs accuracy; ONNX
    Runtime computes no others with integers.
    `weights_only` ("int4", "int8") quantises nothing but weights, 4-bit ones in blocks of `block` along the sums;
    `dynamic` finds the ranges of activations at run time, with calibration data only those of LSTM. `keep` are patterns
    of nodes' names or operators that stay in float. `samples` limits the samples that are used, chosen by `seed` where
    their number is known; `batch` is how many run at once (None: as many as take some 256 MB).
    """

    method: str = "mse"
    percentile: float = 99.99
    activations: str = "u8"
    symmetric: bool = False
    per_tensor: bool = False
    correction: bool = True
    smooth: bool = True
    integer_outputs: bool = False
    weights_only: str | None = None
    block: int = 32
    dynamic: bool = False
    keep: Sequence[str] = ()
    samples: int | None = None
    batch: int | None = None
    seed: int = 0
    threads: int | None = None
    folder: str | None = None
    progress: Progress = field(default=lambda what, done, total: None, compare=False)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, METHODS),
            ("activations", self.activations, ACTIVATIONS),
            ("weights_only", self.weights_only or "int8", tuple(WIDTHS)),
        ):
            if value not in known:
                raise QuantizationError(f"{name} is {value!r}: it can be {', '.join(known)}")
        if self.weights_only and self.dynamic:
            raise QuantizationError("weights only, or dynamic: a model is quantised in one of these ways")
        if not 50 < self.percentile <= 100:
            raise QuantizationError(f"the percentile is {self.percentile}: it is more than 50 and at most 100")
        if self.block < 16 or self.block & (self.block - 1):
            raise QuantizationError(f"blocks of {self.block}: their size is a power of two, 16 or more")
        for name, count in (("samples", self.samples), ("batch", self.batch)):
            if count is not None and count < 1:
                raise QuantizationError(f"{name} is {count}: at least one is needed")

    @property
    def kind(self) -> str:
        """What is made of the model: static, dynamic, int4 or int8 (weights only)."""
        return self.weights_only or ("dynamic" if self.dynamic else "static")

    def kept(self, node: NodeProto) -> bool:
        """Whether the node stays in float because the user says so."""
        return any(fnmatchcase(node.name, pattern) or node.op_type == pattern for pattern in self.keep)


@dataclass
class Summary:
    """What became of a model: how many nodes of each operator were quantised, and which were left in float and why."""

    kind: str
    quantised: dict[str, int] = field(default_factory=dict)
    left: list[tuple[str, str, str]] = field(default_factory=list)
    """(node, operator, reason)"""
    samples: int = 0
    tensors: int = 0
    corrected: int = 0
    smoothed: int = 0
    widened: int = 0
    """Inputs, outputs and constants of 16-bit floats, which the model computes with in f32 now."""
    bytes_before: int = 0
    bytes_after: int = 0

    def count(self, node: NodeProto) -> None:
        self.quantised[node.op_type] = self.quantised.get(node.op_type, 0) + 1

    def leave(self, node: NodeProto, reason: str) -> None:
        self.left.append((node.name, node.op_type, reason))

    def record(self) -> Mapping[str, Any]:
        """For JSON."""
        names = ("node", "operator", "reason")
        return {**vars(self), "left": [dict(zip(names, entry, strict=True)) for entry in self.left]}


__all__ = ["ACTIVATIONS", "METHODS", "WIDTHS", "Progress", "QuantizationError", "Settings", "Summary"]
