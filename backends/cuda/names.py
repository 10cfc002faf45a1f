"""How CUDA C spells types, literals and names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from ...ir import scalars as s
from ...ir.dtypes import BF16, BOOL, F16, F32, F64, I64, DType
from ...ir.errors import UnsupportedError
from ...ir.program import MARK

HALF = (F16, BF16)
MEMORY_TYPES: Mapping[str, str] = {
    "f32": "float", "f64": "double", "f16": "f16", "bf16": "bf16", "bool": "u8",
    "i8": "i8", "i16": "i16", "i32": "i32", "i64": "i64", "u8": "u8", "u16": "u16", "u32": "u32", "u64": "u64",
}  # fmt: skip
"""The prelude's name of each element type as memory holds it."""
_TAKEN = """
    alignas alignof and asm auto bool break case catch char class const constexpr continue decltype default delete do
    double else enum explicit export extern false float for friend goto if inline int long mutable namespace new not
    operator or private protected public register return short signed sizeof static struct switch template this throw
    true try typedef typeid typename union unsigned using virtual void volatile while xor
    shared barrier minimum maximum sigmoid power popcount ballot shuffle threadIdx blockIdx Pack u8 u16 u32 u64 i8 i16
    i32 i64 f16 bf16 exp log sin cos tan abs min max floor ceil round rint trunc sqrt erf pow fma
"""
"""Words that mean something in C or in the prelude."""


def memory_type(dtype: DType) -> str:
    """The type of an element in memory. UnsupportedError for one that no kernel computes with."""
    found = MEMORY_TYPES.get(dtype.name)
    if found is None:
        raise UnsupportedError(f"elements of type {dtype} are not compiled for a GPU")
    return found


def register_type(dtype: DType) -> str:
    """The type of a value in a register: f16 and bf16 are kept as float, bool is bool."""
    return "bool" if dtype == BOOL else "float" if dtype in HALF else memory_type(dtype)


def plain_name(name: str) -> str:
    """A name of C: a symbol of the model, or of a kernel's own."""
    text = re.sub(r"\W", "_", name.removeprefix(MARK)) or "_"
    text = f"_{text}" if text[0].isdigit() else text
    return f"{text}_" if text in _TAKEN.split() else text


def literal(dtype: DType, value: s.Number) -> str:
    """A number as C spells it; of a half type, rounded to it."""
    if dtype == BOOL:
        return "true" if value else "false"
    if not dtype.is_float:
        return _integer(dtype, int(value))
    with np.errstate(over="ignore"):
        number = float(value) if dtype == F64 else float(np.asarray(value, dtype.numpy))
    if math.isnan(number):
        return "bits_as<double>(0x7ff8000000000000ull)" if dtype == F64 else "bits_as<float>(0x7fc00000u)"
    if math.isinf(number):
        kind, bits = ("double", "0x7ff0000000000000ull") if dtype == F64 else ("float", "0x7f800000u")
        return f"{'-' if number < 0 else ''}bits_as<{kind}>({bits})"
    # The shortest text that reads back as the same number.
    text = repr(number) if dtype == F64 else str(np.float32(number))
    text = text if any(c in text for c in ".e") else f"{text}.0"
    return text if dtype == F64 else f"{text}f"


def _integer(dtype: DType, value: int) -> str:
    if dtype == I64 or dtype.name == "u64":
        if value == -(1 << 63):
            return "(-9223372036854775807ll - 1)"
        return f"{value}{'ull' if dtype.kind == 'uint' else 'll'}"
    if dtype.name == "i32" and value == -(1 << 31):
        return "(-2147483647 - 1)"
    return f"{value}u" if dtype.name == "u32" else str(value)


def joined(text: str) -> str:
    """An expression as an operand: in parentheses where it is more than a name, a number, a call or an element."""
    if re.fullmatch(r"[\w.]+", text) or re.fullmatch(r"\w+(<[\w, ]+>)?\([^()]*\)|\w+(\.\w+)?\[[^\[\]]*\]", text):
        return text
    return text if _enclosed(text) else f"({text})"


def _enclosed(text: str) -> bool:
    """Whether one pair of parentheses encloses the whole text."""
    if not text.startswith("(") or not text.endswith(")"):
        return False
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and position < len(text) - 1:
            return False
    return True


def bare(text: str) -> str:
    """An expression without the parentheses around the whole of it."""
    while _enclosed(text):
        text = text[1:-1]
    return text


FLOAT32_SUFFIX = {F32: "f", F64: "", F16: "f", BF16: "f"}
"""What the names of mathematical functions end with."""
