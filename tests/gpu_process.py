"""The GPU of tests in processes of their own: `install` makes it the stand-in for the rest of the process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import gpu
from onnxc.backends.cuda import build

FAULTS = {"sinhf(": "coshf(", "acosf(": "__builtin_trap(), acosf("}
"""What `install_faulty` makes of calls in kernels: a wrong result, and the end of the process."""


def install() -> None:
    """What `gpu.emulated_gpu` does, for good."""
    assert not gpu.missing(), gpu.missing()
    build.compile_by_nvrtc = gpu.compile_emulated
    os.environ["ONNXC_MODEL_CACHE_BYTES"] = "0"


def install_faulty() -> None:
    """A GPU that computes some functions wrongly."""
    install()

    def compile_faulty(progress: Callable[[int, int], None] | None = None) -> build.CompileKernels:
        def images(texts: Mapping[str, str], architecture: str) -> Mapping[str, bytes]:
            changed = dict(texts)
            for call, fault in FAULTS.items():
                changed = {name: text.replace(call, fault) for name, text in changed.items()}
            return gpu.emulated(changed, architecture)

        return images

    build.compile_by_nvrtc = compile_faulty
