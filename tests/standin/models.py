"""Small compiled models of hand-written kernels, for the runtime's tests on the stand-in driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from emulator import harness
from onnxc.backends.cuda.launch import Launch
from onnxc.backends.cuda.runtime.code import DeviceCode
from onnxc.compiler.compiled import Compiled
from onnxc.ir.dims import Dim, ceildiv, product, symbol, symbols
from onnxc.ir.dtypes import BOOL, F32, I64, DType
from onnxc.ir.graph import TensorType, Value
from onnxc.ir.program import ArenaPlan, ArenaSlot, Assign, Bind, Choose, Memory, Place, Repeat, Run, Steps, walk
from onnxc.ir.target import Target

N, M, K = symbol("$n"), symbol("$m"), symbol("$k")
INDEX, TRIPS = symbol("$i"), symbol("$trips")

TEXT = """
extern "C" __global__ void __launch_bounds__(32)
add(const float* __restrict__ x, const float* __restrict__ y, float* __restrict__ z, int n)
{
    const int i = blockIdx.x * 32 + threadIdx.x;
    if (i < n) z[i] = x[i] + y[i];
}
extern "C" __global__ void __launch_bounds__(32)
twice(const float* __restrict__ x, float* __restrict__ y, i64 n)
{
    const i64 i = i64(blockIdx.x) * 32 + threadIdx.x;
    if (i < n) y[i] = 2 * x[i];
}
extern "C" __global__ void __launch_bounds__(1)
fill(float* __restrict__ y, int n, int value)
{
    for (int i = 0; i < n; ++i) y[i] = value;
}
extern "C" __global__ void __launch_bounds__(1)
add_index(const float* __restrict__ x, float* __restrict__ y, int n, int index)
{
    for (int i = 0; i < n; ++i) y[i] = y[i] + x[i] * index;
}
extern "C" __global__ void __launch_bounds__(1)
count_positive(const float* __restrict__ x, i64* __restrict__ count, int n)
{
    i64 found = 0;
    for (int i = 0; i < n; ++i) found += x[i] > 0;
    count[1] = found;
}
extern "C" __global__ void __launch_bounds__(1)
take_positive(const float* __restrict__ x, float* __restrict__ y, int n)
{
    int end = 0;
    for (int i = 0; i < n; ++i)
        if (x[i] > 0) y[end++] = x[i];
}
extern "C" __global__ void __launch_bounds__(1)
below(const float* __restrict__ x, u8* __restrict__ y, int limit)
{
    y[0] = x[0] < limit;
}
extern "C" __global__ void __launch_bounds__(64)
reverse(const float* __restrict__ x, float* __restrict__ y, int n)
{
    float* const tile = (float*)shared_memory();
    for (int i = threadIdx.x; i < n; i += 64) tile[i] = x[i];
    barrier();
    for (int i = threadIdx.x; i < n; i += 64) y[i] = tile[n - 1 - i];
}
extern "C" __global__ void __launch_bounds__(1)
astray(const float* __restrict__ x, float* __restrict__ y, int n)
{
    y[1 << 28] = x[0] + n;
}
"""

_BLOCKS = ceildiv(symbol("$size"), 32)
LAUNCHES = {
    "add": Launch(_BLOCKS, 32, 0, 32),
    "twice": Launch(_BLOCKS, 32, 0, 64),
    "fill": Launch(1, 1, 0, 32),
    "add_index": Launch(1, 1, 0, 32),
    "count_positive": Launch(1, 1, 0, 32),
    "take_positive": Launch(1, 1, 0, 32),
    "below": Launch(1, 1, 0, 32),
    "reverse": Launch(1, 64, 100 << 10, 32),
    "astray": Launch(1, 1, 0, 32),
}
SIZES = {"fill": ("$size", "$value"), "add_index": ("$size", "$index"), "below": ("$limit",)}


def image() -> bytes:
    """The kernels as the stand-in driver loads them."""
    return harness.image_of(TEXT)


def value(name: str, dtype: DType, *shape: Dim) -> Value:
    return Value(name, TensorType(dtype, shape))


def run(kernel: str, *arguments: str | Place, sizes: Sequence[Dim]) -> Run:
    """A call, of an ONNX node that is called as the kernel is."""
    places = tuple(a if isinstance(a, Place) else Place(a) for a in arguments)
    return Run(kernel, places, tuple(sizes), (f"node_{kernel}",))


def compiled(
    name: str,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    segments: Sequence[Steps],
    arena: Sequence[Mapping[str, tuple[DType, Dim]]] = (),
    constants: Mapping[str, np.ndarray[Any, Any]] | None = None,
    images: Mapping[str, Mapping[str, bytes]] | None = None,
    launches: Mapping[str, Launch] | None = None,
) -> Compiled:
    """A model whose arenas (one per segment) hold the given memories one above the other."""
    weights = dict(constants or {})
    made: dict[str, int] = {}
    for number, steps in enumerate(segments):
        for step in walk(steps):
            names = [getattr(step, "symbol", None), getattr(step, "count", None)]
            made |= {name: number + 1 for name in names if isinstance(name, str)}

    def begin(shape: Sequence[Dim]) -> int:
        return max((made.get(s.name, 0) for dim in shape for s in symbols(dim)), default=0)

    arena = [*arena, *({} for _ in range(len(segments) - len(arena)))]
    memories = {v.name: Memory(v.name, v.dtype, product(v.shape), "input") for v in inputs}
    memories |= {v.name: Memory(v.name, v.dtype, product(v.shape), "output", begin(v.shape)) for v in outputs}
    memories |= {n: Memory(n, F32, array.size, "constant") for n, array in weights.items()}
    slots = []
    for segment, own in enumerate(arena):
        memories |= {n: Memory(n, dtype, size, "arena", segment) for n, (dtype, size) in own.items()}
        order = list(own)
        slots.append(tuple(ArenaSlot(n, memories[n].bytes, tuple(range(i))) for i, n in enumerate(order)))
    used = dict.fromkeys(step.kernel for steps in segments for step in walk(steps) if isinstance(step, Run))
    found = {kernel: (launches or {}).get(kernel, LAUNCHES[kernel]) for kernel in used}
    code = DeviceCode(
        images={"sm_90": dict.fromkeys(used, image())} if images is None else images,
        launches=found,
        sizes={kernel: SIZES.get(kernel, ("$size",)) for kernel in used},
        segments=tuple(segments),
        memories=memories,
        results=tuple(v.name for v in outputs),
    )
    given = {s.name for v in inputs for dim in v.shape for s in symbols(dim)}
    return Compiled(
        name=name,
        target=Target.parse("cuda:sm_90"),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        symbols=(*given, *made),
        assumptions=(),
        segments=len(segments),
        ready=tuple(begin(v.shape) for v in outputs),
        arena=ArenaPlan(tuple(slots), 0, 0),
        objects=(),
        constants=weights,
        kernels={kernel: (f"node_{kernel}",) for kernel in used},
        texts={},
        device=code,
    )


X, Y, Z = value("x", F32, N, M), value("y", F32, N, M), value("z", F32, N, M)


def total(**more: Any) -> Compiled:
    """z = 2 * (x + y), all of the sizes [n, m]."""
    steps = (run("add", "x", "y", "sum", sizes=[N * M]), run("twice", "sum", "z", sizes=[N * M]))
    return compiled("total", [X, Y], [Z], [steps], [{"sum": (F32, N * M)}], **more)


def biased(bias: np.ndarray[Any, Any]) -> Compiled:
    """z = x + bias, x and z of the size [bias.size]; the result goes through the middle of an arena memory."""
    size = bias.size
    middle = Place("room", 5)
    steps = (run("add", "x", "bias", middle, sizes=[size]), run("add", middle, "zero", "z", sizes=[size]))
    weights = {"bias": bias, "zero": np.zeros(size, np.float32)}
    arena = [{"below": (F32, 3), "room": (F32, size + 5)}]
    return compiled("biased", [value("x", F32, size)], [value("z", F32, size)], [steps], arena, weights)


def positives() -> Compiled:
    """The positive elements of x [n], twice: a size that the run tells. The second output is x + x."""
    x, y, z = value("x", F32, N), value("y", F32, K), value("z", F32, N)
    first = (
        run("add", "x", "x", "z", sizes=[N]),
        run("count_positive", "x", "count", sizes=[N]),
        Bind("$k", Place("count", 1), I64),
    )
    second = (run("take_positive", "x", "taken", sizes=[N]), run("twice", "taken", "y", sizes=[K]))
    return compiled("positives", [x], [y, z], [first, second], [{"count": (I64, 2)}, {"taken": (F32, K)}])


def choice() -> Compiled:
    """y = x + x where `flag` holds, else x + x + x + x: branches of x [n]."""
    x, flag, y = value("x", F32, N), value("flag", BOOL), value("y", F32, N)
    then = (run("add", "x", "x", "y", sizes=[N]),)
    otherwise = (run("add", "x", "x", "half", sizes=[N]), run("twice", "half", "y", sizes=[N]))
    steps: Steps = (Choose(Place("flag"), then, otherwise),)
    return compiled("choice", [flag, x], [y], [steps], [{"half": (F32, N)}])


def counted(trips: Dim) -> Compiled:
    """y = 1 + the sum of i * x for i = 0, 1, ... `trips` - 1, for x [n]: sizes alone decide what runs."""
    body = (run("add_index", "x", "y", sizes=[N, INDEX]),)
    steps: Steps = (run("fill", "y", sizes=[N, 1]), Repeat("$i", trips, None, body))
    return compiled("counted", [value("x", F32, N)], [value("y", F32, N)], [steps])


def doubling() -> Compiled:
    """Doubles y = x + x [n] while y[0] < 100, at most 8 times; the second output has one element for each time."""
    again = (run("twice", "y", "next", sizes=[N]), run("add", "next", "zero", "y", sizes=[N]))
    body: Steps = (*again, run("below", "y", "goes on", sizes=[100]))
    first: Steps = (
        run("fill", "zero", sizes=[N, 0]),
        run("add", "x", "x", "y", sizes=[N]),
        run("below", "y", "goes on", sizes=[100]),
        Repeat("$i", 8, Place("goes on"), body, "$trips"),
        Assign("$k", TRIPS + 1),
    )
    second = (run("fill", "rounds", sizes=[K, 7]),)
    outputs = [value("y", F32, N), value("rounds", F32, K)]
    arena = [{"goes on": (BOOL, 1), "next": (F32, N), "zero": (F32, N)}]
    return compiled("doubling", [value("x", F32, N)], outputs, [first, second], arena)


def reversal(size: int = 20000) -> Compiled:
    """y = x [size] backwards, through more shared memory than kernels have unasked."""
    steps = (run("reverse", "x", "y", sizes=[size]),)
    return compiled("reversal", [value("x", F32, size)], [value("y", F32, size)], [steps])


def stray() -> Compiled:
    """A kernel that writes far outside of its output."""
    x, y = value("x", F32, N), value("y", F32, N)
    return compiled("stray", [x], [y], [(run("astray", "x", "y", sizes=[N]),)])
