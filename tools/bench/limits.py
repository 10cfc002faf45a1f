"""What this machine can do at best, as far as was ever measured: multiply-adds in registers, reading from each level of
memory. They are the roofs under which a profile places each kernel."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...backends.cpu.dot_products import DOTS
from ...backends.object_cache import cache_folder
from ...ir import loops as k
from ...ir import scalars as s
from ...ir.dims import symbol
from ...ir.dtypes import F32
from ...ir.scalars import Buffer
from ...ir.target import Target
from ...ir.tensors import buffer_tensor
from ...passes.regions import Call, Lowered, Region
from ...passes.work import Load
from ..bench_kernels import CompiledRegion, multiply_adds

SIZES = tuple(1 << power for power in range(14, 28, 2))
"""Bytes of the arrays whose reading is timed: 16 KB to 64 MB."""
CHAINS = 8
"""Sums that are formed side by side, so that no addition waits for the one before."""


@dataclass(frozen=True)
class Limits:
    """Operations and bytes a second, of one thread: multiply-adds of f32 counted twice, those of each dot product that
    is an instruction, and reading an array of each of some sizes again and again."""

    flops: float
    dots: dict[str, float]
    bandwidth: dict[int, float]

    def best(self, other: Limits) -> Limits:
        """The greater of each of two measurements."""
        sizes, names = self.bandwidth.keys() | other.bandwidth.keys(), self.dots.keys() | other.dots.keys()
        bandwidth = {n: max(self.bandwidth.get(n, 0.0), other.bandwidth.get(n, 0.0)) for n in sorted(sizes)}
        dots = {name: max(self.dots.get(name, 0.0), other.dots.get(name, 0.0)) for name in sorted(names)}
        return Limits(max(self.flops, other.flops), dots, bandwidth)

    def reading(self, size: float) -> float:
        """Bytes a second for an array of `size` bytes, between the measured sizes by the logarithm."""
        sizes = sorted(self.bandwidth)
        return float(np.interp(math.log(max(size, 1)), np.log(sizes), [self.bandwidth[n] for n in sizes]))

    def least_seconds(self, load: Load, threads: int = 1) -> float:
        """No kernel that does these operations on floats and dot products on this many bytes can be faster."""
        arithmetic = load.flops / self.flops
        arithmetic += sum(count / self.dots.get(name, self.flops) for name, count in load.dots.items())
        return max(arithmetic, load.bytes / self.reading(load.bytes)) / threads


def limits_of(target: Target, file: Path | None = None) -> Limits:
    """The limits of this machine: the best of what is measured now and of what was kept from before, so that a busy
    moment does not lower them."""
    file = file or cache_folder() / f"limits-{target.cpu}.json"
    found = measured(target)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        bandwidth = {int(size): speed for size, speed in content["bandwidth"].items()}
        kept = Limits(content["flops"], content["dots"], bandwidth)
        found = found.best(kept)
    except (OSError, ValueError, KeyError):
        pass
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(found)), encoding="utf-8")
    temporary.replace(file)
    return found


def measured(target: Target) -> Limits:
    """The limits as they are now, in about a second; other work on the machine lowers them."""
    best, operations = multiply_adds(target)
    readers = [_reader(target, size) for size in SIZES]
    seconds = [_least(function) for function in (best, *readers)]
    bandwidth = {size: size * _repeats(size) / t for size, t in zip(SIZES, seconds[1:], strict=True)}
    flops, dots = operations / seconds[0], {}
    for name in sorted(target.dot_products):
        best, operations = multiply_adds(target, DOTS[name])
        dots[name] = operations / _least(best)
    return Limits(flops, dots, bandwidth)


def _least(function: Callable[[], None], seconds: float = 0.15) -> float:
    """The time of the fastest call: short enough that some are not interrupted on a busy machine."""
    least, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        function()
        least = min(least, time.perf_counter() - start)
    return least


def _repeats(size: int) -> int:
    """How often an array is read in a call: a call itself takes a microsecond."""
    return max(1, (1 << 21) // size)


def _reader(target: Target, size: int) -> Callable[[], None]:
    """Adds up an array of f32."""
    lanes = target.lanes(32)
    count = size // F32.bytes
    sums = Buffer("sum", F32, CHAINS, "register", lanes)
    x, y = Buffer("x0", F32, count), Buffer("y0", F32, CHAINS * lanes)
    at = symbol("at", 0)
    body: list[k.Statement] = [k.Alloc(sums)]
    body += [k.Store(sums, i, s.const(0, F32, lanes)) for i in range(CHAINS)]
    step = [
        k.Store(sums, i, s.binary("add", s.load(sums, i, lanes), s.load(x, at + i * lanes, lanes)))
        for i in range(CHAINS)
    ]
    body.append(k.For("again", _repeats(size), (k.For("at", count, tuple(step), step=CHAINS * lanes),)))
    body += [k.Store(y, i * lanes, s.load(sums, i, lanes)) for i in range(CHAINS)]
    kernel = k.Kernel("read", (x, y), ("y0",), (), tuple(body))
    result = buffer_tensor("y0", F32, (CHAINS * lanes,))
    region = Region("read", (buffer_tensor("x0", F32, (count,)),), ((y, result),))
    compiled = CompiledRegion(region, Lowered((Call(kernel, ("x0", "y0"), ()),)), target)
    memory = compiled.memory([np.ones(count, np.float32)], {})  # zeros would be one page, again and again
    bound = compiled.bound(memory, {})

    def run(keep: object = (compiled, memory)) -> None:
        bound()

    return run
