"""Types narrower than a byte, and floats of a byte: in kernels each element is the byte of its bits.

Moving elements moves bytes. A conversion from such a type widens the bits exactly, to f32 or i8 or u8; one to such a
type rounds half to even by integer arithmetic on the bits of the f32, after F. Giesen's float_to_half_fast3_rtne. What
arithmetic there is (ONNX has none but comparisons) is that of the wide type, rounded. So kernels have no other types
than those of the machine, on every target, and all of it is vectors where the rest is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from ..ir import loops as k
from ..ir import scalars as s
from ..ir.dtypes import BY_NAME, C64, F32, F64, I8, U8, U32, U64, DType
from ..ir.errors import UnsupportedError
from ..ir.loops import Kernel
from ..ir.scalars import Buffer, Rewriter, Scalar, bitcast, select
from .float_arithmetic import odd_f32, shifted


@dataclass(frozen=True)
class Format:
    """A float of few bits: a sign, `exponent` bits with a bias, `fraction` bits.

    `greatest` is the code of the greatest number, `infinity` that of what lies beyond (a NaN where there is no
    infinity, `greatest` where there is neither), `nan` that of NaN. Where `unsigned_zero` the code of -0 is NaN.
    """

    exponent: int
    fraction: int
    bias: int
    greatest: int
    infinity: int
    nan: int
    unsigned_zero: bool = False

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.fraction)


FORMATS: Mapping[str, Format] = {
    "f8e4m3fn": Format(4, 3, 7, 0x7E, 0x7F, 0x7F),
    "f8e4m3fnuz": Format(4, 3, 8, 0x7F, 0x80, 0x80, True),
    "f8e5m2": Format(5, 2, 15, 0x7B, 0x7C, 0x7E),
    "f8e5m2fnuz": Format(5, 2, 16, 0x7F, 0x80, 0x80, True),
    "f6e2m3": Format(2, 3, 1, 0x1F, 0x1F, 0x20),
    "f6e3m2": Format(3, 2, 3, 0x1F, 0x1F, 0x20),
    "f4e2m1": Format(2, 1, 1, 0x7, 0x7, 0x8),
}  # fmt: skip
"""The floats but for e8m0, which has an exponent alone. What has no NaN makes -0 of it, as ml_dtypes does."""

E8M0 = BY_NAME["f8e8m0"]


def _number(value: int, like: Scalar) -> Scalar:
    return s.const(value, like.dtype, like.lanes)


def encode_float(x: Scalar, dtype: DType, saturate: bool) -> Scalar:
    """The bits, in a u8, of a number rounded to a float of 8 bits or less."""
    wide = odd_f32(x) if x.dtype == F64 else s.cast(x, F32)
    bits = bitcast(wide, U32)
    if dtype == E8M0:
        exponent = shifted(bits + 0x400000, "shr", 23) & 0xFF
        return s.cast(select(s.unary("isnan", wide), _number(0xFF, exponent), exponent), U8)
    form = FORMATS[dtype.name]
    size = bits & 0x7FFFFFFF
    drop = 23 - form.fraction
    even = shifted(size, "shr", drop) & 1
    rebased = (127 - form.bias) << 23
    normal = shifted(size + (1 << (drop - 1)) - 1 + even - rebased, "shr", drop)
    # The sum has the least subnormal as its last place: adding rounds, and the code is what the bits grow by.
    place = drop + 1 - form.bias
    subnormal = bitcast(bitcast(size, F32) + 2.0**place, U32) - ((127 + place) << 23)
    code = select(size < _number(rebased + (1 << 23), size), subnormal, normal)
    limit = form.greatest if saturate else form.infinity  # one code for all that is beyond the numbers
    code = s.binary("min", code, _number(limit, code))
    sign = shifted(bits, "shr", 31 - (form.exponent + form.fraction)) & form.sign
    is_nan = _number(0x7F800000, size) < size
    if not form.unsigned_zero:
        return s.cast(select(is_nan, _number(form.nan, code), code) ^ sign, U8)
    signed = select(code.equal(0), code, code | sign)
    beyond = code.equal(form.infinity) | is_nan if limit == form.infinity else is_nan
    return s.cast(select(beyond, _number(form.nan, code), signed), U8)


def decode_float(bits: Scalar, dtype: DType) -> Scalar:
    """The f32 that the bits (u8) of a float of 8 bits or less mean."""
    wide = s.cast(bits, U32)
    if dtype == E8M0:
        least = select(wide.equal(0), _number(0x400000, wide), shifted(wide, "shl", 23))
        return bitcast(select(wide.equal(0xFF), _number(0x7FC00000, wide), least), F32)
    form = FORMATS[dtype.name]
    size = wide & (form.sign - 1)
    sign = shifted(wide & form.sign, "shl", 31 - (form.exponent + form.fraction))
    aligned = shifted(size, "shl", 23 - form.fraction)
    # A subnormal number is what the fraction adds to the least normal one.
    least = s.const(2.0 ** (1 - form.bias), F32, bits.lanes)
    subnormal = bitcast(bitcast(aligned + ((128 - form.bias) << 23), F32) - least, U32)
    normal = aligned + ((127 - form.bias) << 23)
    found = select(size < _number(1 << form.fraction, size), subnormal, normal)
    if form.unsigned_zero:
        found = found | sign
        return bitcast(select((wide & 0xFF).equal(form.nan), _number(0x7FC00000, wide), found), F32)
    if form.infinity > form.greatest:
        special = 0x7F800000 if form.infinity != form.nan else 0x7FC00000
        found = select(size.equal(form.infinity), _number(special, wide), found)
    if form.infinity != form.nan and form.nan < form.sign:
        found = select(_number(form.infinity, wide) < size, _number(0x7FC00000, wide), found)
    return bitcast(found | sign, F32)


def encode(x: Scalar, dtype: DType, saturate: bool = False) -> Scalar:
    """The bits, in a u8, of a value converted to a narrow type as ONNX's Cast does."""
    if not dtype.is_float:
        return s.cast(x, U8) & ((1 << dtype.bits) - 1)
    return encode_float(x, dtype, saturate)


