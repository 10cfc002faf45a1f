"""What fuzzing found, each shrunk to a few nodes and named."""

from __future__ import annotations

import numpy as np
from single_node import assert_equal, model_of, reference, run_node


def test_shape_of_no_axes() -> None:
    """`start` and `end` may leave nothing, and a scalar has nothing."""
    for x, attributes in ((np.float32(3), {}), (np.zeros((2, 3), np.float32), {"start": 1, "end": -3})):
        for symbolic in (False, True):
            (found,) = run_node("Shape", {"x": np.asarray(x)}, symbolic=symbolic, **attributes)
            assert (found.dtype, found.shape) == (np.int64, (0,))


def test_tiles_of_an_empty_axis() -> None:
    """The axis of no elements is repeated too."""
    x = np.zeros((3, 0, 2), np.float64)
    for symbolic in (False, True):
        (found,) = run_node("Tile", {"x": x, "repeats": np.array([2, 3, 1])}, constant=["repeats"], symbolic=symbolic)
        assert found.shape == (6, 0, 2)
