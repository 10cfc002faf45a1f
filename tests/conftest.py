"""Settings of hypothesis for all tests; what many of them need."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# No test depends on how fast or how luckily its examples are found; in CI the same ones are found each time.
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="session")
def checked_plans() -> Iterator[None]:
    """Every memory plan that is made in a test's process is checked: see `plan_hook.py`."""
    from plan_hook import checking_plans

    with checking_plans():
        yield


@pytest.fixture
def gpu() -> Iterator[None]:
    """A GPU: see `gpu.py`."""
    from gpu import emulated_gpu

    with emulated_gpu():
        yield
