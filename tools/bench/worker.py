"""One engine in a process of its own, told what to do by lines of JSON; answers by lines of JSON.

{"do": "load", "job": {...}, "engine": "onnxruntime", "inputs": "x.npz", "cpus": [0]}
{"do": "run", "seconds": 0.5, "least": 3}
{"do": "save", "to": "y.npz"}
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .engines import LOADERS, Job, Loaded, split


class Worker:
    """The engine's model and its inputs."""

    def __init__(self) -> None:
        self.loaded: Loaded | None = None
        self.inputs: dict[str, Any] = {}
        self.results: Mapping[str, Any] = {}

    def answer(self, order: Mapping[str, Any]) -> dict[str, Any]:
        if order["do"] == "load":
            return self._load(order)
        assert self.loaded is not None
        if order["do"] == "save":
            import numpy as np

            # Types that numpy's files do not know (bfloat16) are widened.
            plain = {name: np.asarray(value) for name, value in self.results.items()}
            np.savez(order["to"], **{n: a if a.dtype.kind in "biuf" else a.astype("f4") for n, a in plain.items()})  # type: ignore[arg-type]
            return {"names": list(plain)}
        return {"seconds": self._times(order["seconds"], order["least"])}

    def _load(self, order: Mapping[str, Any]) -> dict[str, Any]:
        import numpy as np

        os.sched_setaffinity(0, order["cpus"])
        with np.load(order["inputs"]) as file:
            self.inputs = {name: np.asarray(file[name], order="C") for name in file.files}
        name, precision = split(order["engine"])
        job = Job(**{**order["job"], "precision": precision})
        _import(name)
        before = memory("VmRSS")
        start = time.perf_counter()
        self.loaded = LOADERS[name](job)
        seconds = time.perf_counter() - start
        self.results = self.loaded.run(self.inputs)
        return {"seconds": seconds, "bytes": memory("VmHWM"), "before": before, "code_bytes": self.loaded.code_bytes}

    def _times(self, seconds: float, least: int) -> list[float]:
        assert self.loaded is not None
        run, inputs, clock = self.loaded.run, self.inputs, time.perf_counter
        times: list[float] = []
        gc.disable()
        run(inputs)  # caches and clocks as in the middle of a series
        end = clock() + seconds
        while len(times) < least or clock() < end:
            start = clock()
            run(inputs)
            times.append(clock() - start)
        gc.enable()
        return times


def _import(name: str) -> None:
    """The engine's own start-up is no part of loading a model."""
    __import__({"onnxc": "onnxc"}.get(name, name))


def memory(field: str) -> int | None:
    """Bytes that the system counts for this process; None where it does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")]
    return found[0] if found else None


def main() -> None:
    # What engines print must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker()
    for line in sys.stdin:
        try:
            reply = worker.answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
