"""Compiles and runs mutants in a process that may die of them: `hostile.py` starts it and reads what it says.

Says a JSON line `{"at": seed, "phase": ...}` before each step that may be the last, and one with an outcome after each
mutant. Limits: CPU seconds by RLIMIT_CPU, address space by RLIMIT_AS; the peak of resident memory is measured.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import pickle
import resource
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
from fuzz.mutations import messages, mutated
from onnx.reference import ReferenceEvaluator
from onnxc.compiler.binding import Port
from onnxc.ir.dtypes import BY_NAME
from onnxc.ir.errors import AccessError
from onnxc.passes.fold import RANDOM
from onnxc.tools.arrays import made_up, sizes_for

SECONDS = 20
MEMORY = 2 << 30
LARGEST_INPUT = 1 << 24
"""Elements of inputs above which a mutant is compiled only."""


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def arguments(model: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The base model's own inputs where they still fit, else made up; None where they would be huge."""
    ports: list[Port] = list(model.inputs)
    given = {name: array for name, array in given.items() if isinstance(array, np.ndarray)}
    fitting = {port.name: given[port.name] for port in ports if port.name in given and fits(port, given[port.name])}
    sizes = sizes_for(ports, fitting)
    random, result = np.random.default_rng(0), {}
    for port in ports:
        shape = [size if isinstance(size, int) else sizes.get(size, 3) for size in port.shape]
        if math.prod(shape) > LARGEST_INPUT:
            return None
        array = fitting[port.name] if port.name in fitting else made_up(port, sizes, "random", random)
        # A single number is a size or a count as likely as not.
        whole = port.name not in fitting and array.size == 1 and array.dtype.kind == "f"
        result[port.name] = np.full_like(array, 2) if whole else array
    return result


def fits(port: Port, array: np.ndarray) -> bool:
    return len(port.shape) == array.ndim and all(
        not isinstance(size, int) or size == extent for size, extent in zip(port.shape, array.shape, strict=True)
    )


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is the limit of this process in another guise."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, MemoryError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def agrees(found: Any, expected: Any) -> bool:
    """Equal but for rounding: the sums of a mutant may be of numbers of very different sizes."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return False
    if found.dtype.kind in "OSU":
        return [str(text) for text in found.flat] == [str(text) for text in expected.flat]
    if found.dtype != expected.dtype:
        return False
    if found.dtype.kind in "biu":
        return bool(np.array_equal(found, expected))
    a, b = (array.astype(np.complex128 if array.dtype.kind == "c" else np.float64) for array in (found, expected))
    finite = np.abs(b[np.isfinite(b)])
    scale = float(finite.max()) if finite.size else 1.0
    rtol = 1e-3 if found.dtype.itemsize >= 4 else 0.05
    with np.errstate(all="ignore"):
        return bool(np.allclose(a, b, rtol=rtol, atol=rtol * max(scale, 1e-3), equal_nan=True))


def outcome(base: Any, content: bytes, folder: Path, seed: int) -> dict[str, Any]:
    """What becomes of one mutant."""
    path = folder / "model.onnx"
    path.write_bytes(content)
    model = None
    try:
        say(at=seed, phase="compile")
        model = onnxc.compile(path if base.files or seed % 2 else content, threads=1, max_memory=MEMORY // 2)
        if any(port.dtype not in BY_NAME or port.dtype == "string" for port in model.inputs):
            return {"outcome": "compiled"}
        inputs = arguments(model, base.inputs)
        if inputs is None:
            return {"outcome": "compiled"}
        say(at=seed, phase="run")
        results = model.run(inputs)
    except AccessError as error:
        return {"outcome": "outside", "kind": type(error).__name__, "text": str(error)}
    except onnxc.OnnxcError as error:
        bad = out_of_memory(error)
        text = "".join(traceback.format_exception(error)) if bad else str(error)
        return {"outcome": "memory" if bad else "refused", "kind": type(error).__name__, "text": text[-3000:]}
    except Exception as error:
        return {"outcome": "bug", "kind": type(error).__name__, "text": traceback.format_exc()[-6000:]}
    say(at=seed, phase="reference")
    try:
        proto = onnx.ModelProto.FromString(content)
        onnx.checker.check_model(proto, full_check=True)
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                return {"outcome": "ran"}
        with np.errstate(all="ignore"):
            expected = ReferenceEvaluator(proto).run(None, inputs)
    except Exception as error:
        return {"outcome": "ran", "text": str(error)[:300]}
    if any(item.op_type in RANDOM for item in messages(proto) if isinstance(item, onnx.NodeProto)):
        return {"outcome": "ran"}
    if any(isinstance(array, list) for array in (*expected, *results.values())):
        return {"outcome": "ran"}  # sequences and optionals, which the reference does not tell apart
    if not all(np.isfinite(np.asarray(array, np.float64)).all() for array in expected if is_real(array)):
        return {"outcome": "ran"}  # where infinities arise, what they become depends on the order of sums
    names = [value.name for value in proto.graph.output]
    wrong = [name for name, array in zip(names, expected, strict=True) if not agrees(results[name], array)]
    if not wrong:
        return {"outcome": "agrees"}
    place = names.index(wrong[0])
    return {"outcome": "differs", "text": f"{wrong[0]}: {results[wrong[0]]!r} for {expected[place]!r}"[:2000]}


def is_real(array: Any) -> bool:
    return isinstance(array, np.ndarray | np.generic) and array.dtype.kind not in "OSUc"


def peak(reset: bool = False) -> int:
    """The largest resident memory since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


