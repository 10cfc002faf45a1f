"""How each operator is drawn: by its declaration and schema, or by an entry of the one table `SAMPLERS`.

An operator without an entry is drawn by `by_schema`: its operands have the types of the schema and shapes that
broadcast (where the operator is declared pointwise) or are equal; its attributes are drawn by
their names (`ATTRIBUTES`). What
ONNX leaves undefined is kept out by `DEFINED`; `NOT_DRAWN` says why a declared operator is not drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from fuzz.contractions import SAMPLERS as CONTRACTIONS
from fuzz.control import SAMPLERS as CONTROL
from fuzz.graphs import DTYPES, FLOATS, Attributes, Builder, Rejected, Value, admitted, schema_of
from fuzz.movements import SAMPLERS as MOVEMENTS
from onnx import helper
from onnxc.ir.ops import REGISTRY

Array = np.ndarray
Operands = list[Array | None]

NUMBERS = (0.0, 1.0, 0.5, -0.5, 2.0, 0.1, -1.5)
NAMED_TYPES = ("to", "dtype", "output_dtype")


def axis(b: Builder, rank: int) -> int:
    if rank == 0:
        raise Rejected("no axis")
    return b.integer(-rank, rank - 1)


ATTRIBUTES: dict[str, Callable[[Builder, Value], Any]] = {
    "axis": lambda b, x: axis(b, x.rank),
    "axes": lambda b, x: sorted({b.integer(0, x.rank - 1) for _ in range(b.integer(1, x.rank))}) if x.rank else [],
    "batch_dims": lambda b, x: 0,
    "approximate": lambda b, x: b.choice(("none", "tanh")),
    "direction": lambda b, x: b.choice(("LEFT", "RIGHT")),
    "to": lambda b, x: helper.np_dtype_to_tensor_dtype(b.choice(tuple(DTYPES.values()))),
    "dtype": lambda b, x: helper.np_dtype_to_tensor_dtype(b.choice((*FLOATS, DTYPES["int64"], DTYPES["bool"]))),
    "k": lambda b, x: b.integer(-3, 3),
    "p": lambda b, x: b.integer(1, 2),
    "epsilon": lambda b, x: b.choice((1e-5, 1e-3, 0.1)),
    "size": lambda b, x: b.choice((1, 3, 5)),
    "stash_type": lambda b, x: 1,
    "round_mode": lambda b, x: "up",
    "start": lambda b, x: b.integer(-x.rank - 1, x.rank + 1),
    "end": lambda b, x: b.integer(-x.rank - 1, x.rank + 1),
    "training_mode": lambda b, x: 0,
    "seed": lambda b, x: 1,
    "num_groups": lambda b, x: b.choice([n for n in (1, 2, 3) if all(c % n == 0 for c in x.shape[1])] or [1]),
    "reduction": lambda b, x: b.choice(("none", "mean", "sum")),
}
"""The values of an attribute, for operand 0; a number or a flag otherwise, by its type."""


def attributes(b: Builder, op: str, first: Value, *without: str) -> Attributes:
    """Attributes of the operator by their names; optional ones are absent in half of the cases."""
    found: Attributes = {}
    for name, attribute in sorted(schema_of(op).attributes.items()):
        if name in without or not (attribute.required or b.chance(50)):
            continue
        if name in ATTRIBUTES:
            found[name] = ATTRIBUTES[name](b, first)
        elif attribute.type == onnx.defs.OpSchema.AttrType.FLOAT:
            found[name] = b.choice(NUMBERS)
        elif attribute.type == onnx.defs.OpSchema.AttrType.INT:
            found[name] = b.integer(0, 1)
        elif attribute.required:
            raise Rejected(f"no strategy for the attribute {name!r}")
    return found


def by_schema(b: Builder, op: str) -> tuple[list[Value | None], Attributes, int]:
    """Operands, attributes and the number of outputs of a node, by its schema."""
    schema = schema_of(op)
    pointwise = (op in REGISTRY and REGISTRY[op].pointwise) or (
        len(schema.inputs) and schema.inputs[-1].option.name == "Variadic"
    )
    types: dict[str, np.dtype[Any]] = {}
    operands: list[Value | None] = []

    def operand(kind: str) -> Value:
        present = [value for value in operands if value is not None]
        if not present:
            value = b.operand(admitted(op, kind))
        elif pointwise:
            shape = max((value.shape for value in present), key=len)
            value = b.like(shape, types[kind] if kind in types else b.dtype(admitted(op, kind)))
        else:
            value = b.fresh(types[kind] if kind in types else b.dtype(admitted(op, kind)), present[0].shape)
        types.setdefault(kind, value.dtype)
        return value

    for parameter in schema.inputs:
        if parameter.option.name == "Optional" and b.chance(50):
            operands.append(None)
            continue
        count = b.integer(1, 4) if parameter.option.name == "Variadic" else 1
        operands += [operand(parameter.type_str) for _ in range(count)]
    if not operands or operands[0] is None:
        raise Rejected("no operand")
    return operands, attributes(b, op, operands[0]), 1


def scalar_bounds(b: Builder, op: str) -> tuple[list[Value | None], Attributes, int]:
    """Clip: bounds are scalars."""
    x = b.operand(admitted(op, "T"))
    return [x, *(b.fresh(x.dtype, ()) if b.chance(70) else None for _ in range(2))], {}, 1


def second_scalar(b: Builder, op: str) -> tuple[list[Value | None], Attributes, int]:
    """CumSum, CumProd: the axis is an operand."""
    x = b.operand(admitted(op, "T"), 1)
    return [x, b.numbers(axis(b, x.rank), b.choice((np.int32, np.int64)))], attributes(b, op, x), 1


def reduction(b: Builder, op: str) -> tuple[list[Value | None], Attributes, int]:
    """Reduce*: axes by an operand, in any order, negative too, none, or absent."""
    x = b.operand(admitted(op, "T"))
    chosen = [a - x.rank if b.chance(30) else a for a in range(x.rank) if b.chance(50)]
    axes = b.numbers(chosen[::-1] if b.chance(30) else chosen) if b.chance(80) else None
    return [x, axes], attributes(b, op, x), 1


def ranked(low: int, high: int = 6) -> Callable[[Builder, str], tuple[list[Value | None], Attributes, int]]:
    """Operators of one operand, of `low` to `high` axes."""

    def sample(b: Builder, op: str) -> tuple[list[Value | None], Attributes, int]:
        x = b.operand(admitted(op, schema_of(op).inputs[0].type_str), low, high)
        return [x], attributes(b, op, x), 1

    return sample


def sized_scalar(b: Builder, op: str) -> tuple[list[Value | None], Attributes, int]:
    """Window functions: the size is a scalar."""
    return [b.numbers(b.integer(0, 9), b.choice((np.int32, np.int64)))], {"periodic": b.integer(0, 1)}, 1


SAMPLERS: dict[str, Callable[[Builder, str], tuple[list[Value | None], Attributes, int]]] = {
    "Clip": scalar_bounds, "CumSum": second_scalar, "CumProd": second_scalar,
    "Flatten": ranked(0), "Softmax": ranked(1), "LogSoftmax": ranked(1), "Hardmax": ranked(1),
    "LpNormalization": ranked(1),
    "ArgMax": ranked(1), "ArgMin": ranked(1), "LRN": ranked(4, 4), "EyeLike": ranked(2, 2), "Trilu": ranked(2),
    "GlobalAveragePool": ranked(3, 5), "GlobalMaxPool": ranked(3, 5),
    "MeanVarianceNormalization": ranked(4, 4),
    **dict.fromkeys(("HannWindow", "HammingWindow", "BlackmanWindow"), sized_scalar),
    **{op: reduction for op in REGISTRY if op.startswith("Reduce")},
    **MOVEMENTS, **CONTRACTIONS, **CONTROL,
}  # fmt: skip

NOT_DRAWN = {
    "Dims": "the compiler's own: what Shape becomes",
    **dict.fromkeys(
        ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"),
        "its result is defined by its distribution only",
    ),
    "Dropout": "drawn without training; what it draws in training is defined by its distribution only",
    **dict.fromkeys(
        ("GlobalLpPool", "MaxRoiPool"),
        "neither ONNX's reference nor ONNX Runtime has it: see tests/admitted_types.py",
    ),
    "MelWeightMatrix": "its operands decide the shape by a rule of their own: see tests/backends/test_fourier.py",
    "DeformConv": "the reference loops over each element in Python; its cases are in the conformance suite",
    "NonMaxSuppression": "ties and thresholds of rounded overlaps: see tests/backends/test_detection.py",
}
"""Declared operators that are not drawn, each with the reason."""

DOMAINS = {
    "onnxc": "the compiler's own: no model has it",
    "com.microsoft": "no schema in the onnx package: compared with ONNX Runtime, see tests/ir/test_ops_random.py",
    "ai.onnx.ml": "their attributes are whole models: see the tests of ai.onnx.ml",
    "ai.onnx.preview.training": "the reference of optimizers is compared in tests of their own",
}
"""The same for all operators of a domain."""


def reason(op: str) -> str:
    """Why a declared operator is not drawn; "" for one that is."""
    return NOT_DRAWN.get(op) or ("" if op in SAMPLERS else DOMAINS.get(op.rpartition(".")[0], ""))


def no_nan(operands: Operands, _: Mapping[str, Any]) -> bool:
    """An order of elements is not defined for NaN."""
    return not any(o is not None and o.dtype.kind in "fcV" and np.isnan(o).any() for o in operands)


def divisible(operands: Operands, _: Mapping[str, Any]) -> bool:
    """Integers are not divided by 0, nor the lowest one by -1."""
    a, b = (o for o in operands if o is not None)
    if a.dtype.kind not in "iu":
        return True
    overflow = (
        a.dtype.kind == "i" and np.any(np.equal(a, np.iinfo(a.dtype).min) & np.equal(b, -1))
        if a.size and b.size
        else False
    )
    return not np.any(b == 0) and not overflow


def remainder_defined(operands: Operands, attributes: Mapping[str, Any]) -> bool:
    """As a division; the remainder of floats by 0 or of infinity is NaN in C's `fmod`."""
    return divisible(operands, attributes) and (attributes.get("fmod", 0) == 1) == (operands[0].dtype.kind in "fV")  # type: ignore[union-attr]


