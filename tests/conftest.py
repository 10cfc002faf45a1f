"""Settings of hypothesis for all tests."""

import os

from hypothesis import HealthCheck, settings

# No test depends on how fast or how luckily its examples are found; in CI the same ones are found each time.
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("suite")
