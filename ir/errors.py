"""The errors that users meet. Each message names the node, what was found and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class OnnxcError(Exception):
    """Base of all errors that onnxc raises on purpose."""


class ModelError(OnnxcError):
    """The model is broken: not ONNX, truncated, inconsistent, or it points outside its folder."""


class UnsupportedError(OnnxcError):
    """The model is valid but asks for what this compiler (or this target) cannot do."""


class ValueNeeded(UnsupportedError):
    """A value decides ranks or axes, and only the run tells it: compiling needs the value itself.

    `nodes` is the ONNX name of the node that needs it, where the importer met it.
    """

    nodes: tuple[str, ...] = ()


class HostNeeded(UnsupportedError):
    """Only Python can run a part of the model: text, sequences of unknown length, loops whose state changes its shape.

    `nodes` are the ONNX names of loops that can be compiled no other way, where that is the reason.
    """

    def __init__(self, message: str, nodes: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.nodes = tuple(nodes)


class LimitError(OnnxcError):
    """The model asks for more memory than it may have (`max_memory`), or for more nesting than the compiler follows."""


class ShapeError(OnnxcError):
    """An input or a dimension contradicts what the model declares or another dimension."""


class BroadcastError(ShapeError):
    """Two sizes differ that were taken for equal, and one of them is 1: other code would broadcast it."""


class IndexRangeError(ShapeError, IndexError):
    """An index that an operator is given lies outside the axis that it counts in, or a size that a run computes cannot
    be."""


class TargetError(OnnxcError):
    """The target is unknown, or what it needs is not installed."""


class DeviceError(OnnxcError):
    """A GPU could not do what a run asks: its memory does not suffice, or a kernel cannot be launched or has failed."""


class AccessError(OnnxcError):
    """A kernel that checks itself (ONNXC_CHECK_BOUNDS=1) was about to read or write outside of a buffer."""


class VerifierError(OnnxcError):
    """A graph breaks a rule of the graph language: a pass is at fault, or an edited text."""
