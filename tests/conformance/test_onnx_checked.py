"""ONNX's own suite in the mode in which kernels check each access to memory: no case reports one outside of a buffer.

A fixed twelfth of the cases is run, all of them where $ONNXC_CHECKED_CASES is "all", as in `make sanitize`.
"""

from __future__ import annotations

import os
import zlib

import pytest

from .suite import cases, check_case, failing

SHARE = 1 if os.environ.get("ONNXC_CHECKED_CASES") == "all" else 12
CHOSEN = [name for name in sorted(cases()) if name not in failing() and zlib.crc32(name.encode()) % SHARE == SHARE // 2]


@pytest.mark.parametrize("name", CHOSEN)
def test_case(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXC_CHECK_BOUNDS", "1")
    check_case(name)


def test_a_twelfth_is_chosen() -> None:
    assert 100 < len(CHOSEN) * SHARE / 12 < 250