def power_defined(operands: Operands, _: Mapping[str, Any]) -> bool:
    """Integers have no negative powers, and none that do not fit the type; a float power is not cast out of range."""
    a, b = (o for o in operands if o is not None)
    if a.dtype.kind not in "iu":
        return True
    with np.errstate(all="ignore"):
        wide = np.power(a.astype(np.float64), b.astype(np.float64))
    return bool(np.all(np.abs(wide) < min(2.0**53, np.iinfo(a.dtype).max))) and not np.any(b.astype(np.float64) < 0)


def shift_defined(operands: Operands, _: Mapping[str, Any]) -> bool:
    """By less than the type has bits."""
    a, b = (o for o in operands if o is not None)
    return not np.any(b >= a.dtype.itemsize * 8)


def cast_defined(operands: Operands, attributes: Mapping[str, Any]) -> bool:
    """A float is cast to integers where its whole part fits; integers wrap."""
    x = operands[0]
    to = helper.tensor_dtype_to_np_dtype(attributes["to"]) if "to" in attributes else operands[1].dtype  # type: ignore[union-attr]
    assert x is not None
    narrow = to in (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2)
    if not (to.kind in "iu" or narrow) or to.kind == "b":
        return x.dtype.kind != "c" and to.kind != "c"
    if x.dtype.kind == "c":
        return False
    limits = ml_dtypes.iinfo(to)
    wide = np.trunc(x.astype(np.float64))
    if x.dtype.kind in "iub" and not narrow:
        return True
    top = float(limits.max) if limits.bits < 53 else float(limits.max) * (1 - 2**-50)
    return bool(np.all(np.isfinite(wide) & (wide >= float(limits.min)) & (wide <= top)))


