"""Products of dequantized tensors as products of integers: Conv, MatMul and Gemm with sums in i32.

With x = (x' - zx) * sx and w = (w' - zw) * sw the sum of products is sx * sw * sum((x' - zx) * (w' - zw)), where scales
do not differ along the axes that are summed (Jacob et al. 2018). The sum is exact; what follows, the scale, a real
bias, an activation, a quantization, are elementwise operators that fusion takes into the product's kernel. A bias that
is quantized with the product's scale is added to the sum. What does not fit is left as it is, with a remark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ..ir.dtypes import F32, I32
from ..ir.graph import Node, Value
from ..ir.ops import REGISTRY
from ..ir.ops.windows import sliding
from .quantized_values import Quantized, QuantizedRewriter, byte_type, is_real, trimmed

MOST_ONES = 25
"""Elements of a window from which on the average of bytes is no convolution: that has schedules for small windows."""
MOST_TIES = 1 / 2000
"""The share of sums that may lie between two steps of what they are quantized to."""


class Unfit(Exception):
    """Why a product stays one of reals; empty where nothing of it is quantized."""


class Products(QuantizedRewriter):
    """The sweep that forms products of integers."""

    def visit(self, node: Node) -> None:
        operator = REGISTRY.get(node.op)
        make = PRODUCTS.get(node.op, _other if operator is not None and operator.heavy else None)
        if make is None or len(node.outputs) != 1 or not is_real(node.output):
            self.add(node)
            return
        try:
            make(self, node)
        except Unfit as reason:
            remark = f"left in {node.output.dtype}: {reason}" if str(reason) else ""
            self.add(node if node.remark == remark else replace(node, remark=remark))

    # Operands.

    def factors(self, node: Node) -> tuple[Quantized, Quantized]:
        """The quantized operands of a product; Unfit where they are not, or not of 8 bits."""
        found = [self.quantized(value) for value in node.inputs[:2]]
        if found[0] is None and found[1] is None:
            raise Unfit("")
        for what, value, factor in zip(("first", "second"), node.inputs, found, strict=False):
            if factor is None:
                blocked = self.made_by(value, "DequantizeLinear") is not None
                raise Unfit(f"its {what} operand is " + ("quantized in blocks" if blocked else "not quantized"))
            if byte_type(factor.source.dtype) is None:
                raise Unfit(f"its {what} operand is quantized to {factor.source.dtype}, not to 8 bits")
            if not is_real(factor.node.output) or not is_real(factor.scale):
                raise Unfit(f"its {what} operand is dequantized by {factor.scale.dtype}")
        first, second = found
        assert first is not None and second is not None
        return first, second

    def as_bytes(self, factor: Quantized, origin: tuple[str, ...]) -> tuple[Value, Value | None]:
        """The integers of a factor, and its zero points, in 8 bits."""
        dtype = byte_type(factor.source.dtype)
        assert dtype is not None
        zero = factor.zero
        if zero is not None:
            zero = self.bytes_of(zero, dtype, origin)
            zero = self.scalar_of(zero, origin) if factor.axis is None else zero
        return self.bytes_of(factor.source, dtype, origin), zero

    # What follows the sum.

    def finished(
        self, node: Node, total: Value, scale: Value, bias: Value | None, axis: int, origin: tuple[str, ...]
    ) -> None:
        """Adds total * scale + bias as the node's result; `bias` lies along `axis`, or broadcasts where that is -1."""
        stem = node.output.name
        if bias is not None:
            integers = self.exact_bias(bias, scale, axis, total, origin)
            if integers is not None:
                total, bias = self.emit("Add", (total, integers), stem=f"{stem}.sum", origin=origin), None
        real = self.emit("Cast", (total,), {"to": F32}, stem=f"{stem}.real", origin=origin)
        if bias is None:
            self.emit("Mul", (real, scale), stem=stem, origin=origin, output=node.output)
            return
        scaled = self.emit("Mul", (real, scale), stem=f"{stem}.scaled", origin=origin)
        rank = node.output.tensor.rank
        row = bias if axis < 0 else self.along(bias, axis, rank, origin)
        self.emit("Add", (scaled, row), stem=stem, origin=origin, output=node.output)

    def exact_bias(self, bias: Value, scale: Value, axis: int, total: Value, origin: tuple[str, ...]) -> Value | None:
        """The integers of a bias that is quantized with the scale of the sums; None where it is not."""
        found, scales = self.quantized(bias), self.array(scale)
        if found is None or found.zero is not None or found.source.dtype != I32 or scales is None:
            return None
        own, rank = self.array(found.scale), total.tensor.rank
        if own is None or own.dtype != np.float32 or (found.axis is not None and found.axis != bias.tensor.rank - 1):
            return None
        if axis >= 0 and found.axis is not None:
            own = own.reshape(-1, *(1,) * (rank - 1 - axis))
        if axis < 0 and own.size > 1 and scales.ndim > 1:
            return None
        if not np.all(own == scales) or (own.size > 1 and own.size != scales.size and scales.size > 1):
            return None
        return found.source if axis < 0 else self.along(found.source, axis, rank, origin)


