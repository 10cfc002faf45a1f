"""Part 3: how fast single operators are, beside what the GPU copies and PyTorch's libraries reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .prepare import PRECISIONS, Prepared, prepared
from .processes import TaskError

if TYPE_CHECKING:
    from ...ir.target import Target
    from .check import Check, Effort
    from .shapes import Operator

Waiting: TypeAlias = "Sequence[tuple[Operator, Future[Prepared]]]"

SAMPLE = 1 << 20
"""Elements of a result that are compared."""
PREPARING, RUNNING = 120.0, 60.0
"""Seconds after which an operator is taken to hang."""


# In processes that compile


def prepared_operator(operator: Operator, target: Target, artifact: str) -> Prepared:
    """Compiles an operator, its bytes and operations counted."""
    return prepared(operator.model(), target, operator.precision, artifact, counted=True)


def submitted(check: Check, listed: Sequence[Operator], priority: int) -> Waiting:
    """The operators, which are being compiled."""
    found = []
    for number, operator in enumerate(listed):
        arguments = (operator, check.target, check.path(f"operator{number}.onnxc"))
        future = check.pool.submit(prepared_operator, *arguments, timeout=PREPARING, priority=priority)
        found.append((operator, future))
    return found


# In the process that has the GPU


def limits(effort: Effort) -> dict[str, float]:
    """What the GPU reaches: bytes a second of a copy, and operations a second of cuBLAS by precision."""
    from ...backends.cuda.runtime.driver import open_device
    from .bench import copy_bandwidth
    from .clock import Clock
    from .peers import product_rates

    device = open_device()
    clock = Clock(device)
    with device:
        found = {"copy": copy_bandwidth(device, clock, effort.copy_bytes, effort.rounds, effort.seconds)}
    return found | product_rates(effort.product_size, clock, effort.rounds, effort.seconds)


def measured(operator: Operator, found: Prepared, known: Mapping[str, float], effort: Effort) -> dict[str, Any]:
    """The figures of one operator, and what is wrong with its result, if anything is and somebody tells it."""
    from ...backends.cuda.runtime.driver import open_device
    from ...compiler.artifact import read
    from . import peers
    from .bench import NODES, Bench, speeds
    from .clock import Clock, interleaved
    from .models import relative_difference

    device = open_device()
    clock = Clock(device)
    compiled = read(found.artifact)
    arrays = {name: operator.array(name) for name in (*operator.inputs, *operator.weights)}
    bench = Bench(device, compiled, [arrays[value.name] for value in compiled.inputs])
    once = clock.seconds(bench.function(bench.launches, 1), 3, bench.stream)
    repeats = max(1, min(NODES // len(bench.launches), int(effort.seconds / once)))
    functions: dict[str, Any] = {"onnxc": (bench.function(bench.launches, repeats), bench.stream)}
    row: dict[str, Any] = {"difference": None, "message": ""}
    torch = peers.torch_on_gpu()
    if torch is not None:
        peers.set_precision(torch, operator.precision)
        tensors = [peers.tensor_of(torch, array) for array in arrays.values()]
        function = peers.OPERATORS[operator.peer](torch, *tensors, **operator.settings)
        # A sample: comparing all of a large tensor would take longer than all measuring.
        output = bench.output().reshape(-1)
        picked = np.random.default_rng(0).integers(0, output.size, min(output.size, SAMPLE))
        theirs = function().reshape(-1)[peers.tensor_of(torch, picked)]
        apart = relative_difference(output[picked].astype(np.float32), peers.on_host(theirs))
        if not apart <= PRECISIONS[operator.precision]:
            row["message"] = f"the result differs by {apart:.2g} from PyTorch's"
        row["difference"] = apart if apart < float("inf") else None
        functions["torch"] = (peers.captured(torch, function, repeats)[0], None)
    whole = interleaved(clock, functions, effort.rounds, effort.seconds)
    times = {name: time.per(repeats) for name, time in whole.items()}
    flops = round(sum(work.flops for work in found.work) * operator.needed)
    row |= speeds(times["onnxc"].median, operator.moved, flops, known, operator.precision) | times["onnxc"].figures()
    row["kernels"] = [work.kernel for work in found.work]
    reached = {"copy": operator.moved / times["onnxc"].median / known["copy"]}
    if "torch" in times:
        row["torch"] = times["torch"].figures()
        reached["peer"] = row["of_torch"] = round(times["torch"].median / times["onnxc"].median, 4)
    if operator.mark is not None and operator.mark[0] in reached:
        of, share = operator.mark
        row["mark"] = {"of": of, "share": share, "reached": round(reached[of], 4), "met": reached[of] >= share}
    return row


# The part


def check_speed(check: Check, waiting: Waiting) -> None:
    """Measures every operator that is ready, one after the other."""
    part, deadline = check.report.part("speed"), check.budget.part("speed")
    part["rows"] = []
    part["limits"] = check.limits = check.on_gpu(limits, check.effort, timeout=RUNNING)
    late, longest = [], 0.0
    for operator, future in waiting:
        start = check.budget.seconds
        if not deadline.fits(1.5 * longest) or not future.done():
            late.append(operator.name)
            future.cancel()
            continue
        row = {"kind": operator.kind, "name": operator.name, "precision": operator.precision}
        try:
            data = (operator, future.result(), check.limits, check.effort)
            row |= check.on_gpu(measured, *data, timeout=RUNNING)
        except TimeoutError:
            late.append(operator.name)
            continue
        except TaskError as error:
            row["message"] = str(error)[:400]
        part["rows"].append(row)
        longest = max(longest, min(check.budget.seconds - start, RUNNING / 4))
        check.say(f"  {operator.kind} {operator.name} {operator.precision}")
    if late:
        check.shortened("speed", f"{len(late)} of {len(waiting)} operators were not measured: {', '.join(late[:9])}")