def by_both(operands: Operands, _: Mapping[str, Any]) -> bool:
    """The reference sums elements where it should their magnitudes; ONNX Runtime has f32 and f64 only."""
    return all(operand is None or operand.dtype in (np.float32, np.float64) for operand in operands)


def alpha_divides(operands: Operands, attributes: Mapping[str, Any]) -> bool:
    """x / alpha."""
    return attributes.get("alpha", 1.0) != 0.0


def finite(operands: Operands, _: Mapping[str, Any]) -> bool:
    return all(operand is None or operand.dtype.kind != "f" or bool(np.isfinite(operand).all()) for operand in operands)


def enough_images(operands: Operands, attributes: Mapping[str, Any]) -> bool:
    """The reference walks over the batch where it should over the channels; roots are of positive numbers."""
    (x,) = (operand for operand in operands if operand is not None)
    return bool(x.ndim > 1 and x.shape[0] == x.shape[1]) and attributes.get("alpha", 0.0) >= 0


def exact_in_floats(operands: Operands, _: Mapping[str, Any]) -> bool:
    """Integers whose products and sums the reference, which multiplies by factors of f64, holds exactly."""
    numbers = [operand for operand in operands if operand is not None and operand.dtype.kind in "iu"]
    return all(bool((np.abs(operand.astype(np.float64)) < 2**12).all()) for operand in numbers)


