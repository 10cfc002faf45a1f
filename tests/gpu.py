"""The GPU of tests: PyCUDA on the stand-in driver, with kernels compiled by g++ over the emulating prelude.

    @pytest.fixture
    def gpu(...)      from conftest: skips where g++ or PyCUDA is missing, and says so

With it `onnxc.compile(model, target="cuda")` and all that follows runs as on a machine with a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
from emulator import harness
from onnxc.backends.cuda import build
from standin import driver


def missing() -> str:
    """What keeps kernels from running here; nothing where all is there."""
    return "g++ is not installed" if harness.compiler() is None else driver.available()


def emulated(texts: Mapping[str, str], architecture: str, checked: bool = False) -> Mapping[str, bytes]:
    """Images that the stand-in driver loads, of one library with all the kernels."""
    if not texts:
        return {}
    return dict.fromkeys(texts, harness.image_of("\n".join(texts.values()), checked))


def compile_emulated(progress: Callable[[int, int], None] | None = None) -> build.CompileKernels:
    """In the place of NVRTC."""
    return emulated


@contextmanager
def emulated_gpu(checked: bool = False) -> Iterator[None]:
    """Inside, "cuda" is the stand-in; `checked` also reports races and wrong addresses, as failed launches."""
    if missing():
        pytest.skip(f"kernels cannot be run here: {missing()}")
    with pytest.MonkeyPatch.context() as patch:
        images = functools.partial(emulated, checked=checked)
        patch.setattr(build, "compile_by_nvrtc", lambda progress=None: images)
        # What is compiled here must not be found by a process that has a GPU.
        patch.setenv("ONNXC_MODEL_CACHE_BYTES", "0")
        try:
            yield
        finally:
            driver.reset()  # a kernel that failed has broken the context, as it does on a GPU