def _conv(sweep: Products, node: Node) -> None:
    """x [N, C, *spatial] with one scale, w [M, C/group, *kernel] with one for each filter at most."""
    x, w = sweep.factors(node)
    rank = node.output.tensor.rank
    if x.axis is not None:
        raise Unfit("the scale of its image differs along an axis")
    if w.axis not in (None, 0):
        raise Unfit("the scale of its weights differs along an axis that is summed")
    if not sweep.fits_sums(x, w, tuple(range(1, rank))):
        raise Unfit("its sums may not fit i32")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    origin = node.origin
    channels = rank - 1 if "layout" in node.attributes else 1
    (image, x_zero), (weights, w_zero) = sweep.as_bytes(x, origin), sweep.as_bytes(w, origin)
    total = sweep.emit(
        "ConvInteger", trimmed(image, weights, x_zero, w_zero), node.attributes, stem=f"{node.output.name}.sum",
        origin=origin,
    )  # fmt: skip
    scale = sweep.product(
        sweep.scalar_of(x.scale, origin),
        sweep.along(w.scale, None if w.axis is None else channels, rank, origin),
        origin,
    )
    sweep.finished(node, total, scale, bias, channels, origin)


def _product(
    sweep: Products,
    node: Node,
    bias: Value | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    flipped: tuple[bool, bool] = (False, False),
) -> None:
    """alpha * a @ b + beta * bias for a [..., M, K] and b [..., K, N], or matrices that are `flipped`; the scale of a
    may differ by row, that of b by column."""
    a, b = sweep.factors(node)
    ranks = a.source.tensor.rank, b.source.tensor.rank
    rows, summed, columns = ranks[0] - 2 + flipped[0], ranks[1] - 2 + flipped[1], ranks[1] - 1 - flipped[1]
    if min(ranks) < 2:
        raise Unfit("an operand is a vector")
    if a.axis not in (None, rows):
        raise Unfit("the scale of its first operand differs along an axis that is summed, or by matrix")
    if b.axis not in (None, columns):
        raise Unfit("the scale of its second operand differs along an axis that is summed, or by matrix")
    if not sweep.fits_sums(a, b, (summed,)):
        raise Unfit("its sums may not fit i32")
    origin = node.origin
    (left, a_zero), (right, b_zero) = sweep.as_bytes(a, origin), sweep.as_bytes(b, origin)
    left, right = (turned(sweep, x, origin) if flip else x for x, flip in zip((left, right), flipped, strict=True))
    total = sweep.emit(
        "MatMulInteger", trimmed(left, right, a_zero, b_zero), stem=f"{node.output.name}.sum", origin=origin
    )
    scale = sweep.product(
        sweep.along(a.scale, None if a.axis is None else 0, 2, origin),
        sweep.along(b.scale, None if b.axis is None else 0, 1, origin),
        origin,
    )
    if alpha != 1.0:
        scale = sweep.product(scale, sweep.constant(np.array(alpha, np.float32), "alpha", origin), origin)
    if bias is not None and beta != 1.0:
        factor = sweep.constant(np.array(beta, np.float32), "beta", origin)
        bias = sweep.emit("Mul", (bias, factor), stem=f"{bias.name}.beta", origin=origin)
    sweep.finished(node, total, scale, bias, -1, origin)


def _gemm(sweep: Products, node: Node) -> None:
    """alpha * a @ b + beta * c, either factor transposed."""
    alpha, beta = (node.attributes.get(name, 1.0) for name in ("alpha", "beta"))
    assert isinstance(alpha, float) and isinstance(beta, float)
    flipped = bool(node.attributes.get("transA", 0)), bool(node.attributes.get("transB", 0))
    _product(sweep, node, node.inputs[2] if len(node.inputs) > 2 else None, alpha, beta, flipped)


