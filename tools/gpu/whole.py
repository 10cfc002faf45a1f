"""Part 4: whole networks in f16 beside PyTorch's: eager, as a CUDA graph, and by torch.compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.errors import UnsupportedError
from .models import NotComparable, Ready, Subject, relative_difference
from .prepare import PRECISIONS, Prepared
from .processes import TaskError

if TYPE_CHECKING:
    from .check import Check, Effort

PREPARING, RUNNING = 420.0, 120.0
"""Seconds after which a network is taken to hang."""
LATENCIES = 15
WARM = 1.5
"""How much longer compiling may take than it took when it was tried before."""


def raced(
    subject: Subject, ready: Ready, uncompiled: str, limits: Mapping[str, float], effort: Effort
) -> dict[str, Any]:
    """Results compared, then all timed in rounds, then our kernels one by one. `uncompiled` says why torch.compile does
    not take part, if it does not."""
    from ...backends.cuda.runtime.driver import open_device
    from ...compiler.api import load
    from ...compiler.artifact import read
    from . import peers
    from .bench import Bench, speeds
    from .clock import Clock, interleaved

    device = open_device()
    clock = Clock(device)
    found = ready.compiled[subject.precisions[0]]
    if not isinstance(found, Prepared):
        raise UnsupportedError(found)
    executable = load(found.artifact)
    ((inputs, _),) = ready.cases.values()
    row: dict[str, Any] = {"batch": subject.batch, "message": "", "absent": {}, "peers": {}}
    torch = peers.torch_on_gpu() if subject.architecture is not None else None
    network = None
    if torch is None:
        row["absent"]["torch"] = peers.why_not() or "only exported networks run in PyTorch"
        given = _on_gpu(device, inputs)
    else:
        assert subject.architecture is not None
        network = peers.Network(torch, subject.architecture, subject.batch)
        given = [network.inputs[port.name] for port in executable.inputs]
    results: list[Any] = [None]

    def run() -> None:
        results[0] = None  # its memory is the next result's
        results[0] = executable(*given)

    for _ in range(3):
        run()
    functions: dict[str, Any] = {"onnxc": (run, None)}
    outputs: dict[str, Any] = {"onnxc": lambda: results[0]}
    if network is not None:
        makers = {"torch eager": network.eager, "torch graph": network.graph, "torch.compile": network.compiled}
        for name, make in makers.items():
            try:
                if make == network.compiled and uncompiled:
                    raise RuntimeError(uncompiled)
                function, outputs[name] = make()
                functions[name] = (function, None)
            except Exception as error:
                row["absent"][name] = str(error)[:200] or type(error).__name__
        for name, output in outputs.items():
            if name in functions:
                apart = relative_difference(peers.on_host(output()), network.reference)
                row["peers"][name] = {"difference": apart if np.isfinite(apart) else None}
        apart = row["peers"]["onnxc"]["difference"]
        if apart is None or not apart <= PRECISIONS[subject.precisions[0]]:
            row["message"] = f"the result differs by {apart} from PyTorch's in f32"
    times = interleaved(clock, functions, effort.rounds, effort.seconds)
    for name, (function, _) in functions.items():
        latency = float(np.median([clock.latency(function) for _ in range(LATENCIES)]))
        figures = times[name].figures() | {"latency_us": round(latency * 1e6, 3)}
        row["peers"][name] = row["peers"].get(name, {}) | figures
    bench = Bench(device, read(found.artifact), [inputs[port.name] for port in executable.inputs])
    kernels = bench.kernel_times(clock, max(3, effort.rounds // 3), effort.seconds / 4)
    row["kernels"] = [
        {"kernel": work.kernel, "from": list(work.origin)}
        | speeds(time.median, work.bytes, work.flops, limits, subject.precisions[0])
        for work, time in zip(found.work, kernels, strict=True)
        if time is not None
    ]
    return row


def _on_gpu(device: Any, inputs: Mapping[str, Any]) -> list[Any]:
    from pycuda import gpuarray

    with device:
        return [gpuarray.to_gpu(array) for array in inputs.values()]


def check_whole(
    check: Check,
    waiting: Sequence[tuple[Subject, Future[Ready]]],
    tuned: Mapping[tuple[str, int], Future[dict[str, float]]],
) -> None:
    """Times every network that is ready; those of batch 1 come first."""
    part, deadline = check.report.part("whole"), check.budget.part("whole")
    part["rows"], part["missing"] = [], {}
    late, longest = [], 0.0
    for subject, future in waiting:
        start = check.budget.seconds
        if not deadline.fits(1.2 * longest) or not future.done():
            late.append(f"{subject.name} batch {subject.batch}")
            future.cancel()
            continue
        row: dict[str, Any] = {"name": subject.name, "precision": subject.precisions[0], "batch": subject.batch}
        uncompiled = _why_not_compiled(tuned.get((subject.name, subject.batch)), deadline.left - longest)
        try:
            data = (subject, future.result(), uncompiled, check.limits, check.effort)
            row |= check.on_gpu(raced, *data, timeout=RUNNING)
        except TimeoutError:
            late.append(f"{subject.name} batch {subject.batch}")
            continue
        except TaskError as error:
            if error.kind == NotComparable.__name__:
                part["missing"][subject.name] = error.message[:400]
                continue
            row["message"] = str(error)[:400]
        part["rows"].append(row)
        longest = max(longest, check.budget.seconds - start)
        check.say(f"  {subject.name} batch {subject.batch}")
    if late:
        check.shortened("whole", f"not measured: {', '.join(late)}")


def _why_not_compiled(tuned: Future[dict[str, float]] | None, left: float) -> str:
    """Why torch.compile is left out; nothing where it is not."""
    if tuned is None or not tuned.done() or tuned.cancelled():
        return "torch.compile was not tuned within the time that was left"
    if (error := tuned.exception()) is not None:
        return str(error)[:200]
    seconds = tuned.result()["warm_s"] * WARM
    return "" if seconds < left else f"torch.compile takes {seconds:.0f} s, there are {max(left, 0):.0f} s"
