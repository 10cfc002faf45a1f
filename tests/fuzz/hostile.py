"""Hostile models: a mutant of a real model is refused with an OnnxcError or runs correctly, in bounded memory and time.

`python tests/fuzz/hostile.py --count 10000` (`make fuzz-hostile`) prints what is not so, with the seeds that show it;
`--seed N --count 1` shows one again.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxc

TESTS = Path(__file__).parents[1]
FINE = ("refused", "ran", "compiled", "agrees")
SILENT = 180
"""Seconds without a word after which a worker that uses no CPU time is taken to wait for ever."""


@dataclass(frozen=True)
class Base:
    """A model to be mutated, inputs that it takes, and files beside it."""

    name: str
    model: bytes
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


def bases() -> list[Base]:
    """The demo's model, models with control flow, functions, external data and weights of all forms, and ONNX's own
    cases, the families of operators alternating."""
    from conformance import suite
    from small_models import small_cnn

    random = np.random.default_rng(0)
    images = {"image": random.standard_normal((2, 1, 8, 8)).astype(np.float32)}
    demo = Path(str(onnxc.__file__)).parent / "tools" / "digits.onnx"
    found = [
        Base("digits", demo.read_bytes(), images),
        Base("cnn", small_cnn().SerializeToString()),
        Base("transformer", transformer().SerializeToString()),
        Base("functions", functions().SerializeToString()),
        Base("branches", branches().SerializeToString()),
        external(),
    ]
    of_suite: list[Base] = []
    for name, case in suite.cases().items():
        model = suite.model_of(case)
        if model.ByteSize() > 1 << 18 or "_expanded" in name:
            continue
        first = next(iter(suite.data_sets(case)), ([], []))[0]
        initial = {tensor.name for tensor in model.graph.initializer}
        ports = [value.name for value in model.graph.input if value.name not in initial]
        inputs = {port: array for port, array in zip(ports, first, strict=False) if isinstance(array, np.ndarray)}
        of_suite.append(Base(name, model.SerializeToString(), inputs))
    order = random.permutation(len(of_suite))
    return found * 8 + [of_suite[place] for place in order]


def transformer() -> onnx.ModelProto:
    """One block: attention of two heads, layer normalization, gelu."""
    from small_models import model_of_text

    random = np.random.default_rng(1)
    shapes = {"table": (16, 8), "q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8), "up": (8, 32), "down": (32, 8)}
    weights = {name: random.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    return model_of_text(
        """block (int64[batch, seq] tokens) => (float[batch, seq, 8] y) {
            x = Gather (table, tokens)
            qs = MatMul (x, q)
            ks = MatMul (x, k)
            vs = MatMul (x, v)
            qh0 = Reshape (qs, heads)
            kh0 = Reshape (ks, heads)
            vh0 = Reshape (vs, heads)
            qh = Transpose <perm = [0, 2, 1, 3]> (qh0)
            kt = Transpose <perm = [0, 2, 3, 1]> (kh0)
            vh = Transpose <perm = [0, 2, 1, 3]> (vh0)
            scores = MatMul (qh, kt)
            scaled = Div (scores, root)
            weights = Softmax (scaled)
            mixed = MatMul (weights, vh)
            back = Transpose <perm = [0, 2, 1, 3]> (mixed)
            flat = Reshape (back, wide)
            projected = MatMul (flat, o)
            added = Add (x, projected)
            normal = LayerNormalization (added, scale)
            wider = MatMul (normal, up)
            active = Gelu (wider)
            narrow = MatMul (active, down)
            y = Add (narrow, normal)
        }""",
        **weights, heads=np.array([0, 0, 2, 4]), wide=np.array([0, 0, 8]), root=np.float32(2)[None],
        scale=np.ones(8, np.float32),
    )  # fmt: skip


def functions() -> onnx.ModelProto:
    """Functions that call functions, with attributes."""
    return onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        nested (float[n, 4] x) => (float[n, 4] y)
        { t = local.outer <slope = 0.25> (x)  y = local.inner <alpha = 2.0> (t) }
        <domain: "local", opset_import: ["" : 20]> inner <alpha> (x) => (y)
        { y = LeakyRelu <alpha: float = @alpha> (x) }
        <domain: "local", opset_import: ["" : 20, "local" : 1]> outer <slope> (x) => (y)
        { t = local.inner <alpha: float = @slope> (x)  c = Constant <value_float = 2.0> ()  y = Mul (t, c) }"""
    )