def decode(bits: Scalar, dtype: DType) -> Scalar:
    """What the bits (u8) of a narrow type mean, exactly: an f32, or an i8 or u8."""
    if dtype.is_float:
        return decode_float(bits, dtype)
    value = bits & ((1 << dtype.bits) - 1)
    if dtype.kind == "uint":
        return value
    half = 1 << (dtype.bits - 1)
    return s.bitcast((value ^ half) - half, I8)


def held_as(dtype: DType) -> DType:
    """The type in whose place kernels hold the bits of elements: a byte for narrow types, and 64 bits of a complex
    number, which is only moved where it comes here. Any other type itself."""
    return U8 if dtype.is_narrow else U64 if dtype == C64 else dtype


@cache
def _bits_of(value: complex, dtype: DType) -> int:
    with np.errstate(all="ignore"):
        number = value if dtype == C64 else value.real
        bits = int(np.asarray(number).astype(dtype.numpy).view(held_as(dtype).numpy))
    return bits & ((1 << dtype.bits) - 1)


class _Legalizer(Rewriter):
    """Rebuilds expressions with the bits in place of the values of narrow types."""

    def rebuild(self, scalar: Scalar) -> Scalar:
        held = held_as(scalar.dtype)
        narrow = held != scalar.dtype
        if isinstance(scalar, s.Const):
            return s.const(_bits_of(complex(scalar.value), scalar.dtype), held) if narrow else scalar
        if isinstance(scalar, s.Load):
            found = super().rebuild(scalar)
            assert isinstance(found, s.Load)
            return replace(found, dtype=held, buffer=_held(found.buffer)) if narrow else found
        source = scalar.children[0].dtype if scalar.children else scalar.dtype
        if isinstance(scalar, s.Cast | s.Bitcast) and (narrow or source.is_narrow):
            return self._converted(scalar, source)
        if isinstance(scalar, s.Unary | s.Binary | s.Fma | s.Horizontal) and source.is_narrow:
            wide = F32 if source.is_float else U8 if source.kind == "uint" else I8
            given = iter([decode(self(child), source) for child in scalar.children])
            names = [n for n in type(scalar).__dataclass_fields__ if isinstance(getattr(scalar, n), Scalar)]
            result = replace(scalar, dtype=wide if narrow else scalar.dtype, **{n: next(given) for n in names})  # type: ignore[arg-type]
            return encode(result, scalar.dtype) if narrow else result
        if narrow and not isinstance(scalar, s.Select | s.Broadcast | s.Vector | s.Shuffle | s.Call):
            raise UnsupportedError(f"{type(scalar).__name__} of {scalar.dtype} is not compiled")
        found = super().rebuild(scalar)
        return replace(found, dtype=held_as(found.dtype))

    def _converted(self, scalar: s.Cast | s.Bitcast, source: DType) -> Scalar:
        wanted, operand = scalar.dtype, self(scalar.operand)
        if isinstance(scalar, s.Bitcast):
            return operand if wanted.is_narrow and source.is_narrow else bitcast(operand, held_as(wanted))
        value = decode(operand, source) if source.is_narrow else operand
        if wanted.is_narrow:
            return encode(value, wanted, scalar.saturate)
        return s.cast(value, wanted)


def _held(buffer: Buffer) -> Buffer:
    return replace(buffer, dtype=held_as(buffer.dtype))


def without_narrow_types(kernel: Kernel) -> Kernel:
    """`kernel` with the bits in place of the elements of narrow types; in memory nothing changes."""
    inner = [st.buffer for st in k.walk(kernel.body) if isinstance(st, k.Alloc | k.Define | k.Alias)]
    buffers = {b.name: _held(b) for b in (*kernel.parameters, *inner) if held_as(b.dtype) != b.dtype}
    body = k.rebuild(kernel.body, _Legalizer(), buffers)
    return replace(kernel, parameters=tuple(map(_held, kernel.parameters)), body=body)
