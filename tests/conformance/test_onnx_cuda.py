"""ONNX's own suite, compiled for a GPU: every case that passes on the CPU passes there too.

The kernels are those that ship; they are run by an emulator (see `gpu.py`). A fixed tenth of the cases is run, all of
them where $ONNXC_CUDA_CASES is "all", as in `make conformance`.
"""

from __future__ import annotations

import os
import zlib

import pytest

from .suite import FAILING_CUDA, cases, check_case, failing

SHARE = 1 if os.environ.get("ONNXC_CUDA_CASES") == "all" else 10
LISTED = failing(FAILING_CUDA)
CHOSEN = [name for name in sorted(cases()) if name not in failing() and zlib.crc32(name.encode()) % SHARE == 0]


@pytest.mark.parametrize("name", CHOSEN)
def test_case(name: str, gpu: None, request: pytest.FixtureRequest) -> None:
    if name in LISTED:
        request.applymarker(pytest.mark.xfail(strict=True, reason=LISTED[name]))
    check_case(name, "CUDA")


def test_lists_do_not_overlap() -> None:
    assert set(LISTED) <= set(cases()) - set(failing())


def test_a_tenth_is_chosen() -> None:
    assert 100 < len(CHOSEN) * SHARE / 10 < 250
