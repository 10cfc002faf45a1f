"""Strategies for operators that sum products, pool, normalise and quantise, and for recurrent ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fuzz.compare import is_float
from fuzz.graphs import DTYPES, FLOATS, Attributes, Builder, Rejected, Size, Value, admitted

Sample = tuple[list[Value | None], Attributes, int]
F32 = DTYPES["float"]
BYTES = (DTYPES["uint8"], DTYPES["int8"])


def product_shapes(b: Builder, x: Value) -> tuple[Size, ...]:
    """The shape of a right factor for `x`: of one axis, two, or as many as it has, its batch axes broadcast."""
    inner, columns = x.shape[-1], b.size(0, 17)
    if b.chance(15):
        return (inner,)
    batch = [s if b.chance(60) else (1,) * b.bindings for s in x.shape[:-2]] if b.chance(60) else []
    return (*batch, inner, columns)


def matmul(b: Builder, op: str) -> Sample:
    x = b.operand([d for d in admitted(op, "T") if d.kind != "V"], 1, 4)
    return [x, b.fresh(x.dtype, product_shapes(b, x))], {}, 1


def gemm(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 2, 2)
    turned, other = b.integer(0, 1), b.integer(0, 1)
    inner, rows = x.shape[0 if turned else 1], x.shape[1 if turned else 0]
    columns = b.size(1, 17)
    w = b.fresh(x.dtype, (columns, inner) if other else (inner, columns))
    c = b.like((rows, columns), x.dtype) if b.chance(60) else None
    if c is not None and (
        c.rank > 2 or any(set(s) != {1} and s != t for s, t in zip(c.shape[::-1], (columns, rows), strict=False))
    ):
        raise Rejected("C broadcasts to the product, not the product to C")
    found: Attributes = {"transA": turned, "transB": other}
    if b.chance(40):
        found |= {"alpha": b.choice((0.5, 2.0, -1.0)), "beta": b.choice((0.5, 2.0, 0.0))}
        if x.dtype.kind in "iu":
            found = {"transA": turned, "transB": other, "alpha": 2.0, "beta": 1.0}
    return [x, w, c], found, 1


EQUATIONS = ("ij,jk->ik", "bij,bjk->bik", "ij->ji", "ii->i", "ij->", "ij,ij->i", "i,j->ij", "bhqd,bhkd->bhqk",
             "...ij->...ji",              "ij,kj->ki", "bij,jk", "...i,...i->...", "ijk->kj",
             "ij,jk,kl->il")  # fmt: skip


def einsum(b: Builder, op: str) -> Sample:
    equation = b.choice(EQUATIONS)
    dtype = b.dtype([d for d in admitted(op, "T") if d.kind in "fi" and d.itemsize >= 4])
    sizes: dict[str, Size] = {}
    terms = [term.replace("...", "b") if "b" not in term else term for term in equation.split("->")[0].split(",")]
    return (
        [b.fresh(dtype, [sizes.setdefault(c, b.size(1, 7)) for c in term]) for term in terms],
        {"equation": equation},
        1,
    )


def window(b: Builder, sizes: Sequence[Size], kernel: Sequence[int], dilate: bool = True) -> Attributes:
    """Strides, dilations and pads under which a window fits at every binding."""
    spatial = len(kernel)
    dilations = [b.choice((1, 1, 2)) if dilate else 1 for _ in kernel]
    found: Attributes = {}
    if b.chance(25):
        found["auto_pad"] = b.choice(("SAME_UPPER", "SAME_LOWER", "VALID"))
    elif b.chance(60):
        found["pads"] = [b.integer(0, (k - 1) // 2 + 1) if k > 1 else 0 for k in kernel * 2]
    if b.chance(60):
        found["strides"] = [b.integer(1, 3) for _ in kernel]
    pads = found.get("pads", [0] * 2 * spatial)
    for a in range(spatial):
        if min(sizes[a]) + pads[a] + pads[a + spatial] < (kernel[a] - 1) * dilations[a] + 1:
            raise Rejected("the window is larger than the image")
    return found | ({"dilations": dilations} if dilate and any(d > 1 for d in dilations) else {})


def image(b: Builder, dtypes: Sequence[np.dtype[Any]]) -> Value:
    return b.operand(dtypes, 3, 5 if b.chance(15) else 4, smallest=1)


def conv(b: Builder, op: str) -> Sample:
    x = image(b, admitted(op, "T"))
    channels = x.shape[1]
    if len(set(channels)) > 1:
        raise Rejected("channels are fixed by the kernel")
    group = b.choice([g for g in (1, 1, 2, 3, channels[0]) if g and channels[0] % g == 0] or [1])
    kernel = [b.integer(1, 3) for _ in range(x.rank - 2)]
    outputs = group * b.integer(1, 5 if group == 1 else 2)
    found = window(b, x.shape[2:], kernel) | {"group": group, "kernel_shape": kernel}
    shape = (outputs, channels[0] // group, *kernel)
    if op == "ConvTranspose":
        shape = (channels[0], outputs // group, *kernel)
        found.pop("auto_pad", None)
        if b.chance(30):
            found["output_padding"] = [b.integer(0, s - 1) for s in found.get("strides", [1] * len(kernel))]
    bias = b.fresh(x.dtype, (outputs,)) if b.chance(60) else None
    return [x, b.fresh(x.dtype, shape, constant=70), bias], found, 1


def pool(b: Builder, op: str) -> Sample:
    """Without `ceil_mode`: the reference, ONNX Runtime and the text differ in the windows that begin in the padding."""
    x = image(b, [d for d in admitted(op, "T") if d.kind in "f" or op == "MaxPool"])
    kernel = [b.integer(1, 3) for _ in range(x.rank - 2)]
    found = window(b, x.shape[2:], kernel, dilate=op == "MaxPool") | {"kernel_shape": kernel}
    pads = found.get("pads")
    if pads:
        found["pads"] = [min(p, k - 1) for p, k in zip(pads, kernel * 2, strict=True)]
    if op == "AveragePool" and b.chance(50):
        found["count_include_pad"] = b.integer(0, 1)
    if op == "LpPool":
        found["p"] = b.integer(1, 3)
    return [x], found, b.integer(1, 2) if op == "MaxPool" and "dilations" not in found else 1


def max_unpool(b: Builder, op: str) -> Sample:
    x = b.operand(FLOATS[:1], 4, 4, smallest=1)
    kernel = 2
    arrays = []
    for k in range(b.bindings):
        n, c, h, w = x.arrays[k].shape
        rows, columns = np.arange(h) * kernel, np.arange(w) * kernel
        corner = rows[:, None] * (w * kernel) + columns
        plane = np.arange(n * c).reshape(n, c, 1, 1) * (h * w * kernel**2)
        arrays.append((plane + corner + b.random().integers(0, 2, (n, c, h, w))).astype(np.int64))
    return [x, b.add(arrays, b.chance(30))], {"kernel_shape": [kernel] * 2, "strides": [kernel] * 2}, 1


def col2im(b: Builder, op: str) -> Sample:
    height, width, kernel = b.integer(3, 6), b.integer(3, 6), b.integer(1, 3)
    blocks = (height - kernel + 1) * (width - kernel + 1)
    x = b.fresh(F32, (2, b.integer(1, 3) * kernel * kernel, blocks))
    return [x, b.numbers([height, width]), b.numbers([kernel, kernel])], {}, 1


def normalised(b: Builder, op: str) -> Sample:
    """LayerNormalization, RMSNormalization: scale and bias of the axes behind `axis`. Not of f64, which `stash_type`
    has rounded to f32 on the way, in an order that is open."""
    x = b.operand([d for d in FLOATS if d.itemsize < 8], 1, 4, smallest=1)
    axis = b.integer(-x.rank, x.rank - 1)
    tail = x.shape[axis % x.rank :]
    operands: list[Value | None] = [x, b.fresh(x.dtype, tail)]
    if op == "LayerNormalization" and b.chance(60):
        operands.append(b.fresh(x.dtype, tail))
    found: Attributes = {"axis": axis} | ({"epsilon": 1e-3} if b.chance(40) else {})
    return operands, found, b.integer(1, 3) if op == "LayerNormalization" else 1


def by_channel(b: Builder, op: str) -> Sample:
    """Batch, instance and group normalisation."""
    floats = [d for d in FLOATS if d.itemsize < 8 or op != "GroupNormalization"]  # as in `normalised`
    x = b.operand(floats, 3 if op != "BatchNormalization" else 2, 4, smallest=1)
    channel = (x.shape[1],)
    operands: list[Value | None] = [x, b.fresh(x.dtype, channel), b.fresh(x.dtype, channel)]
    found: Attributes = {"epsilon": b.choice((1e-5, 1e-3))}
    if op == "BatchNormalization":
        operands += [b.fresh(x.dtype, channel), b.fresh(x.dtype, channel, "positive")]
        if b.chance(15) and x.rank > 2:
            return operands, found | {"training_mode": 1, "momentum": 0.8}, 3
    if op == "GroupNormalization":
        found["num_groups"] = b.choice([g for g in (1, 2, 3) if all(c % g == 0 for c in x.shape[1])])
    return operands, found, 1


def quantize(b: Builder, op: str) -> Sample:
    """Per tensor, per axis, or in blocks."""
    reverse = op == "DequantizeLinear"
    kinds = [d for d in admitted(op, "T1" if reverse else "T3") if d.kind in "iu" or d.itemsize == 1]
    narrow = b.choice(kinds)
    wide = F32 if b.chance(70) else DTYPES["float16"]
    x = b.operand([narrow] if reverse else [wide], 1, 4, smallest=1)
    found: Attributes = {}
    shape: tuple[Any, ...] = ()
    if b.chance(50):
        found["axis"] = b.integer(-x.rank, x.rank - 1)
        shape = (x.shape[found["axis"]],)
        if b.chance(30) and len(set(shape[0])) == 1:
            block = b.choice((2, 3))
            shape = tuple(
                tuple(-(-n // block) for n in s) if a == found["axis"] % x.rank else s for a, s in enumerate(x.shape)
            )
            found["block_size"] = block
    scale = b.fresh(wide, shape, "positive", 70)
    zero = b.fresh(narrow, shape, "small" if narrow.kind in "iu" and narrow != DTYPES["int32"] else "zero", 70)
    if is_float(np.zeros((), narrow)) or narrow == DTYPES["int32"]:
        zero = b.add([np.zeros(a.shape, narrow) for a in scale.arrays], True)
    keep_zero = b.chance(80) or (not reverse and narrow != DTYPES["uint8"])
    return [x, scale, zero if keep_zero else None], found, 1


def dynamic_quantize(b: Builder, op: str) -> Sample:
    return [b.operand([F32], 1, 4, smallest=1)], {}, 3


def matmul_integer(b: Builder, op: str) -> Sample:
    x = b.operand(BYTES, 2, 4, smallest=1)
    w = b.fresh(b.choice(BYTES), product_shapes(b, x)[-2:], constant=70)
    return [x, w, b.fresh(x.dtype, ()) if b.chance(60) else None, b.fresh(w.dtype, ()) if b.chance(60) else None], {}, 1


def scale(b: Builder) -> Value:
    return b.numbers(b.choice((0.0625, 0.5, 0.02, 1.0)), np.float32)


def qlinear_matmul(b: Builder, op: str) -> Sample:
    x = b.operand(BYTES, 2, 3, smallest=1)
    w = b.fresh(b.choice(BYTES), (x.shape[-1], b.size(1, 17)), constant=70)
    y = b.choice(BYTES)
    return [x, scale(b), b.fresh(x.dtype, ()), w, scale(b), b.fresh(w.dtype, ()), scale(b), b.fresh(y, ())], {}, 1


def integer_conv(b: Builder, op: str) -> Sample:
    x = b.operand(BYTES[:1] if op == "ConvInteger" else BYTES, 4, 4, smallest=1)
    channels = x.shape[1]
    if len(set(channels)) > 1:
        raise Rejected("channels are fixed by the kernel")
    kernel = [b.integer(1, 3), b.integer(1, 3)]
    found = window(b, x.shape[2:], kernel)
    if found.get("auto_pad", "").startswith("SAME"):
        found.pop("auto_pad")
    outputs = b.integer(1, 5)
    w = b.fresh(BYTES[0] if op == "ConvInteger" else b.choice(BYTES), (outputs, channels[0], *kernel), constant=70)
    if op == "ConvInteger":
        return [x, w, b.fresh(x.dtype, ()), b.fresh(w.dtype, ()) if b.chance(50) else None], found, 1
    bias = b.fresh(DTYPES["int32"], (outputs,)) if b.chance(50) else None
    y = b.fresh(x.dtype, ())
    return [x, scale(b), b.fresh(x.dtype, ()), w, scale(b), b.fresh(w.dtype, ()), scale(b), y, bias], found, 1


def recurrent(b: Builder, op: str) -> Sample:
    """All directions and optional operands; layout 0, which ONNX Runtime has too. The reference does not heed the
    lengths of sequences, and ONNX Runtime has f32 only."""
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[op]
    direction = b.choice(("forward", "reverse", "bidirectional"))
    count = 2 if direction == "bidirectional" else 1
    dtype = F32 if b.chance(80) else DTYPES["double"]
    x = b.operand([dtype], 3, 3, smallest=1)
    hidden, batch = b.integer(1, 5), x.shape[1]
    operands: list[Value | None] = [
        x,
        b.fresh(dtype, (count, gates * hidden, x.shape[2]), "unit", 70),
        b.fresh(dtype, (count, gates * hidden, hidden), "unit", 70),
        b.fresh(dtype, (count, 2 * gates * hidden)) if b.chance(60) else None,
    ]
    lengths = [b.random().integers(1, x.shape[0][k] + 1, batch[k]).astype(np.int32) for k in range(b.bindings)]
    operands.append(b.add(lengths, b.chance(30)) if b.chance(30) and dtype == F32 else None)
    operands.append(b.fresh(dtype, (count, batch, hidden)) if b.chance(50) else None)
    found: Attributes = {"hidden_size": hidden, "direction": direction}
    if op == "LSTM":
        operands.append(b.fresh(dtype, (count, batch, hidden)) if b.chance(50) else None)
        operands.append(b.fresh(dtype, (count, 3 * hidden)) if b.chance(30) else None)
    if op == "GRU":
        found["linear_before_reset"] = b.integer(0, 1)
    return operands, found, b.integer(1, 3 if op == "LSTM" else 2)


def det(b: Builder, op: str) -> Sample:
    size = b.size(1, 5)
    return [b.fresh(b.choice(FLOATS[:2]), (*b.shape(0, 2, 1), size, size))], {}, 1


def fourier(b: Builder, op: str) -> Sample:
    x = b.fresh(F32, (*b.shape(1, 2, 1), b.size(1, 17), b.choice((1, 1, 2))))
    axis = b.integer(0, x.rank - 2) - (x.rank if b.chance(30) else 0)
    real = x.shape[-1][0] == 1
    found: Attributes = {"inverse": 0, "onesided": 1} if real and b.chance(40) else {"inverse": b.integer(0, 1)}
    length = b.numbers(b.integer(1, 12)) if b.chance(30) else None
    return [x, length, b.numbers(axis)], found, 1


def stft(b: Builder, op: str) -> Sample:
    frame = b.integer(2, 8)
    x = b.fresh(F32, (b.size(1, 3), b.size(9, 20), 1))
    window_of = b.fresh(F32, (frame,), "unit") if b.chance(60) else None
    return [x, b.numbers(b.integer(1, 4)), window_of, b.numbers(frame)], {"onesided": b.integer(0, 1)}, 1


def loss(b: Builder, op: str) -> Sample:
    classes = b.integer(2, 5)
    rest = b.shape(0, 2, 1)
    x = b.fresh(F32, (b.size(1, 5), classes, *rest))
    labels = [b.random().integers(0, classes, (a.shape[0], *a.shape[2:])) for a in x.arrays]
    weights = b.fresh(F32, (classes,), "positive") if b.chance(50) else None
    found: Attributes = {"reduction": b.choice(("none", "mean", "sum"))}
    if b.chance(30):
        found["ignore_index"] = b.integer(0, classes - 1)
    return [x, b.add(labels, b.chance(30)), weights], found, 1


def rotary(b: Builder, op: str) -> Sample:
    batch, heads, length, size = b.size(1, 3), b.integer(1, 3), b.size(1, 7), b.choice((2, 4, 8))
    table = (b.fresh(F32, (9, size // 2)) for _ in range(2))
    positions = [b.random().integers(0, 9, (batch[k], length[k])) for k in range(b.bindings)]
    found: Attributes = {"interleaved": b.integer(0, 1)}
    return [b.fresh(F32, (batch, heads, length, size)), *table, b.add(positions)], found, 1


def attention(b: Builder, op: str) -> Sample:
    batch, heads, groups = b.size(1, 3), b.choice((1, 2, 4)), b.choice((1, 2))
    query, key, size, depth = b.size(1, 7), b.size(1, 9), b.choice((1, 4, 8)), b.choice((3, 8))
    shared = heads // groups if heads % groups == 0 else heads
    operands: list[Value | None] = [
        b.fresh(F32, (batch, heads, query, size)),
        b.fresh(F32, (batch, shared, key, size)),
        b.fresh(F32, (batch, shared, key, depth)),
    ]
    found: Attributes = {}
    if b.chance(40):
        operands.append(b.fresh(b.choice((F32, DTYPES["bool"])), (query, key)))
    if b.chance(30):
        found["is_causal"] = 1
    if b.chance(30):
        found |= {"scale": 0.3, "softcap": b.choice((0.0, 2.0))}
    return operands, found, 1


SAMPLERS: dict[str, Callable[[Builder, str], Sample]] = {
    "MatMul": matmul, "Gemm": gemm, "Einsum": einsum, "Conv": conv, "ConvTranspose": conv, "MaxPool": pool,
    "AveragePool": pool, "LpPool": pool, "MaxUnpool": max_unpool, "Col2Im": col2im, "LayerNormalization": normalised,
    "RMSNormalization": normalised, "BatchNormalization": by_channel, "InstanceNormalization": by_channel,
    "GroupNormalization": by_channel, "QuantizeLinear": quantize, "DequantizeLinear": quantize,
    "DynamicQuantizeLinear": dynamic_quantize, "MatMulInteger": matmul_integer, "QLinearMatMul": qlinear_matmul,
    "ConvInteger": integer_conv, "QLinearConv": integer_conv, "RNN": recurrent, "GRU": recurrent, "LSTM": recurrent,
    "Det": det, "DFT": fourier, "STFT": stft, "NegativeLogLikelihoodLoss": loss, "SoftmaxCrossEntropyLoss": loss,
    "RotaryEmbedding": rotary, "Attention": attention,
}  # fmt: skip