def branches() -> onnx.ModelProto:
    """If within Loop, which reads values from around it; sizes computed by the model."""
    return onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        flow (float[n] x, int64 trips) => (float[n] y, float[m, n] stacked)
        <bool go = {1}, float half = {0.5}, int64[1] zero = {0}> {
            y, rows = Loop (trips, go, x) <body = body
            (int64 i, bool c, float[n] s) => (bool d, float[n] t, float[n] row) {
                d = Identity (c)
                total = ReduceSum <keepdims = 0> (s)
                positive = Greater (total, half)
                t = If (positive) <then_branch = a () => (float[n] p) { p = Mul (s, half) },
                                   else_branch = b () => (float[n] q) { q = Add (s, half) }>
                row = Identity (t)
            }>
            shape = Shape (rows)
            one = ConstantOfShape <value = float[1] {1.0}> (shape)
            stacked = Add (rows, one)
        }"""
    )


def external() -> Base:
    """Weights in a file beside the model, and sparse ones."""
    weights = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4, 6], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "data.bin"), ("offset", "0"), ("length", "96")):
        tensor.external_data.add(key=key, value=value)
    values = onnx.numpy_helper.from_array(np.array([1, 2], np.float32), "s")
    sparse = onnx.helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(np.array([1, 5]), "i"), [6, 2])
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> g (float[n, 4] x) => (float[n, 2] y)
        { t = MatMul (x, w)  y = MatMul (t, s) }"""
    )
    model.graph.initializer.append(tensor)
    model.graph.sparse_initializer.append(sparse)
    return Base("external", model.SerializeToString(), {}, {"data.bin": weights.tobytes()})


def outcomes(bank: Path, first: int, last: int, checked: bool = False) -> Iterator[dict[str, Any]]:
    """What becomes of the mutants of these seeds; a worker that dies of one is started again behind it. `checked`
    kernels look at each access to memory themselves."""
    environment = {**os.environ, "ONNXC_CACHE_DIR": str(bank.parent / "cache"), "ONNXC_MODEL_CACHE_BYTES": "0",
                   "PYTHONPATH": str(TESTS), "OPENBLAS_NUM_THREADS": "1", "ONNXC_DEBUG": "0",
                   "ONNXC_CHECK_BOUNDS": "1" if checked else "0"}  # fmt: skip
    while first < last:
        command = [sys.executable, str(TESTS / "fuzz" / "hostile_worker.py"), str(bank), str(first), str(last)]
        with tempfile.TemporaryFile() as errors:
            worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
            assert worker.stdout is not None
            at: dict[str, Any] = {"at": first, "phase": "start"}
            timer = [threading.Timer(SILENT, worker.kill)]
            timer[0].start()
            for line in worker.stdout:
                timer[0].cancel()
                timer[0] = threading.Timer(SILENT, worker.kill)
                timer[0].start()
                found = json.loads(line) if line.startswith("{") else {}
                if "outcome" in found:
                    yield found
                    at = {"at": found["at"] + 1, "phase": "start"}
                elif "phase" in found:
                    at = found
            timer[0].cancel()
            code = worker.wait()
            if at["at"] >= last:
                return
            errors.seek(0)
            told = errors.read().decode(errors="replace")[-4000:]
            if at["phase"] == "start" and code > 0:
                raise RuntimeError(f"the worker does not start: {told}")
            died = "ran" if at["phase"] == "reference" else "hang" if code in (-24, -9) else "crash"
            yield {"at": at["at"], "outcome": died, "text": f"{at['phase']}: signal {-code}\n{told}"}
            first = at["at"] + 1


def store(folder: Path) -> Path:
    """The base models as the file that workers read."""
    bank = folder / "bank.pickle"
    bank.write_bytes(pickle.dumps(bases()))
    return bank


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--checked", action="store_true", help="kernels check their accesses (ONNXC_CHECK_BOUNDS=1)")
    parser.add_argument("--all", action="store_true", help="print every outcome")
    options = parser.parse_args()
    kinds: Counter[str] = Counter()
    slowest = most = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for found in outcomes(store(Path(folder)), options.seed, options.seed + options.count, options.checked):
            kinds[found["outcome"]] += 1
            slowest, most = max(slowest, found.get("seconds", 0)), max(most, found.get("megabytes", 0))
            if options.all or found["outcome"] not in FINE:
                print(f"--- seed {found['at']} ({found.get('base')}): {found['outcome']} {found.get('kind', '')}")
                print(f"{found.get('seconds')} s, {found.get('megabytes')} MB\n{found.get('text', '')}", flush=True)
    print(f"{dict(kinds)}; slowest {slowest:.1f} s, largest {most:.0f} MB")
    return 1 if set(kinds) - set(FINE) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    # Workers unpickle `fuzz.hostile.Base`, not `__main__.Base`.
    from fuzz import hostile

    sys.exit(hostile.main())
