"""The code that LLVM makes of kernels: no calls, nothing spilled, and the instructions that a target has."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
from native_kernel import FLOATS, HOST, INTEGERS, RUNNABLE, N, V, X, Y, arithmetic, f32, kernel, run_native
from onnxc.backends.cpu.llvm import render_kernel
from onnxc.backends.cpu.objects import assembly, compile_objects
from onnxc.ir import loops as k
from onnxc.ir import scalars as s
from onnxc.ir.dims import symbol
from onnxc.ir.dtypes import BF16, BOOL, F16, F32, I8, I16, I32, I64, U8, DType
from onnxc.ir.scalars import Buffer, load
from onnxc.ir.target import Target

EVERY_TARGET = [Target.parse(name) for name in ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64")]


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, BOOL], ids=str)
@pytest.mark.parametrize("target", EVERY_TARGET, ids=str)
def test_no_operation_is_a_library_call(dtype: DType, target: Target) -> None:
    a = Buffer("a", dtype, 64)
    values = arithmetic(dtype, 1, 4, 64)
    values += [s.cast(load(a, 0, lanes), wanted) for lanes in (1, 16) for wanted in (*FLOATS, *INTEGERS, BOOL)]
    if dtype.is_float:
        values += [s.fma(*(load(a, at, lanes) for at in (0, 16, 32))) for lanes in (1, 16)]
        values += [s.binary("rem", load(a, 0), load(a, 1)), s.unary("reciprocal_estimate", load(a, 0, 16))]
    flags = Buffer("flags", BOOL, 16)
    mask = load(flags, 0, 16)
    values += [
        load(a, 0, 16, mask),
        load(a, 0, 16, mask, 3),
        load(a, 0, 16, None, 3),
        load(a, 0, 16, s.widen(load(flags, 0), 16)),
    ]
    values += [s.Horizontal(dtype, 1, op, load(a, 0, 16)) for op in ("add", "mul", "min", "max")]
    outputs = [Buffer(f"y{i}", value.dtype, value.lanes) for i, value in enumerate(values)]
    body = [k.Store(output, 0, value) for output, value in zip(outputs, values, strict=True)]
    body += [k.Store(a, 0, load(a, 16, 16), mask, stride) for stride in (1, 3)]
    # Copies and fills, which LLVM likes to make calls of.
    body += [k.For("v", 64, (k.Store(outputs[0], V, load(a, V)),))] if values[0].dtype == dtype else []
    body += [k.For("v", N, (k.Store(outputs[0], V, s.const(0, values[0].dtype)),))]
    body += [k.For("v", N, (k.Store(outputs[0], V, s.const(0, values[0].dtype)),), "parallel")]
    made = kernel(body, *outputs, a, Buffer("b", dtype, 64), flags, outputs=len(outputs) + 1, sizes=("n",))
    (threaded,) = compile_objects([("k", render_kernel(made, target))], target)
    assert undefined_symbols(threaded) == {"onnxc_parallel_for"}
    (plain,) = compile_objects([("k", render_kernel(made, target, threaded=False))], target)
    assert undefined_symbols(plain) == set()


def undefined_symbols(content: bytes) -> set[str]:
    """The names that an ELF object file leaves to the linker."""
    (table,) = struct.unpack_from("<Q", content, 40)
    size, count = struct.unpack_from("<HH", content, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", content, table + size * number) for number in range(count)]
    found = set()
    for _, kind, _, _, start, length, link, _, _, _ in sections:
        if kind == 2:  # SHT_SYMTAB
            names = sections[link][4]
            for at in range(start + 24, start + length, 24):
                name, _, _, section = struct.unpack_from("<IBBH", content, at)
                if section == 0:
                    found.add(content[names + name : content.index(b"\0", names + name)].decode())
    return found


def matrix_tile(rows: int, vectors: int, lanes: int) -> k.Kernel:
    """C = A @ B by register tiles; B is packed in panels of `vectors` vectors, [n / panel][k][panel]."""
    m, n, depth, i, j, p = (symbol(name) for name in ("m", "n", "depth", "i", "j", "p"))
    width = vectors * lanes
    a, b, c = Buffer("a", F32, m * depth), Buffer("b", F32, n * depth), Buffer("c", F32, m * n)
    total = Buffer("total", F32, rows * vectors, "register", lanes)
    row = [Buffer(f"row{r}", F32, depth) for r in range(rows)]
    part = [Buffer(f"part{v}", F32, 1, "register", lanes) for v in range(vectors)]
    tile = [(r, v, r * vectors + v) for r in range(rows) for v in range(vectors)]
    inner: list[k.Statement] = [
        k.Define(part[v], load(b, j * depth + p * width + v * lanes, lanes)) for v in range(vectors)
    ]
    for r, v, t in tile:
        product = s.fma(load(row[r], p), load(part[v], 0, lanes), load(total, t, lanes))
        inner.append(k.Store(total, t, product))
    body: list[k.Statement] = [k.Alloc(total)]
    body += [k.Alias(row[r], a, (i + r) * depth) for r in range(rows)]
    body += [k.Store(total, t, s.const(0.0, F32, lanes)) for _, _, t in tile]
    body += [k.For("p", depth, tuple(inner))]
    body += [k.Store(c, (i + r) * n + j + v * lanes, load(total, t, lanes)) for r, v, t in tile]
    loops = k.For("i", m, (k.For("j", n, tuple(body), "serial", width),), "parallel", rows)
    return k.Kernel("k", (c, a, b), ("c",), ("m", "n", "depth"), (loops,))


def innermost_loop(text: str, instruction: str) -> list[str]:
    """The loop of an assembly text around the given instruction, without labels and comments."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    first = next(n for n, line in enumerate(lines) if line.startswith(instruction))
    start = max(n for n in range(first) if lines[n].startswith(".L"))
    label = lines[start].rstrip(":")
    end = next(n for n in range(first, len(lines)) if re.match(rf"(j\w+|b\.?\w+)\s+{re.escape(label)}$", lines[n]))
    return [line for line in lines[start + 1 : end + 1] if line and not line.endswith(":")]


