"""500 mutants of real models: each is refused with an OnnxcError or runs correctly, in bounded memory and time."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("resource", reason="the limits of a worker are those of Unix")

from fuzz.hostile import FINE, outcomes, store

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory by /proc")


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize(("first", "checked"), [(0, False), (125, False), (250, True), (375, True)])
def test_mutants_are_refused_or_run_correctly(bank: Path, first: int, checked: bool) -> None:
    found = list(outcomes(bank, first, first + 125, checked))
    assert len(found) == 125
    wrong = [outcome for outcome in found if outcome["outcome"] not in FINE]
    assert not wrong, "\n".join(f"seed {outcome['at']}: {outcome}" for outcome in wrong)
    kinds = [outcome["outcome"] for outcome in found]
    assert kinds.count("refused") > 25, "mutations that change nothing test nothing"
    assert kinds.count("agrees") > 5, "mutations that break everything test the importer alone"
