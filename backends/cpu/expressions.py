"""Scalar and vector expressions as LLVM IR text.

Values in registers: bool is i1; f16 and bf16 are kept as f32, rounded where a Cast or a Store makes them f16 or bf16;
all other types are their own. In memory bool is a byte 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir import scalars as s
from ...ir.dtypes import BF16, BOOL, F16, F32, F64, I8, I32, I64, U16, DType
from ...ir.intrinsics import LOOKUP
from ...ir.scalars import Buffer, Scalar
from ...passes.float_arithmetic import odd_f32
from ...passes.guards import guard_loads
from . import packs
from .addresses import (
    ModuleText,
    Value,
    constant_lanes,
    literal,
    mangled,
    memory_type,
    register_type,
    splat,
    vector_type,
)
from .bounds import BoundsRenderer
from .dot_products import find
from .legalize import HALF, Given, expand, has_half_conversions, narrow_bits, widened_bits
from .lookups import lookup

_FLOAT_OPS = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
_INTEGER_OPS = {name: name for name in ("add", "sub", "mul", "and", "or", "xor")} | {"bare_shl": "shl"}
_SIGNED_OPS = _INTEGER_OPS | {"bare_div": "sdiv", "bare_rem": "srem", "bare_shr": "ashr"}
_UNSIGNED_OPS = _INTEGER_OPS | {"bare_div": "udiv", "bare_rem": "urem", "bare_shr": "lshr"}
_BOOL_OPS = {"and": "and", "or": "or", "xor": "xor", "mul": "and", "min": "and", "add": "or", "max": "or"}
_FLOAT_COMPARE = {"lt": "olt", "le": "ole", "eq": "oeq", "ne": "une"}
_FLOAT_INTRINSICS = {
    "abs": "fabs",
    "sqrt": "sqrt",
    "floor": "floor",
    "ceil": "ceil",
    "trunc": "trunc",
    "round": "roundeven",
}


# By squaring, modulo 2^64; a negative exponent gives the truncated reciprocal, which is 0 but for the bases 1 and -1.
POWER = """define internal i64 @.power(i64 %base, i64 %exponent) memory(none) #0 {
entry:
  %negative = icmp slt i64 %exponent, 0
  %size = call i64 @llvm.abs.i64(i64 %base, i1 false)
  %unit = icmp eq i64 %size, 1
  %parity = and i64 %exponent, 1
  %left = select i1 %negative, i64 %parity, i64 %exponent
  %whole = xor i1 %negative, true
  %some = or i1 %whole, %unit
  %start = zext i1 %some to i64
  br label %test
test:
  %result = phi i64 [ %start, %entry ], [ %result.next, %step ]
  %square = phi i64 [ %base, %entry ], [ %square.next, %step ]
  %bits = phi i64 [ %left, %entry ], [ %bits.next, %step ]
  %done = icmp eq i64 %bits, 0
  br i1 %done, label %end, label %step
step:
  %odd = trunc i64 %bits to i1
  %factor = select i1 %odd, i64 %square, i64 1
  %result.next = mul i64 %result, %factor
  %square.next = mul i64 %square, %square
  %bits.next = lshr i64 %bits, 1
  br label %test