@pytest.mark.parametrize(
    ("name", "rows", "vectors"),
    [("x86-64-v4", 6, 4), ("x86-64-v4", 14, 2), ("x86-64-v4", 8, 3), ("x86-64-v3", 6, 2), ("aarch64", 6, 4)],
)
def test_a_matrix_tile_stays_in_registers(name: str, rows: int, vectors: int) -> None:
    target = Target.parse(name)
    fma = "fmla" if name == "aarch64" else "vfmadd"
    text = assembly(render_kernel(matrix_tile(rows, vectors, target.lanes(32)), target), target)
    loop = innermost_loop(text, fma)
    assert sum(line.startswith(fma) for line in loop) == rows * vectors
    assert not [line for line in loop if re.search(r"\(%rsp|\[sp", line)], "\n".join(loop)
    others = [line for line in loop if not re.match(rf"{fma}|vmovups|vbroadcastss|ldp|ldr|ldur|ld1r", line)]
    assert len(others) <= rows + 6, "\n".join(others)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_matrix_tile_multiplies(threads: int) -> None:
    lanes = HOST.lanes(32)
    m, n, depth, width = 12, 4 * lanes, 37, 2 * lanes
    a, b = f32(m, depth).reshape(m, depth), f32(depth, n, seed=1).reshape(depth, n)
    packed = np.ascontiguousarray(b.reshape(depth, n // width, width).swapaxes(0, 1)).ravel()
    found = {"c": np.zeros(m * n, np.float32), "a": a.ravel(), "b": packed}
    run_native(matrix_tile(4, 2, lanes), found, {"m": m, "n": n, "depth": depth}, threads=threads)
    np.testing.assert_allclose(found["c"].reshape(m, n), a @ b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_relu_is_one_instruction(name: str) -> None:
    target = Target.parse(name)
    lanes = target.lanes(32)
    relu = s.binary("max", load(X, V, lanes), s.const(0.0, F32, lanes))
    text = assembly(
        render_kernel(kernel([k.For("v", N, (k.Store(Y, V, relu),), step=lanes)], Y, X, sizes=("n",)), target), target
    )
    loop = innermost_loop(text, "maxps" if name == "x86-64" else "vmaxps")
    moves = [line for line in loop if re.match(r"v?mov[au]ps", line)]
    assert len(moves) <= (3 if name == "x86-64" else 1) and not re.search("cmp.*ps|blend|and.*ps", text)


def test_calls_that_name_dot_products() -> None:
    """The instruction where there is one, else the same sum by other means; also for several registers' lanes."""
    random = np.random.default_rng(0)
    cases = [("dot4_u8_i8", I32, U8, I8, 4), ("dot4_i8_i8", I32, I8, I8, 4), ("dot4_u8_u8", I32, U8, U8, 4)]
    cases += [("dot2_i16_i16", I32, I16, I16, 2), ("dot2_bf16_bf16", F32, BF16, BF16, 2)]
    for name, kind, left, right, group in cases:
        for lanes in (4, 16, 32):
            c, y = Buffer("c", kind, lanes), Buffer("y", kind, lanes)
            a, b = Buffer("a", left, lanes * group), Buffer("b", right, lanes * group)
            whole = random.integers(*(0, 9) if left == BF16 else (0, 200), lanes * group)
            data = {"a": whole.astype(left.numpy), "b": whole[::-1].astype(right.numpy)}
            data["c"] = random.integers(0, 99, lanes).astype(kind.numpy)
            products = data["a"].astype(np.int64) * data["b"].astype(np.int64)
            arguments = load(c, 0, lanes), load(a, 0, lanes * group), load(b, 0, lanes * group)
            made = kernel([k.Store(y, 0, s.Call(kind, lanes, name, arguments))], y, c, a, b)
            for target in RUNNABLE:
                found = {**data, "y": np.zeros(lanes, kind.numpy)}
                run_native(made, found, target=target)
                np.testing.assert_array_equal(found["y"], data["c"] + products.reshape(lanes, group).sum(1))


def test_dot_products_are_instructions_where_the_target_has_them() -> None:
    a, b, c, y = Buffer("a", U8, 64), Buffer("b", I8, 64), Buffer("c", I32, 16), Buffer("y", I32, 16)
    for name, instruction in (("cascadelake", "vpdpbusd"), ("alderlake", "vpdpbusd"), ("neoverse-n2", "usdot")):
        target = Target.parse(name)
        lanes = target.lanes(32)
        arguments = load(c, 0, lanes), load(a, 0, 4 * lanes), load(b, 0, 4 * lanes)
        made = kernel([k.Store(y, 0, s.Call(I32, lanes, "dot4_u8_i8", arguments))], y, a, b, c)
        assert "dot4_u8_i8" in target.dot_products
        assert instruction in assembly(render_kernel(made, target), target)


def test_rendering_is_deterministic() -> None:
    first, second = (render_kernel(matrix_tile(4, 2, 8), HOST) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("dtype", [I8, U8, I16, BF16, F16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 15])
def test_a_masked_store_leaves_what_is_beside_it(dtype: DType, count: int) -> None:
    """Of numbers computed in 32 bits too, which LLVM 22 stores whole where one lane is known to be all."""
    x, y = Buffer("x", F32, 16), Buffer("y", dtype, 16)
    value = s.cast(load(x, 0, 16) + s.const(1.0, F32, 16), dtype)
    mask = s.binary("lt", s.cast(s.Lanes(I64, 16), I32), s.widen(s.cast(s.const(count, I64), I32), 16))
    made = kernel([k.Store(y, 0, value, mask)], y, x)
    for target in RUNNABLE:
        found = {"x": np.arange(16, dtype=np.float32) * 3, "y": np.full(16, 77).astype(dtype.numpy)}
        expected = np.where(np.arange(16) < count, found["x"] + 1, 77).astype(dtype.numpy)
        run_native(made, found, target=target)
        np.testing.assert_array_equal(found["y"], expected, err_msg=str(target))
