"""Element types: one table of all that ONNX knows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class DType:
    """An element type: its short name, ONNX's number for it, its width in bits and its kind.

    `kind` is one of "float", "int", "uint", "bool", "complex", "string".
    """

    name: str
    onnx: int
    bits: int
    kind: str

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.name

    @property
    def bytes(self) -> int:
        """Bytes of one element in a buffer; narrower elements than a byte take one each."""
        return (self.bits + 7) // 8

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")

    @property
    def is_narrow(self) -> bool:
        """Whether kernels hold elements as their bits in a byte: floats of 8 bits or less, integers of less than 8."""
        return self.bits < 8 or (self.bits == 8 and self.is_float)

    @property
    def part(self) -> DType:
        """The type of the real and the imaginary part of a complex number; the type itself where it is not complex."""
        return self if self.kind != "complex" else F32 if self.bits == 64 else F64

    @cached_property
    def numpy(self) -> np.dtype[np.generic]:
        """The numpy (or ml_dtypes) type that holds one element."""
        found: np.dtype[np.generic] = np.dtype(_NUMPY[self.name])
        return found

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The least and the greatest finite value."""
        if self.kind == "bool":
            return 0, 1
        if self.is_integer:
            half = 1 << (self.bits - 1)
            return (-half, half - 1) if self.kind == "int" else (0, 2 * half - 1)
        info = ml_dtypes.finfo(self.numpy)  # type: ignore[no-untyped-call]
        return float(info.min), float(info.max)


_NUMPY: dict[str, Any] = {
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": ml_dtypes.bfloat16,
    "f8e4m3fn": ml_dtypes.float8_e4m3fn, "f8e4m3fnuz": ml_dtypes.float8_e4m3fnuz, "f8e5m2": ml_dtypes.float8_e5m2,
    "f8e5m2fnuz": ml_dtypes.float8_e5m2fnuz, "f8e8m0": ml_dtypes.float8_e8m0fnu, "f4e2m1": ml_dtypes.float4_e2m1fn,
    "f6e2m3": ml_dtypes.float6_e2m3fn, "f6e3m2": ml_dtypes.float6_e3m2fn, "i2": ml_dtypes.int2,
    "u2": ml_dtypes.uint2, "i4": ml_dtypes.int4, "u4": ml_dtypes.uint4,
    "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "bool": np.bool_, "c64": np.complex64, "c128": np.complex128, "string": np.object_,
}  # fmt: skip

F32, U8 = DType("f32", 1, 32, "float"), DType("u8", 2, 8, "uint")
I8, U16 = DType("i8", 3, 8, "int"), DType("u16", 4, 16, "uint")
I16, I32, I64 = DType("i16", 5, 16, "int"), DType("i32", 6, 32, "int"), DType("i64", 7, 64, "int")
STRING, BOOL, F16 = DType("string", 8, 64, "string"), DType("bool", 9, 8, "bool"), DType("f16", 10, 16, "float")
F64, U32, U64 = DType("f64", 11, 64, "float"), DType("u32", 12, 32, "uint"), DType("u64", 13, 64, "uint")
C64, C128, BF16 = DType("c64", 14, 64, "complex"), DType("c128", 15, 128, "complex"), DType("bf16", 16, 16, "float")

ALL: tuple[DType, ...] = (
    F32, U8, I8, U16, I16, I32, I64, STRING, BOOL, F16, F64, U32, U64, C64, C128, BF16,
    DType("f8e4m3fn", 17, 8, "float"), DType("f8e4m3fnuz", 18, 8, "float"),
    DType("f8e5m2", 19, 8, "float"), DType("f8e5m2fnuz", 20, 8, "float"),
    DType("u4", 21, 4, "uint"), DType("i4", 22, 4, "int"), DType("f4e2m1", 23, 4, "float"),
    DType("f8e8m0", 24, 8, "float"), DType("u2", 25, 2, "uint"), DType("i2", 26, 2, "int"),
    DType("f6e2m3", 27, 6, "float"), DType("f6e3m2", 28, 6, "float"),
)  # fmt: skip
BY_NAME = {dtype.name: dtype for dtype in ALL}
BY_ONNX = {dtype.onnx: dtype for dtype in ALL}
_BY_NUMPY = {np.dtype(_NUMPY[dtype.name]): dtype for dtype in ALL}


def of_numpy(dtype: np.dtype[np.generic]) -> DType:
    """The element type that a numpy array has; any text is a string. TypeError for what ONNX does not know."""
    if dtype.kind in "USOT":
        return STRING
    found = _BY_NUMPY.get(dtype.newbyteorder("="))
    if found is None:
        raise TypeError(f"ONNX has no element type for numpy's {dtype}")
    return found
