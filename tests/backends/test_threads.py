"""How compiled models use threads: what is planned for how many, and what becomes of work that is divided."""

from __future__ import annotations

import pytest
from onnxc.compiler import options
from onnxc.compiler.options import Options, target_of


def test_schedules_are_planned_for_the_threads_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cache decides: code for one thread is not taken for two."""
    monkeypatch.setattr(options, "available_threads", lambda: 2)
    assert [target_of(Options(threads=n)).threads for n in (None, 1, 2, 64)] == [2, 1, 2, 2]
    assert Options(threads=1).decisive != Options(threads=2).decisive == Options().decisive
    monkeypatch.setattr(options, "available_threads", lambda: 8)
    assert target_of(Options()).threads == 8
    named = [target_of(Options(target="x86-64-v3", threads=n)).threads for n in (None, 16)]
    assert named == [1, 16]  # of another machine only the caller knows how many it has
