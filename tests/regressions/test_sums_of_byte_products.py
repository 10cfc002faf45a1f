"""A sum of 16 products of bytes lost three quarters of them: LLVM 22 takes a tree of halves for its dot instruction."""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from onnxc.ir.graph import Constant
from onnxc.ir.text import parse_graph

TEXT = """
graph @g(%x: {type}[1, 3, 3, 16]) -> (%y: i32[1, 3, 3, 16]) {{
  %w = constant @"w" : i8[16, 16, 1, 1]
  %y = ConvInteger(%x, %w) {{layout = "channels_last"}} : i32[1, 3, 3, 16]
}}
"""


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_sixteen_products_of_bytes_are_summed_whole(dtype: type) -> None:
    random = np.random.default_rng(0)
    weights = random.integers(-128, 128, (16, 16, 1, 1)).astype(np.int8)
    info = np.iinfo(dtype)
    x = random.integers(info.min, info.max + 1, (1, 3, 3, 16)).astype(dtype)
    text = TEXT.format(type="u8" if dtype is np.uint8 else "i8")
    y = onnxc.compile(parse_graph(text, {"w": Constant("w", weights)}))(x)
    np.testing.assert_array_equal(y, x.astype(np.int32) @ weights[:, :, 0, 0].T.astype(np.int32))
