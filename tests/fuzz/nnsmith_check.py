"""Compiles the models that `nnsmith_models.py` drew and compares each: `python nnsmith_check.py FOLDER`.

ONNX Runtime is asked first, then what PyTorch gave when the model was drawn; where both differ, ONNX's reference too,
with what rounding may do to the model. A difference is listed, one a line as `SEED: what`, in `nnsmith_differences.txt`
with the reason why it is none of onnxc; every other one fails the run.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import onnxc
from fuzz.compare import Outcome, by_onnxruntime, check, compared

EXPLAINED = Path(__file__).with_name("nnsmith_differences.txt")
SECONDS = 120
"""Time for one model, ONNX's reference included, whose loops in Python may take long."""


def explained() -> dict[str, str]:
    """The reasons by seed."""
    lines = [line for line in EXPLAINED.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split(": ", 1) for line in lines)


def outcome_of(path: Path) -> Outcome:
    """One model, on the inputs that nnsmith drew for it."""
    with np.load(path.with_suffix(".npz")) as arrays:
        kept = {name: arrays[name] for name in arrays}
    model = onnx.load(path)
    inputs = {value.name: kept[f"input:{value.name}"] for value in model.graph.input}
    by_torch = {value.name: kept[f"output:{value.name}"] for value in model.graph.output}
    try:
        found = onnxc.compile(model, threads=1).run(inputs)
    except onnxc.OnnxcError as error:
        return Outcome(refused=str(error))
    if not compared(found, by_torch, "torch"):
        return Outcome()
    try:
        if not compared(found, by_onnxruntime(model, inputs), "ONNX Runtime"):
            return Outcome()
    except Exception as error:  # it lacks many operators for many types
        print(f"{path.stem}: ONNX Runtime does not run it: {' '.join(str(error).split())[:120]}", flush=True)
    return check(model, [inputs], third=("torch", [by_torch]))


def late(number: int, frame: Any) -> NoReturn:
    raise TimeoutError(f"not done in {SECONDS} seconds")


def main(folder: str, first: str = "0") -> int:
    """0 where no model, from seed `first` on, differs unexplained."""
    reasons, counts = explained(), Counter[str]()
    signal.signal(signal.SIGALRM, late)
    for path in sorted(Path(folder).glob("*.onnx")):
        if int(path.stem) < int(first):
            continue
        if counts.total() % 50 == 49:
            print(f"{path.stem}: {dict(counts)}", flush=True)
        signal.alarm(SECONDS)
        try:
            outcome = outcome_of(path)
        except TimeoutError as error:
            outcome = Outcome(message=str(error))
        signal.alarm(0)
        kind = "differs" if outcome.message else "refused" if outcome.refused else "equal"
        if kind != "equal" and path.stem in reasons:
            kind = "explained"
        counts[kind] += 1
        if kind in ("differs", "refused"):
            print(f"{path.stem}: {kind}: {outcome.message or outcome.refused}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return 1 if counts["differs"] or counts["refused"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