def watch_files(folder: Path) -> list[str]:
    """The files that are opened from here on and are neither Python's, the system's nor in the model's folder."""
    roots = [folder, Path(sys.prefix), Path(sys.base_prefix), Path(onnxc.__file__).parent, Path("/proc"), Path("/sys"),
             Path(os.environ["ONNXC_CACHE_DIR"]), Path(os.__file__).parent]  # fmt: skip
    allowed = [os.path.realpath(root) for root in roots]
    opened: list[str] = []

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(details[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(details[0]))
            if not any(path == root or path.startswith(f"{root}/") for root in allowed):
                opened.append(path)

    sys.addaudithook(hook)
    return opened


def main(bank: str, first: int, last: int) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGXCPU, chain=True)
    warnings.simplefilter("ignore")
    bases = pickle.loads(Path(bank).read_bytes())
    folder = Path(bank).parent / f"models{os.getpid()}" / "model"
    make_folder(folder)
    opened = watch_files(folder)
    size = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmSize")).split()[1])
    resource.setrlimit(resource.RLIMIT_AS, ((size << 10) + MEMORY + (1 << 30), resource.RLIM_INFINITY))
    for seed in range(first, last):
        base = bases[seed % len(bases)]
        for name, data in base.files.items():
            (folder / name).write_bytes(data)
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + SECONDS + 1, resource.RLIM_INFINITY))
        before = peak(reset=True)
        opened.clear()
        found = outcome(base, mutated(base.model, seed), folder, seed)
        most = peak()
        if most > MEMORY and most - before > 1 << 20:
            found = {"outcome": "memory", "text": f"{most >> 20} MB; {found}"}
        if opened:
            found = {"outcome": "opened", "text": f"{opened}; {found}"}
        seconds = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - used
        say(at=seed, base=base.name, seconds=round(seconds, 3), megabytes=most >> 20, **found)
    say(done=True)


def make_folder(folder: Path) -> None:
    """A model's folder with ways out of it, for mutants that point to files."""
    folder.mkdir(parents=True)
    secret = folder.parent / "secret.bin"
    secret.write_bytes(bytes(range(256)) * 16)
    (folder / "data.bin").write_bytes(bytes(4096))
    (folder / "folder").mkdir()
    (folder / "link.bin").symlink_to(secret)
    (folder / "way").symlink_to(folder.parent)
    os.link(secret, folder / "hard.bin")
    os.mkfifo(folder / "pipe")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