def no_floats(operands: Operands, _: Mapping[str, Any]) -> bool:
    """What is equal or not hangs on the last bit of floats that others compute."""
    return all(operand is None or operand.dtype.kind in "iub" for operand in operands)


DEFINED: dict[str, Callable[[Operands, Mapping[str, Any]], bool]] = {
    "Div": divisible, "Mod": remainder_defined, "Pow": power_defined, "BitShift": shift_defined, "Cast": cast_defined,
    "CastLike": cast_defined, "Celu": alpha_divides, "LpNormalization": by_both,
    **dict.fromkeys(
        ("TopK", "ArgMax", "ArgMin", "Hardmax", "MaxPool", "ReduceMax", "ReduceMin", "Max", "Min", "Clip",
         "GlobalMaxPool", "Sign", "BitCast", "ScatterElements", "ScatterND", "Resize", "GridSample", "RoiAlign",
         "NonZero", "QuantizeLinear", "RNN", "GRU", "LSTM", "ThresholdedRelu", "Shrink"),
        no_nan,
    ),
    **dict.fromkeys(("DynamicQuantizeLinear", "PRelu", "ConvTranspose"), finite),
    **dict.fromkeys(("Gemm", "ReduceMean", "ReduceL2"), exact_in_floats),
    "LRN": enough_images, "Unique": no_floats,
}  # fmt: skip
"""What ONNX leaves undefined, by operator: a node for which it says False is not taken."""

DRAWN = (
    *sorted(op for op in REGISTRY if not reason(op)),
    "HannWindow", "HammingWindow", "BlackmanWindow", "RotaryEmbedding", "Attention", "NegativeLogLikelihoodLoss",
    "SoftmaxCrossEntropyLoss",
)  # fmt: skip
"""Declared operators, and those that are expanded by ONNX's own function bodies."""


def add_node(b: Builder, op: str) -> list[Value]:
    """Draws a node of this operator. Raises Rejected where what was drawn is none."""
    operands, attributes, outputs = SAMPLERS.get(op, by_schema)(b, op)
    return b.node(op, operands, attributes, outputs, DEFINED.get(op))
