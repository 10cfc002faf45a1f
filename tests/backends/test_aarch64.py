"""Code for AArch64, run by QEMU's user mode: it computes what the code for this machine does.

Needs a cross compiler and QEMU (Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxc
import pytest
from onnxc.compiler.driver import compiled_model
from onnxc.compiler.native import write_native
from onnxc.compiler.options import Options, target_of
from small_models import model_of_text

QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
CC = shutil.which("aarch64-linux-gnu-gcc")
pytestmark = pytest.mark.skipif(not (QEMU and CC), reason="needs aarch64-linux-gnu-gcc and qemu-aarch64")

# Threads, then the bytes of each input and output; the inputs come from the standard input, the outputs go out.
MAIN = r"""
#include <stdio.h>
#include <stdlib.h>
#include "model.h"

int main(int count, char** arguments) {
    const void* inputs[MODEL_INPUTS + 1];
    void *outputs[MODEL_OUTPUTS], *arena = 0;
    size_t bytes[MODEL_INPUTS + MODEL_OUTPUTS];
    if (count != 2 + MODEL_INPUTS + MODEL_OUTPUTS) return 90;
    for (int i = 0; i < MODEL_INPUTS + MODEL_OUTPUTS; i++) bytes[i] = (size_t)atol(arguments[2 + i]);
    for (int i = 0; i < MODEL_INPUTS; i++) {
        inputs[i] = malloc(bytes[i] + 1);
        if (fread((void*)inputs[i], 1, bytes[i], stdin) != bytes[i]) return 91;
    }
    for (int i = 0; i < MODEL_OUTPUTS; i++) outputs[i] = malloc(bytes[MODEL_INPUTS + i] + 1);
    if (posix_memalign(&arena, MODEL_ALIGNMENT, (size_t)model_arena_bytes(0) + 1)) return 92;
    for (int again = 0; again < 2; again++) {
        int status = model_run(inputs, outputs, 0, arena, atoi(arguments[1]));
        if (status) return status;
    }
    for (int i = 0; i < MODEL_OUTPUTS; i++) fwrite(outputs[i], 1, bytes[MODEL_INPUTS + i], stdout);
    return 0;
}
"""


def run_there(
    model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], like: Mapping[str, np.ndarray], options: Options, to: Path
) -> dict[str, np.ndarray]:
    """The outputs of a model without open sizes, computed by code for AArch64; `like` has their shapes and types."""
    compiled = compiled_model(model, options)
    threads = options.threads or 1
    write_native(replace(compiled, name="model"), to / "model.o", threads > 1)
    (to / "main.c").write_text(MAIN)
    sources = [str(to / "main.c"), str(to / "model.o")]
    subprocess.run([str(CC), "-O1", f"-I{to}", *sources, "-static", "-pthread", "-o", str(to / "program")], check=True)
    given = [np.ascontiguousarray(inputs[value.name]) for value in compiled.inputs]
    names = [value.name for value in compiled.outputs]
    numbers = [str(threads), *(str(array.nbytes) for array in [*given, *(like[name] for name in names)])]
    command = [str(QEMU), "-cpu", "max", str(to / "program"), *numbers]
    done = subprocess.run(command, input=b"".join(a.tobytes() for a in given), capture_output=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr.decode())
    found, at = {}, 0
    for name in names:
        size = like[name].nbytes
        found[name] = np.frombuffer(done.stdout[at : at + size], like[name].dtype).reshape(like[name].shape)
        at += size
    assert at == len(done.stdout)
    return found


IMAGES = """
images (float[1, 20, 17, 13] x) => (float[1, 10, 1, 1] y) {
  a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
  b = Relu (a)
  c = Conv <group = 32, pads = [2, 2, 2, 2], strides = [2, 2]> (b, w2)
  d = HardSwish (c)
  e = Conv (d, w3)
  f = Add (e, d)
  g = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (f)
  h = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (g, w4)
  y = GlobalAveragePool (h)
}
"""
TOKENS = """
tokens (float[2, 9, 48] x) => (float[2, 9, 48] y, float[2, 9, 9] p) {
  q = MatMul (x, wq)
  k = MatMul (x, wk)
  kt = Transpose <perm = [0, 2, 1]> (k)
  s = MatMul (q, kt)
  p = Softmax (s)
  v = MatMul (p, x)
  n = LayerNormalization (v, scale, shift)
  u = MatMul (n, wu)
  g = Gelu (u)
  d = MatMul (g, wd)
  y = Add (d, x)
}
"""
STEPS = """
steps (float[5, 2, 10] x) => (float[5, 2, 2, 21] y, float[2, 2, 21] h) {
  y, h = LSTM <hidden_size = 21, direction = "bidirectional"> (x, w, r, b)
}
"""
FUNCTIONS = """
functions (float[301] x, float16[301] z) => (float[301] a, float[301] b, float[301] c, float[301] d, float[301] e,
  float16[301] f, int32[301] g) {
  a = Exp (x)
  b = Tanh (x)
  c = Erf (x)
  d = Sin (x)
  s = Sigmoid (x)
  e = Log (s)
  f = Tanh (z)
  r = Round (x)
  g = Cast <to = 6> (r)
}
"""
QUANTIZED = """
quantized (uint8[7, 40] x) => (int32[7, 24] y) {
  y = MatMulInteger (x, w, zx)
}
"""
BYTES = """
bytes (float[3, 70] x, uint8[3, 70] u) => (uint8[3, 70] q, float s, uint8[3, 70] t, uint8[3, 70] r) {
  q, s, z = DynamicQuantizeLinear (x)
  i = Cast <to = 6> (u)
  t = Gather (table, i)
  r = QuantizeLinear (x, scale, zero)
}
"""


def case(name: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model with constants, and inputs for it."""
    random = np.random.default_rng(len(name))

    def floats(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)

    if name == "images":
        constants = {"w1": floats(32, 20, 3, 3), "b1": floats(32), "w2": floats(32, 1, 5, 5)}
        constants |= {"w3": floats(32, 32, 1, 1), "w4": floats(10, 32, 3, 3)}
        return model_of_text(IMAGES, **constants), {"x": floats(1, 20, 17, 13)}
    if name == "tokens":
        constants = {"wq": floats(48, 32), "wk": floats(48, 32), "wu": floats(48, 100), "wd": floats(100, 48)}
        constants |= {"scale": floats(48), "shift": floats(48)}
        return model_of_text(TOKENS, **constants), {"x": floats(2, 9, 48)}
    if name == "steps":
        constants = {"w": floats(2, 84, 10), "r": floats(2, 84, 21), "b": floats(2, 168)}
        return model_of_text(STEPS, **constants), {"x": floats(5, 2, 10)}
    if name == "functions":
        x = (random.standard_normal(301) * 4).astype(np.float32)
        return model_of_text(FUNCTIONS), {"x": x, "z": x.astype(np.float16)}
    if name == "bytes":
        constants = {"table": random.integers(0, 256, 256).astype(np.uint8)}
        constants |= {"scale": np.array(0.0173, np.float32), "zero": np.array(121, np.uint8)}
        inputs = {"x": floats(3, 70) * 9, "u": random.integers(0, 256, (3, 70)).astype(np.uint8)}
        return model_of_text(BYTES, **constants), inputs
    weights = {"w": random.integers(-128, 128, (40, 24)).astype(np.int8), "zx": np.array(3, np.uint8)}
    return model_of_text(QUANTIZED, **weights), {"x": random.integers(0, 256, (7, 40)).astype(np.uint8)}


