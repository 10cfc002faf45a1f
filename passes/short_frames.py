"""Fourier transforms of short frames as convolutions.

Vocoders (HiFT, iSTFTNet) take transforms of 16 or 20 samples. By the matrix of the transform, times the window, that is
a convolution of one channel, in fewer instructions than the stages of a fast transform take at such lengths. And where
a signal is constant, the cancelling sums of a fast transform give 0 for both parts of a number, whose phase, as models
compute it by a division, would be NaN; a plain sum keeps its rounding, as it does in every engine that the models were
tried on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..ir.graph import Graph, Node
from .pipeline import Pass, register
from .rewriting import Rewriter

LONGEST = 32
"""Samples of a frame. A product takes length / lanes multiplications for a number, a fast transform some
2.5 log2(length) operations / lanes, and as many loads and stores again."""


@register
@dataclass(frozen=True)
class ShortFrames(Pass):
    """STFT of short windowed frames of a real signal => Conv with the matrix of the transform."""

    name = "short-frames"

    def run(self, graph: Graph) -> Graph:
        return _Sweep(graph).run()


class _Sweep(Rewriter):
    def visit(self, node: Node) -> None:
        if node.op != "STFT" or not self.convolved(node):
            self.add(node)

    def convolved(self, node: Node) -> bool:
        """Adds the convolution in place of the node; whether it could."""
        signal, _, window, *_ = (*node.inputs, None, None)
        assert signal is not None
        stride, points, shown = self.told(node, 1, "frame_step"), self.told(node, 3, "frame_length"), self.array(window)
        if (window is not None and shown is None) or stride is None or signal.shape[2:] not in ((), (1,)):
            return False
        length = shown.size if shown is not None else points
        given = node.attributes.get("frame_length") or (len(node.inputs) > 3 and node.inputs[3])
        if length is None or not 2 <= length <= LONGEST or (given and points != length):
            return False  # a length that only the run tells is the size of an axis, too
        matrix = frequencies(length, bool(node.attributes.get("onesided", 1)))
        if shown is not None:
            matrix = matrix * shown.astype(np.float64).reshape(-1)
        batch, samples = signal.shape[:2]
        bins, name, origin = len(matrix), node.output.name, node.origin
        weights = matrix.reshape(2 * bins, 1, length).astype(signal.dtype.numpy)
        filters = self.constant(weights, f"{name}.matrix", origin)
        plane = self.emit("Reshape", (signal,), {"shape": (batch, 1, samples)}, stem=f"{name}.signal", origin=origin)
        attributes = {"strides": (stride,), "kernel_shape": (length,)}
        parts = self.emit("Conv", (plane, filters), attributes, stem=f"{name}.parts", origin=origin)
        frames = self.emit("Transpose", (parts,), {"perm": (0, 2, 1)}, stem=f"{name}.frames", origin=origin)
        shape = (*node.output.shape[:3], 2)
        self.emit("Reshape", (frames,), {"shape": shape}, stem="", origin=origin, output=node.output)
        return True

    def told(self, node: Node, number: int, name: str) -> int | None:
        """A size that is an operand, or an attribute by now; None where it is not known."""
        sizes = node.attributes.get(name)
        if isinstance(sizes, tuple):
            return sizes[0] if isinstance(sizes[0], int) else None
        value = self.scalar(node.inputs[number]) if number < len(node.inputs) else None
        return None if value is None else int(value)


def frequencies(length: int, onesided: bool) -> np.ndarray:
    """The transform's matrix [frequencies, real and imaginary, length], f64."""
    turns = np.outer(np.arange(length // 2 + 1 if onesided else length), np.arange(length)) / length
    return np.stack((np.cos(2 * np.pi * turns), -np.sin(2 * np.pi * turns)), 1)