end:
  ret i64 %result
}
"""


class ExpressionRenderer(BoundsRenderer):
    """Appends the instructions of expressions to a function."""

    def __init__(self, module: ModuleText):
        super().__init__(module)
        self._values: dict[int, tuple[Scalar, str]] = {}
        self._half_bits: dict[str, str] = {}
        self._is_guarded = False  # whether the expression that is being rendered is free of unsafe selects

    def begin_statement(self) -> None:
        """Forgets loaded values: the last statement may have changed memory."""
        self._values.clear()

    def expression(self, root: Scalar) -> str:
        """The value of a statement's expression, its selects made safe first."""
        found = self.module.guarded.get(id(root))
        if found is None:
            found = self.module.guarded[id(root)] = (root, guard_loads(root))
        before, self._is_guarded = self._is_guarded, True
        result = self.value(found[1])
        self._is_guarded = before
        return result

    def index_value(self, scalar: Scalar) -> str:
        return self.value(scalar) if self._is_guarded else self.expression(scalar)

    def value(self, scalar: Scalar) -> str:
        """The value as an operand, without its type."""
        found = self._values.get(id(scalar))
        if found is None:
            expanded = expand(scalar, self.target)
            text = _RENDER[type(scalar)](self, scalar) if expanded is None else self.value(expanded)
            found = self._values[id(scalar)] = (scalar, text)  # the scalar is kept, so that its id stays its own
        return found[1]

    def operand(self, scalar: Scalar) -> str:
        """The value after its type."""
        return f"{register_type(scalar.dtype, scalar.lanes)} {self.value(scalar)}"

    def _const(self, scalar: s.Const) -> str:
        return literal(scalar.dtype, scalar.value)

    def _index(self, scalar: s.Index) -> str:
        return str(self.dim(scalar.dim))

    def _lanes(self, scalar: s.Lanes) -> str:
        return constant_lanes(range(scalar.lanes))

    def _given(self, scalar: Given) -> str:
        return scalar.text

    def _unary(self, scalar: s.Unary) -> str:
        kind, dtype, op = register_type(scalar.operand.dtype, scalar.lanes), scalar.operand.dtype, scalar.op
        assert op not in s.MATH, f"{op} must be expanded before rendering"
        x = self.value(scalar.operand)
        if op == "isnan":
            return self.emit(f"fcmp uno {kind} {x}, {x}") if dtype.is_float else splat(BOOL, scalar.lanes, False)
        if op == "not":
            return self.emit(f"xor {kind} {x}, {splat(dtype, scalar.lanes, True if dtype == BOOL else -1)}")
        if dtype.is_float:
            if op == "neg":
                return self.emit(f"fneg {kind} {x}")
            return self.intrinsic(_FLOAT_INTRINSICS[op], kind, x)
        if op == "neg":
            return self.emit(f"sub {kind} {splat(dtype, scalar.lanes, 0)}, {x}")
        if op == "popcount":
            return self.intrinsic("ctpop", kind, x)
        if op == "abs" and dtype.kind == "int":
            return self.emit(f"call {kind} @llvm.abs.{mangled(kind)}({kind} {x}, i1 false)")
        assert op in _FLOAT_INTRINSICS and op != "sqrt", f"{op} of {dtype}"
        return x  # integers are their own floor, and unsigned ones their own size

    def _binary(self, scalar: s.Binary) -> str:
        dtype, op = scalar.left.dtype, scalar.op
        if op in s.COMPARISONS:
            return self._compare(scalar)
        if op == "pow":
            return self._power(scalar)
        kind = register_type(dtype, scalar.lanes)
        a, b = self.value(scalar.left), self.value(scalar.right)
        if dtype == BOOL:
            return self.emit(f"{_BOOL_OPS[op]} {kind} {a}, {b}")
        if op in ("min", "max"):
            if not dtype.is_float:
                return self.intrinsic(f"{'s' if dtype.kind == 'int' else 'u'}{op}", kind, a, b)
            # NaN propagates; which zero of two is given is left open (nsz), as x86 has no instruction that tells.
            # An accumulator is usually on the left; x86 checks its first operand, so that the chain stays short.
            return self.emit(f"call nsz {kind} @llvm.{op}imum.{mangled(kind)}({kind} {b}, {kind} {a})")
        table = _FLOAT_OPS if dtype.is_float else _SIGNED_OPS if dtype.kind == "int" else _UNSIGNED_OPS
        assert op in table, f"{op} of {dtype}"
        return self.emit(f"{table[op]} {kind} {a}, {b}")

    def _power(self, scalar: s.Binary) -> str:
        """An integer power, lane by lane by a function of the module."""
        dtype, lanes = scalar.dtype, scalar.lanes
        assert dtype.is_integer, "pow of floats must be expanded before rendering"
        self.module.helpers[".power"] = POWER
        results: list[Scalar] = []
        for lane in range(lanes):
            base, exponent = (
                s.cast(operand if lanes == 1 else s.Shuffle(dtype, 1, operand, operand, (lane,)), I64)
                for operand in (scalar.left, scalar.right)
            )
            call = self.emit(f"call i64 @.power({self.operand(base)}, {self.operand(exponent)})")
            results.append(Given(I64, 1, call))
        return self.value(s.cast(results[0] if lanes == 1 else s.Vector(I64, lanes, tuple(results)), dtype))

    def _compare(self, scalar: s.Binary) -> str:
        dtype = scalar.left.dtype
        limit = self._lane_limit(scalar)
        if limit is not None:
            return limit
        kind, a, b = register_type(dtype, scalar.lanes), self.value(scalar.left), self.value(scalar.right)
        if dtype.is_float:
            return self.emit(f"fcmp {_FLOAT_COMPARE[scalar.op]} {kind} {a}, {b}")
        sign = "" if scalar.op in ("eq", "ne") else "s" if dtype.kind == "int" else "u"
        return self.emit(f"icmp {sign}{scalar.op} {kind} {a}, {b}")

    def _lane_limit(self, scalar: s.Binary) -> str | None:
        """base + lanes < limit, the predicate of a tail, on narrow lanes: as few registers as the data themselves."""
        left, right, lanes = scalar.left, scalar.right, scalar.lanes
        if scalar.op != "lt" or not isinstance(right, s.Broadcast) or lanes == 1:
            return None
        base: Scalar | None = None
        if isinstance(left, s.Binary) and left.op == "add":
            first, second = left.left, left.right
            if isinstance(second, s.Lanes):
                first, second = second, first
            if isinstance(first, s.Lanes) and isinstance(second, s.Broadcast):
                left, base = first, second.operand
        if not isinstance(left, s.Lanes):
            return None
        room = self.value(right.operand if base is None else right.operand - base)
        room = self.intrinsic("smin", "i64", self.intrinsic("smax", "i64", room, "0"), str(lanes))
        element = "i8" if lanes * 32 > self.target.vector_bits else "i32"
        narrow = self.broadcast(element, self.emit(f"trunc i64 {room} to {element}"), lanes)
        return self.emit(f"icmp ult <{lanes} x {element}> {constant_lanes(range(lanes), element)}, {narrow}")

    def _select(self, scalar: s.Select) -> str:
        condition, yes, no = self.operand(scalar.condition), self.operand(scalar.yes), self.operand(scalar.no)
        return self.emit(f"select {condition}, {yes}, {no}")

    def _fma(self, scalar: s.Fma) -> str:
        kind = register_type(scalar.dtype, scalar.lanes)
        return self.intrinsic("fma", kind, *(self.value(operand) for operand in (scalar.a, scalar.b, scalar.c)))

    def _broadcast(self, scalar: s.Broadcast) -> str:
        if isinstance(scalar.operand, s.Const):
            return splat(scalar.dtype, scalar.lanes, scalar.operand.value)
        return self.broadcast(register_type(scalar.dtype), self.value(scalar.operand), scalar.lanes)

    def _vector(self, scalar: s.Vector) -> str:
        kind, element = register_type(scalar.dtype, scalar.lanes), register_type(scalar.dtype)
        values = [self.value(item) for item in scalar.elements]
        if not any(value.startswith("%") for value in values):
            return "<" + ", ".join(f"{element} {value}" for value in values) + ">"
        result = "poison"
        for lane, value in enumerate(values):
            result = self.emit(f"insertelement {kind} {result}, {element} {value}, i64 {lane}")
        return result

    def _shuffle(self, scalar: s.Shuffle) -> str:
        pick = f"<{len(scalar.pick)} x i32> {constant_lanes(scalar.pick, 'i32')}"
        left, right = scalar.left, scalar.right
        if left.lanes == 1:
            return self._vector(
                s.Vector(scalar.dtype, scalar.lanes, tuple((left, right)[lane] for lane in scalar.pick))
            )
        if scalar.lanes == 1:
            side, lane = divmod(scalar.pick[0], left.lanes)
            return self.emit(f"extractelement {self.operand((left, right)[side])}, i64 {lane}")
        return self.emit(f"shufflevector {self.operand(left)}, {self.operand(right)}, {pick}")

    def _horizontal(self, scalar: s.Horizontal) -> str:
        operand = scalar.operand
        if operand.lanes == 1:
            return self.value(operand)
        kind, element = register_type(operand.dtype, operand.lanes), register_type(operand.dtype)
        name = f"vector.reduce.{_BOOL_OPS[scalar.op] if operand.dtype == BOOL else scalar.op}"
        return self.emit(f"call {element} @llvm.{name}.{mangled(kind)}({kind} {self.value(operand)})")

    def _call(self, scalar: s.Call) -> str:
        if scalar.name == LOOKUP:
            index, *tables = scalar.arguments
            return lookup(self, self.value(index), scalar.lanes, [self.value(table) for table in tables])
        if scalar.name in packs.PACKS:
            return self._pack(scalar)
        entry = find(scalar, self.target)
        assert entry is not None
        total, *factors = scalar.arguments
        kind = register_type(scalar.dtype, scalar.lanes)
        operands = []
        for factor in factors:
            have, x = memory_type(factor.dtype, factor.lanes), self.value(factor)
            if factor.dtype in HALF:
                x = self._half_bits.get(x) or self._narrowed(x, factor.dtype, factor.lanes)
            x = x if have == entry.operand else self.emit(f"bitcast {have} {x} to {entry.operand}")
            operands.append(f"{entry.operand} {x}")
        name = f"llvm.{entry.intrinsic}"
        types = [entry.operand] * 2
        if entry.accumulates:
            types, operands = [kind, *types], [self.operand(total), *operands]
        # Declared, LLVM accepts the operand types of its older versions too.
        self.module.helpers[name] = f"declare {kind} @{name}({', '.join(types)})\n"
        result = self.emit(f"call {kind} @{name}({', '.join(operands)})")
        return result if entry.accumulates else self.emit(f"add {self.operand(total)}, {result}")

    def _pack(self, scalar: s.Call) -> str:
        names = packs.instructions(scalar, self.target)
        assert names is not None
        lanes = scalar.arguments[0].lanes
        whole, half, byte = (vector_type(kind, n * lanes) for kind, n in (("i32", 1), ("i16", 2), ("i8", 4)))

        def joined(name: str, result: str, kind: str, a: str, b: str) -> str:
            self.module.helpers[f"llvm.{name}"] = f"declare {result} @llvm.{name}({kind}, {kind})\n"
            return self.emit(f"call {result} @llvm.{name}({kind} {a}, {kind} {b})")

        a, b, c, d = (self.value(vector) for vector in scalar.arguments)
        low, high = joined(names[0], half, whole, a, b), joined(names[0], half, whole, c, d)
        return joined(names[1], byte, half, low, high)

    # Conversions

    def _cast(self, scalar: s.Cast) -> str:
        if scalar.dtype in HALF and isinstance(scalar.operand, s.Cast) and scalar.operand.dtype == F32:
            before = scalar.operand.operand
            if before.dtype == scalar.dtype and isinstance(before, s.Cast | s.Load):
                return self.value(before)  # it was of this type, and rounded
        source, wanted = scalar.operand.dtype, scalar.dtype
        rounded = (
            scalar.operand.operand if isinstance(scalar.operand, s.Unary) and scalar.operand.op == "round" else None
        )
        if rounded is not None and (source, wanted) == (F32, I32) and self.target.architecture == "x86_64":
            have, want = register_type(F32, scalar.lanes), register_type(I32, scalar.lanes)  # one instruction
            name = f"llvm.lrint.{mangled(want)}.{mangled(have)}"
            return self.emit(f"freeze {want} {self.emit(f'call {want} @{name}({have} {self.value(rounded)})')}")
        x = self.value(scalar.operand)
        have, want = register_type(source, scalar.lanes), register_type(wanted, scalar.lanes)
        if wanted == BOOL:
            zero = splat(source, scalar.lanes, 0)
            return self.emit(f"{'fcmp une' if source.is_float else 'icmp ne'} {have} {x}, {zero}")
        if source.is_float and wanted.is_integer:
            return self.emit(f"freeze {want} {self.emit(f'fptosi {have} {x} to {want}')}")
        if not source.is_float and wanted.is_float:
            x = self.emit(f"{'sitofp' if source.kind == 'int' else 'uitofp'} {have} {x} to {want}")
        elif source.is_float and wanted.bits < 64 and source == F64:
            if wanted in HALF:
                x = self.value(odd_f32(Given(F64, scalar.lanes, x)))
            else:
                x = self.emit(f"fptrunc {have} {x} to {want}")
        elif source.is_float and wanted == F64:
            x = self.emit(f"fpext {have} {x} to {want}")
        elif not source.is_float and have != want:
            op = "trunc" if wanted.bits < source.bits and source != BOOL else "sext" if source.kind == "int" else "zext"
            x = self.emit(f"{op} {have} {x} to {want}")
        return self.widened(self._narrowed(x, wanted, scalar.lanes), wanted, scalar.lanes) if wanted in HALF else x

    def _narrowed(self, x: str, dtype: DType, lanes: int) -> str:
        """The i16 bits of an f32 rounded to a half type."""
        if dtype == F16 and has_half_conversions(self.target):
            half = self.emit(f"fptrunc {register_type(F32, lanes)} {x} to {vector_type('half', lanes)}")
            return self.emit(f"bitcast {vector_type('half', lanes)} {half} to {vector_type('i16', lanes)}")
        if dtype == BF16 and not self.target.subnormals and self.target.has("avx512bf16") and lanes % 4 == 0:
            narrow = vector_type("bfloat", lanes)
            rounded = self.emit(f"fptrunc {register_type(F32, lanes)} {x} to {narrow}")
            return self.emit(f"bitcast {narrow} {rounded} to {vector_type('i16', lanes)}")
        return self.value(narrow_bits(Given(F32, lanes, x), dtype))

    def widened(self, bits: str, dtype: DType, lanes: int) -> str:
        """The f32 that the i16 bits of a half type mean; it remembers its bits."""
        if dtype == F16 and has_half_conversions(self.target):
            half = self.emit(f"bitcast {vector_type('i16', lanes)} {bits} to {vector_type('half', lanes)}")
            wide = self.emit(f"fpext {vector_type('half', lanes)} {half} to {register_type(F32, lanes)}")
        else:
            wide = self.value(widened_bits(Given(U16, lanes, bits), dtype))
        self._half_bits[wide] = bits
        return wide

    def memory_value(self, scalar: Scalar) -> str:
        """The value in the form that memory holds."""
        x = self.expression(scalar)
        if scalar.dtype == BOOL:
            return self.emit(f"zext {register_type(BOOL, scalar.lanes)} {x} to {memory_type(BOOL, scalar.lanes)}")
        if scalar.dtype in HALF:
            return self._half_bits.get(x) or self._narrowed(x, scalar.dtype, scalar.lanes)
        return x

    def from_memory(self, raw: str, dtype: DType, lanes: int) -> str:
        if dtype == BOOL:
            return self.emit(f"icmp ne {memory_type(BOOL, lanes)} {raw}, {splat(I8, lanes, 0)}")
        return self.widened(raw, dtype, lanes) if dtype in HALF else raw

    def _bitcast(self, scalar: s.Bitcast) -> str:
        source, wanted, lanes = scalar.operand.dtype, scalar.dtype, scalar.lanes
        x = self.value(scalar.operand)
        if source in HALF:
            x = self._half_bits.get(x) or self._narrowed(x, source, scalar.operand.lanes)
        have, want = memory_type(source, scalar.operand.lanes), memory_type(wanted, lanes)
        if have != want:
            x = self.emit(f"bitcast {have} {x} to {want}")
        return self.widened(x, wanted, lanes) if wanted in HALF else x

    # Loads

    def _load(self, scalar: s.Load) -> str:
        buffer, lanes = scalar.buffer, scalar.lanes
        if buffer.space == "register":
            slot, kind = self.register(buffer, scalar.offset, lanes)
            return self.emit_effect(f"load {kind}, ptr {slot}")
        return self.from_memory(self._raw_load(scalar), buffer.dtype, lanes)

    def _raw_load(self, scalar: s.Load) -> str:
        buffer, lanes, predicate = scalar.buffer, scalar.lanes, scalar.predicate
        kind, align = memory_type(buffer.dtype, lanes), buffer.dtype.bytes
        pointer = self.address(buffer, scalar.offset, predicate is None)
        stride: Value = 1 if lanes == 1 else self.dim(scalar.stride)
        uniform = predicate.operand if isinstance(predicate, s.Broadcast) else predicate
        allowed = "true" if uniform is None else self.value(uniform) if uniform.lanes == 1 else ""
        if allowed and self.module.checked:
            allowed = self.inside(buffer, pointer, lanes, stride, allowed, "reads")
        if allowed not in ("", "true"):
            # Where nothing may be read, zeros are read instead: no branch, and a load that any target has.
            span = (lanes - 1) * abs(stride) + 1 if isinstance(stride, int) else 1
            self.module.zeros = max(self.module.zeros, span * align)
            start: Value = (lanes - 1) * stride if isinstance(stride, int) and stride < 0 else 0
            zeros = self.element(buffer, "@.zeros", -start if isinstance(start, int) else 0)
            pointer = self.emit(f"select i1 {allowed}, ptr {pointer}, ptr {zeros}")
            if not isinstance(stride, int):
                stride = self.emit(f"select i1 {allowed}, i64 {stride}, i64 0")
            predicate = None
        if predicate is not None:
            mask, nothing = self.operand(predicate), f"{kind} zeroinitializer"
            if self.module.checked:
                inside = self.inside_lanes(buffer, pointer, lanes, stride, self.value(predicate), "reads")
                mask = f"<{lanes} x i1> {inside}"
            if stride == 1:
                return self.emit_effect(
                    f"call {kind} @llvm.masked.load.{mangled(kind)}.p0(ptr {pointer}, i32 {align}, {mask}, {nothing})"
                )
            pointers = f"<{lanes} x ptr> {self.element_pointers(buffer, pointer, lanes, stride)}"
            name = f"llvm.masked.gather.{mangled(kind)}.v{lanes}p0"
            return self.emit_effect(f"call {kind} @{name}({pointers}, i32 {align}, {mask}, {nothing})")
        if stride == 1:
            return self.emit_effect(f"load {kind}, ptr {pointer}, align {align}")
        return self._strided_load(buffer, pointer, lanes, stride)

    def _strided_load(self, buffer: Buffer, pointer: str, lanes: int, stride: Value) -> str:
        kind, element, align = memory_type(buffer.dtype, lanes), memory_type(buffer.dtype), buffer.dtype.bytes
        if stride == 0:
            return self.broadcast(element, self.emit_effect(f"load {element}, ptr {pointer}, align {align}"), lanes)
        if not isinstance(stride, int) or not (stride == -1 or 2 <= stride <= 4):
            result = "poison"
            for lane in range(lanes):
                at = self.element(buffer, pointer, self.arithmetic("mul", stride, lane))
                one = self.emit_effect(f"load {element}, ptr {at}, align {align}")
                result = self.emit(f"insertelement {kind} {result}, {element} {one}, i64 {lane}")
            return result
        # Whole vectors, the last one ending with the last element wanted, and a shuffle for each.
        result = ""
        last = min(0, (lanes - 1) * stride) + abs(stride) * (lanes - 1) + 1 - lanes
        for part in range(abs(stride)):
            begin = last if part == abs(stride) - 1 else part * lanes
            at = self.element(buffer, pointer, begin)
            loaded = self.emit_effect(f"load {kind}, ptr {at}, align {align}")
            pick = []
            for lane in range(lanes):
                there = lane * stride - begin
                here = 0 <= there < lanes and (part == 0 or lane * stride >= part * lanes or stride < 0)
                pick.append((lanes if result else 0) + there if here else lane)
            mask = f"<{lanes} x i32> {constant_lanes(pick, 'i32')}"
            result = self.emit(f"shufflevector {kind} {result or loaded}, {kind} {loaded}, {mask}")
        return result


_RENDER: dict[type[Scalar], Callable[[Any, Any], str]] = {
    s.Const: ExpressionRenderer._const,
    s.Index: ExpressionRenderer._index,
    s.Lanes: ExpressionRenderer._lanes,
    s.Load: ExpressionRenderer._load,
    s.Unary: ExpressionRenderer._unary,
    s.Binary: ExpressionRenderer._binary,
    s.Select: ExpressionRenderer._select,
    s.Cast: ExpressionRenderer._cast,
    s.Bitcast: ExpressionRenderer._bitcast,
    s.Fma: ExpressionRenderer._fma,
    s.Broadcast: ExpressionRenderer._broadcast,
    s.Vector: ExpressionRenderer._vector,
    s.Shuffle: ExpressionRenderer._shuffle,
    s.Horizontal: ExpressionRenderer._horizontal,
    s.Call: ExpressionRenderer._call,
    Given: ExpressionRenderer._given,
}