def turned(sweep: Products, matrix: Value, origin: tuple[str, ...]) -> Value:
    """A matrix transposed."""
    array, stem = sweep.array(matrix), f"{matrix.name}.turned"
    if array is not None:
        return sweep.constant(np.ascontiguousarray(array.T), stem, origin)
    return sweep.emit("Transpose", (matrix,), {"perm": (1, 0)}, stem=stem, origin=origin)


def _average(sweep: Products, node: Node) -> None:
    """The average of windows of a quantized image: their sum is a convolution, of each channel by itself, by ones."""
    x = sweep.quantized(node.inputs[0])
    if x is None or x.axis is not None or byte_type(x.source.dtype) != x.source.dtype or not is_real(x.scale):
        raise Unfit("")
    attributes, channels = dict(node.attributes), node.output.shape[1]
    kernel = attributes.pop("kernel_shape")
    counted, rounded_up = attributes.pop("count_include_pad", 0), attributes.pop("ceil_mode", 0)
    assert isinstance(kernel, tuple)
    extents = [extent for extent in kernel if isinstance(extent, int)]
    if rounded_up or "layout" in attributes or not isinstance(channels, int) or math.prod(extents) > MOST_ONES:
        raise Unfit("its windows are no small ones that all lie in the padded image")
    windows = sliding(node.operands[0].shape[2:], extents, **attributes)  # type: ignore[arg-type]
    if counted or not any(windows.padded):
        counts = np.full((), math.prod(extents), np.float32)
    else:
        counts = np.ones((1, 1), np.float32)
        for axis, (extent, results) in enumerate(zip(windows.input, windows.output, strict=True)):
            if not isinstance(extent, int) or not isinstance(results, int):
                raise Unfit("how much of its windows lies in the image is not known")
            first = np.arange(results) * windows.strides[axis] - windows.before[axis]  # type: ignore[operator]
            places = first[:, None] + np.arange(extents[axis]) * windows.dilations[axis]
            inside = np.count_nonzero((places >= 0) & (places < extent), axis=1)
            counts = counts[..., None] * inside.astype(np.float32)
    if _has_ties(sweep, node, x, counts):
        raise Unfit("averages often lie between two steps of its result, and which is taken the order of sums decides")
    origin, stem = node.origin, node.output.name
    ones = sweep.constant(np.ones((channels, 1, *extents), np.int8), f"{stem}.ones", origin)
    image, zero = sweep.as_bytes(x, origin)
    attributes |= {"group": channels, "kernel_shape": kernel}
    total = sweep.emit(
        "ConvInteger", trimmed(image, ones, zero), attributes, stem=f"{stem}.sum", origin=origin
    )  # fmt: skip
    shares = sweep.constant(np.float32(1) / counts, f"{stem}.share", origin)
    sweep.finished(node, total, sweep.product(shares, sweep.scalar_of(x.scale, origin), origin), None, 1, origin)


def _has_ties(sweep: Products, node: Node, x: Quantized, counts: np.ndarray) -> bool:
    """Whether a QuantizeLinear of averages of bytes finds many of them halfway between two steps, as it does where the
    scale stays the same: what rounding makes of the definition's sums of reals is then seen."""
    own = sweep.array(x.scale)
    for user in sweep.graph.users.get(node.output, ()):
        scale = sweep.array(user.inputs[1]) if user.op == "QuantizeLinear" else None
        if scale is None or own is None or scale.size != 1:
            continue
        for count in np.unique(counts):
            sums = np.arange(int(count) * 255 + 1) * (
                float(own.reshape(-1)[0]) / (float(count) * float(scale.reshape(-1)[0]))
            )
            if np.mean(np.abs(sums % 1 - 0.5) < 1e-4) > MOST_TIES:
                return True
    return False


def _other(sweep: Products, node: Node) -> None:
    quantized = any(sweep.made_by(value, "DequantizeLinear") for value in node.operands)
    raise Unfit(f"there is no {node.op} of integers" if quantized else "")


PRODUCTS: Mapping[str, Callable[[Products, Node], None]] = {
    "Conv": _conv,
    "MatMul": _product,
    "Gemm": _gemm,
    "AveragePool": _average,
}
"""Operators that are sums of products."""
