"""What artifacts hold of a model for GPUs, and what is said where no GPU can be used. Needs neither driver nor g++."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxc
import pytest
from onnxc.backends.cuda.launch import Launch
from onnxc.backends.cuda.runtime import driver as runtime_driver
from onnxc.backends.cuda.runtime.code import DeviceCode, decode, encode
from onnxc.ir.dims import ceildiv, dim_max, symbol
from onnxc.ir.dtypes import BOOL, F16, I64
from onnxc.ir.program import Assign, Bind, Choose, Memory, Place, Repeat, Run
from standin import driver

N, K, INDEX = symbol("$batch.1"), symbol("$k", None), symbol("$i")

CODE = DeviceCode(
    images={"sm_90": {"gemm_1": b"cubin"}, "compute_80": {"gemm_1": b"ptx"}},
    launches={"gemm_1": Launch(ceildiv(symbol("$rows"), 128) * 3, 256, 98304, 64), "copy": Launch(1, 32, 0, 32)},
    sizes={"gemm_1": ("$rows", "$depth"), "copy": ()},
    segments=(
        (
            Run("gemm_1", (Place("x", N * 2), Place("y")), (dim_max(N, 4), 7), ("conv/1", "relu")),
            Bind("$k", Place("sizes", 3), I64, -5),
        ),
        (
            Assign("$j", K + 1),
            Choose(
                Place("flag"),
                (Run("copy", (Place("x"), Place("y", K)), ()),),
                (Repeat("$i", N, Place("flag"), (Run("copy", (Place("x", INDEX * 4), Place("y")), ()),), "$count"),),
            ),
            Repeat("$i", None, Place("flag"), ()),
        ),
    ),
    memories={
        "x": Memory("x", F16, N * 8, "input"),
        "y": Memory("y", F16, K, "output", 1),
        "sizes": Memory("sizes", I64, 4, "arena"),
        "flag": Memory("flag", BOOL, 1, "constant"),
    },
    results=("y",),
)


def test_code_survives_an_artifact() -> None:
    assert decode(json.loads(json.dumps(encode(CODE))), CODE.images) == CODE


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found["kernels"]["copy"].__setitem__(0, "rows"),
        lambda found: found["kernels"]["copy"].__setitem__(3, 16),
        lambda found: found["kernels"]["copy"].__setitem__(1, "32"),
        lambda found: found["kernels"].pop("gemm_1"),
        lambda found: found["segments"][0][0].__setitem__(0, "jump"),
        lambda found: found["segments"][0][0].pop(),
        lambda found: found["segments"][0][0][2].__setitem__(0, ["nowhere", 0]),
        lambda found: found["segments"][0][0].__setitem__(3, [1]),
        lambda found: found["memories"][0].__setitem__(3, "secret"),
        lambda found: found["memories"][0].__setitem__(1, "f17"),
        lambda found: found["memories"][0].__setitem__(2, "batch +"),
        lambda found: found["results"].append("z"),
        lambda found: found.pop("results"),
    ],
)
def test_damage_is_noticed(damage: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads(json.dumps(encode(CODE)))
    damage(found)
    with pytest.raises((KeyError, TypeError, ValueError)):
        decode(found, CODE.images)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'pycuda'", name="pycuda"),
            r"pycuda is not installed: `pip install onnxc\[",
        ),
        (
            ImportError("libcuda.so.1: cannot open shared object file"),
            r"NVIDIA's driver is not installed .*but not run",
        ),
        (ImportError("_driver.so: undefined symbol: cuCtxCreate_v4"), r"PyCUDA does not fit .*install_pycuda"),
        (ImportError("libcuda.so.1: undefined symbol: cuCtxCreate_v4"), r"PyCUDA does not fit .*install_pycuda"),
    ],
)
def test_what_is_missing_is_said(error: ImportError, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> Any:
        raise error

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(onnxc.TargetError, match=message):
        runtime_driver.Device()


def in_new_process(code: str, **environment: str) -> str:
    folder = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_the_runtime_is_imported_without_pycuda() -> None:
    code = "import sys, onnxc.compiler.cuda_executable as e\nprint('pycuda' in sys.modules)"
    assert in_new_process(code) == "False\n"


def test_a_machine_without_a_gpu() -> None:
    code = """
from standin import driver
reason = driver.available()
from onnxc.backends.cuda.runtime.driver import open_device
try:
    open_device()
except Exception as error:
    print(type(error).__name__, error, sep=": ")
"""
    said = in_new_process(code, STANDIN_NO_DEVICE="1")
    if driver.available():
        assert "TargetError: target cuda: " in said or not said  # as this machine is
    else:
        assert "TargetError: target cuda: the GPU cannot be used: cuInit failed: no CUDA-capable device" in said


def test_what_is_left_at_the_end_of_the_process_is_given_back_quietly() -> None:
    code = """
from standin import driver
if not driver.available():
    import numpy as np, threading
    from standin import models
    from onnxc.compiler.cuda_executable import CudaExecutable
    x = np.ones((2, 2), np.float32)
    def work():
        global total, z
        total = CudaExecutable(models.total())
        total(x, x)
        z = total.run({"x": x, "y": x}, on_device=True)["z"]
        capsule = z.__dlpack__()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""
    folder = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