@pytest.mark.parametrize("target", ["aarch64", "neoverse-n1", "neoverse-v1"])
@pytest.mark.parametrize("name", ["images", "tokens", "steps", "functions", "quantized", "bytes"])
def test_models(name: str, target: str, tmp_path: Path) -> None:
    model, inputs = case(name)
    expected = onnxc.compile(model, threads=1).run(inputs)
    found = run_there(model, inputs, expected, Options(target=target, winograd="auto"), tmp_path)
    for output, array in expected.items():
        if array.dtype.kind in "iu":
            np.testing.assert_array_equal(found[output], array)
            continue
        few = 1e-2 if array.dtype == np.float16 else 1e-4
        np.testing.assert_allclose(found[output], array, rtol=few, atol=few * 1e-2)


@pytest.mark.parametrize("name", ["images", "tokens", "steps"])
def test_threads(name: str, tmp_path: Path) -> None:
    """The pool's own code for AArch64: floating-point modes, waiting and waking, and work divided by three."""
    model, inputs = case(name)
    options = Options(target="neoverse-n1", threads=3)
    assert target_of(options).threads == 3
    expected = onnxc.compile(model, threads=1).run(inputs)
    found = run_there(model, inputs, expected, options, tmp_path)
    for output, array in expected.items():
        np.testing.assert_allclose(found[output], array, rtol=1e-4, atol=1e-6)
