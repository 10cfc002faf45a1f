"""Scan along any axes is compiled wholly."""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from against_onnxruntime import assert_agree
from onnxc.compiler.interface import Interface
from small_models import model_of_text


@pytest.mark.parametrize("reads", [(1, 0), (-1, 1), (2, -2), (0, 0)])
@pytest.mark.parametrize("writes", [(0, 1), (1, -1), (-3, 0)])
def test_scan_along_other_axes(reads: tuple[int, int], writes: tuple[int, int]) -> None:
    model = model_of_text(f"""scan (float[a, b] s, float[n, p, q] x, float[u, v] z)
            => (float[a, b] f, float[a1, a2, a3] r1, float[a4, a5] r2) {{
        f, r1, r2 = Scan <num_scan_inputs = 2, scan_input_axes = [{reads[0]}, {reads[1]}],
            scan_output_axes = [{writes[0]}, {writes[1]}], scan_output_directions = [0, 1],
            body = body (float[a, b] state, float[c, d] row, float[e] other)
                => (float[a, b] next, float[c, d] first, float[e] second) {{
            total = ReduceSum <keepdims = 0> (row)
            next = Add (state, total)
            first = Neg (row)
            sum = ReduceSum <keepdims = 0> (next)
            second = Add (other, sum)
        }}> (s, x, z)
    }}""")
    assert isinstance(onnxc.compile(model), Interface)
    random = np.random.default_rng(0)
    sizes = [5, 5]
    sizes[reads[1]] = (3, 4, 2)[reads[0]]
    shapes = {"s": (2, 3), "x": (3, 4, 2), "z": tuple(sizes)}
    assert_agree(model, {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()})
