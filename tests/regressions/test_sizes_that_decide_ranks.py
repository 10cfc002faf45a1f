"""Squeeze without axes: which axes are dropped hangs on the sizes of the run."""

from __future__ import annotations

import numpy as np
import onnxc
from against_onnxruntime import assert_agree
from onnxc.compiler.specialize import SpecializingExecutable
from small_models import model_of_text


def test_squeeze_of_an_axis_that_may_be_one() -> None:
    """One form of the code serves all sizes of which the same ones are 1."""
    model = model_of_text(
        """squeezed (float[batch, frames, 3] x, float[2] scale) => (float[n] y) {
            scaled = Mul (x, part)
            sum = ReduceSum <keepdims = 1> (scaled, last)
            squeezed = Squeeze (sum)
            factor = ReduceSum <keepdims = 0> (scale, first)
            y = Mul (squeezed, factor)
        }""",
        part=np.array([1, 2, 3], np.float32),
        last=np.array([2]),
        first=np.array([0]),
    )
    random = np.random.default_rng(0)
    sizes = ((1, 5), (1, 9), (3, 1), (2, 4), (3, 7), (1, 1))
    cases = [{"x": random.random((b, n, 3), np.float32), "scale": random.random(2, np.float32)} for b, n in sizes]
    assert_agree(model, *cases)
    executable = onnxc.compile(model)
    assert isinstance(executable, SpecializingExecutable)
    forms = {id(executable.specialized(case)) for case in cases}
    assert len(forms) == 4
    assert executable.parameters == ()
