"""What `onnxc run` tells of outputs whose elements numpy's own types do not have, or that are no plain numbers."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
from onnxc.tools.commands.run import summary


def test_first_values_of_all_kinds() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert summary(np.array([1 + 2j, 3], np.complex64))["first"] == ["(1+2j)", "(3+0j)"]
        assert summary(np.array([1.5, -2], ml_dtypes.float8_e5m2))["first"] == [1.5, -2.0]
        assert summary(np.array([7, -8], ml_dtypes.int4))["first"] == [7.0, -8.0]
        assert summary(np.array([2**63 - 1]))["first"] == [2**63 - 1]
        assert summary(np.array([0.5, np.inf], np.float32))["first"] == [0.5, "inf"]
        assert summary(np.array(["a"], object))["first"] == ["a"]
