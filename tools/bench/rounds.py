"""Engines in turns: short series of runs, one engine after the other, round after round, the others stopped meanwhile.

On a machine whose clock and neighbours change, only what is measured within a moment can be compared: the ratio of two
engines is the median over the rounds of the ratios of their medians in each.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..check.compare import compare
from .engines import split

OWN = "onnxc"


@dataclass(frozen=True)
class Setting:
    """One row of the table: a model at certain sizes, a number of threads, inputs for it, the name to show, and options
    of onnxc's `compile`."""

    path: str
    dims: Mapping[str, int]
    inputs: Mapping[str, np.ndarray]
    threads: int = 1
    name: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def cpus(self) -> list[int]:
        """The processors to run on: the last ones that this process may use."""
        return sorted(os.sched_getaffinity(0))[-self.threads :]


@dataclass
class Result:
    """What was measured of an engine: medians of the rounds in seconds, and what loading took.

    `cold` is the time to compile without any cache, where the engine has one; `difference` is the greatest distance of
    its outputs from those of the first of the others, relative to the largest value of an output.
    """

    engine: str
    rounds: list[float] = field(default_factory=list)
    load: float = 0.0
    cold: float | None = None
    memory: int | None = None
    code_bytes: int | None = None
    difference: float | None = None
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the rounds, relative to their median."""
        if len(self.rounds) < 4:
            return (max(self.rounds) - min(self.rounds)) / (2 * self.median)
        first, _, third = statistics.quantiles(self.rounds, n=4)
        return (third - first) / (2 * self.median)

    def ratio(self, own: Result) -> float:
        """How many times as long as `own` it takes."""
        return statistics.median(a / b for a, b in zip(self.rounds, own.rounds, strict=True))


class Process:
    """A worker (see `worker`), stopped but for when it is asked something."""

    def __init__(self, engine: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.result = Result(engine)
        self.log = (folder / f"{engine.replace(':', '_')}.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env={**os.environ, **environment},
        )  # fmt: skip

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer to an order; one with "error" where there is none."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            code = self.process.wait()
            return {"error": f"the process ended with {code}; its last words: {self._last_words()}"}
        self.process.send_signal(signal.SIGSTOP)
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _last_words(self) -> str:
        self.log.flush()
        return " ".join(Path(self.log.name).read_text(errors="replace").split())[-300:]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()


def measure(
    setting: Setting,
    engines: Sequence[str],
    rounds: int,
    seconds: float,
    cold: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """The results of all engines, `OWN` first; one that fails has an error and no rounds.

    Each round gives each engine `seconds`, and at least one run. `cold` also compiles without a cache.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxc-bench-")))
        np.savez(folder / "inputs.npz", **setting.inputs)  # type: ignore[arg-type]
        processes: list[Process] = []
        for engine in engines:
            tell(f"{engine}: loading")
            process = _started(stack, engine, setting, folder, cold)
            if process is not None:
                processes.append(process)
        _compare(processes, folder)
        working = [process for process in processes if not process.result.error]
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            for process in working[number % len(working) :] + working[: number % len(working)] if working else ():
                reply = process.ask(do="run", seconds=seconds, least=1)
                if "error" in reply:
                    process.result.error = reply["error"]
                else:
                    process.result.rounds.append(statistics.median(reply["seconds"]))
            working = [process for process in working if not process.result.error]
        return [process.result for process in processes]


def _started(stack: ExitStack, engine: str, setting: Setting, folder: Path, cold: bool) -> Process:
    """A process that has loaded the model; onnxc's twice, first without its caches."""
    own = split(engine)[0] == OWN
    order = {
        "do": "load", "engine": engine, "inputs": str(folder / "inputs.npz"), "cpus": setting.cpus,
        "job": {
            "path": setting.path, "dims": dict(setting.dims), "threads": setting.threads,
            "options": dict(setting.options),
            "shapes": {name: array.shape for name, array in setting.inputs.items()},
        },
    }  # fmt: skip
    environment = {"ONNXC_CACHE_DIR": str(folder / "cache")} if own and cold else {}
    first: float | None = None
    if environment:
        trial = Process(engine, folder, environment)
        first = trial.ask(**order).get("seconds")
        trial.close()
    process = Process(engine, folder, environment)
    stack.callback(process.close)
    reply = process.ask(**order)
    process.result.error = reply.get("error", "")
    if not process.result.error:
        process.result.load, process.result.memory = reply["seconds"], reply["bytes"]
        process.result.code_bytes, process.result.cold = reply["code_bytes"], first
    return process


def _compare(processes: Sequence[Process], folder: Path) -> None:
    """How far each engine's outputs are from those of the first that is not onnxc, or of the first."""
    working = [process for process in processes if not process.result.error]
    outputs: list[list[np.ndarray]] = []
    for number, process in enumerate(working):
        file = folder / f"outputs{number}.npz"
        reply = process.ask(do="save", to=str(file))
        if "error" in reply:
            process.result.error = reply["error"]
            return
        with np.load(file) as arrays:
            outputs.append([arrays[name] for name in reply["names"]])
    others = [i for i, process in enumerate(working) if split(process.result.engine)[0] != OWN]
    if not outputs:
        return
    reference = outputs[others[0] if others else 0]
    for process, found in zip(working, outputs, strict=True):
        process.result.difference = difference(found, reference)


def difference(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The greatest distance of an element, relative to the largest magnitude in its output; inf where shapes differ."""
    worst = 0.0
    if len(actual) != len(expected):
        return float("inf")
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.size and b.size:
            top = float(np.max(np.abs(np.where(np.isfinite(b), b, 0)))) or 1.0
            found = compare("", a.astype(np.float64), b.astype(np.float64)).max_abs
            worst = max(worst, float("inf") if found is None else found / top)
    return worst
