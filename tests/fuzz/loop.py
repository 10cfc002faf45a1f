"""Fuzzes until stopped: `python -m fuzz.loop [SECONDS [FIRST_SEED]]` in the folder of the tests (`make fuzz`).

Each case is compiled and compared in a process of its own, so that one that crashes or hangs is a failure like others.
A failure is shrunk and saved under `found/`; from then on the tests run it.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import onnx
from fuzz.compare import Outcome, check
from fuzz.graphs import Case
from fuzz.shrink import shrunk
from fuzz.strategies import case_by

FOUND = Path(__file__).with_name("found")
SECONDS_PER_CASE = 120


def save(case: Case, message: str, folder: Path = FOUND) -> Path:
    """Writes the model with what is wrong as its text, and its inputs as KIND:NUMBER:NAME."""
    name = hashlib.sha256(case.model.SerializeToString()).hexdigest()[:12]
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.doc_string = message
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / f"{name}.onnx")
    # As bytes, since numpy's files do not keep the types that ml_dtypes adds.
    arrays = [
        onnx.numpy_helper.from_array(a, f"{k}:{n}") for k, given in enumerate(case.inputs) for n, a in given.items()
    ]
    holder = onnx.helper.make_graph([], "inputs", [], [], arrays)
    (folder / f"{name}.inputs").write_bytes(holder.SerializeToString())
    return folder / f"{name}.onnx"


def saved(path: Path) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """A model that was saved, and the inputs of its runs."""
    holder = onnx.GraphProto.FromString(path.with_suffix(".inputs").read_bytes())
    runs: dict[int, dict[str, np.ndarray]] = {0: {}}
    for tensor in holder.initializer:
        number, name = tensor.name.split(":", 1)
        runs.setdefault(int(number), {})[name] = onnx.numpy_helper.to_array(tensor)
    return onnx.load(path), list(runs.values())


def isolated(case: Case) -> Outcome:
    """`check` in a process of its own."""
    with tempfile.TemporaryFile() as channel:
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS_PER_CASE)
            try:
                outcome = check(case.model, case.inputs, case.expected)
                channel.write(f"{outcome.message}\0{outcome.refused}".encode())
                channel.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        channel.seek(0)
        text = channel.read().decode()
    if os.WIFSIGNALED(status):
        return Outcome(f"the process was ended by {signal.Signals(os.WTERMSIG(status)).name}")
    return Outcome(*text.split("\0")) if text else Outcome("the process ended without a word")


def main(seconds: str = "", first: str = "") -> int:
    """1 where something was found."""
    number = int(first) if first else time.time_ns() % (1 << 40)
    end = time.monotonic() + float(seconds) if seconds else float("inf")
    total, failures = 0, 0
    while time.monotonic() < end:
        case = case_by(number)
        outcome = isolated(case)
        total += 1
        if outcome.refused:
            print(f"seed {number}: refused: {outcome.refused}", flush=True)
        if outcome.message:
            failures += 1
            case = shrunk(case, lambda smaller: bool(isolated(smaller).message))
            message = isolated(case).message or outcome.message
            print(f"seed {number}: {message}\n{save(case, message)}: {case!r}", flush=True)
        number += 1
        if total % 100 == 0:
            print(f"{total} graphs, {failures} failures", flush=True)
    print(f"{total} graphs, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
