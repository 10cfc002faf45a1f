"""The GPU of tests in processes of their own: `install` makes it the stand-in for the rest of the process."""

from __future__ import annotations

import os

import gpu
from onnxc.backends.cuda import build


def install() -> None:
    """What `gpu.emulated_gpu` does, for good."""
    assert not gpu.missing(), gpu.missing()
    build.compile_by_nvrtc = gpu.compile_emulated
    os.environ["ONNXC_MODEL_CACHE_BYTES"] = "0"
