"""Attention on CPUs against f64: shapes, masks, groups of heads, other vector widths, layouts in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from attention_graphs import (
    BIASED,
    CAPPED,
    CAUSAL,
    CHOSEN,
    PLAIN,
    WHOLE,
    WINDOW,
    ZEROED,
    attention_text,
    expected_attention,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxc.backends.cpu.kernels.attention import few
from onnxc.backends.cpu.schedules import schedule
from onnxc.compiler.driver import compile_graph
from onnxc.compiler.graph_text import specialised
from onnxc.compiler.options import Options
from onnxc.ir.graph import Graph
from onnxc.ir.target import Target
from onnxc.passes.lower import lower
from onnxc.passes.pipeline import parse_pipeline, run_pipeline
from pass_checks import parsed

Array = np.ndarray[Any, Any]
TOLERANCE = 2e-6
"""Of the greatest number of the result."""

SCORES = {
    "plain": PLAIN,
    "causal": CAUSAL,
    "window": WINDOW,
    "capped": CAPPED,
    "biased": BIASED,
    "row": BIASED,
    "chosen": CHOSEN,
}
MASKS = {"biased": "T[b, H, l, s]", "row": "T[b, 1, 1, s]", "chosen": "bool[b, 1, l, s]"}


@dataclass(frozen=True)
class Model:
    """Attention of [b, l, heads, ...]: keys and values have `groups` heads, queries and keys `width` channels, values
    `depth`. Of `zeroed` rows that have no score give 0."""

    scores: str = "plain"
    heads: int = 2
    groups: int = 2
    width: int = 16
    depth: int = 16
    zeroed: bool = False
    type: str = "f32"

    def graph(self, **sizes: int) -> Graph:
        """For given sizes of b, l and s, the others open."""
        mask = MASKS.get(self.scores)
        text = attention_text(
            self.type, self.heads, self.groups, self.width, self.depth, SCORES[self.scores],
            ZEROED if self.zeroed else WHOLE, f", %m: {mask}" if mask else "",
        )  # fmt: skip
        graph = specialised(parsed(text), sizes, {})
        graph = run_pipeline(graph, parse_pipeline("canonicalize,fold,cleanup,attention,fuse"))
        assert sum(node.op == "onnxc.Attention" for node in graph.walk()) == 1
        return graph

    def check(self, sizes: Sequence[int], known: bool = True, seed: int = 0, target: Target | None = None) -> None:
        """Compiles for (b, l, s), or for any where not `known`, and compares with f64 on random operands."""
        b, rows, keys = sizes
        random = np.random.default_rng(seed)
        shapes = [(b, rows, self.heads * self.width), *((b, keys, self.groups * n) for n in (self.width, self.depth))]
        q, k, v = (random.normal(size=shape).astype(np.float32) for shape in shapes)
        others, mask = self.mask(b, rows, keys, random)
        graph = self.graph(**dict(zip("bls", sizes, strict=True))) if known else self.graph()
        model = compile_graph(graph, target or Target.host(), Options(threads=1))
        actual = np.asarray(model(q, k, v, *others), np.float64)  # type: ignore[operator]
        expected = self.expected(q, k, v, mask)
        np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
        top = np.nanmax(np.abs(expected), initial=1e-30)
        assert np.nanmax(np.abs(actual - expected), initial=0) <= TOLERANCE * top

    def mask(self, b: int, rows: int, keys: int, random: np.random.Generator) -> tuple[list[Array], Any]:
        """The mask operand, if there is one, and what is added to scores."""
        place, key = np.arange(keys - rows, keys)[:, None], np.arange(keys)
        if self.scores in ("causal", "window"):
            far = place - 3 >= key if self.scores == "window" else False
            return [], np.where((key <= place) & ~np.asarray(far), 0, -np.inf)
        if self.scores == "chosen":
            chosen = random.random((b, 1, rows, keys)) < 0.5
            chosen[:, :, ::3] = False
            return [chosen], np.where(chosen, 0, -np.inf)
        if self.scores in MASKS:
            shape = (b, 1, 1, keys) if self.scores == "row" else (b, self.heads, rows, keys)
            bias = random.normal(size=shape).astype(np.float32)
            return [bias], bias.astype(np.float64)
        return [], 0

    def expected(self, q: Array, k: Array, v: Array, mask: Any) -> Array:
        cap, empty = 2.0 * (self.scores == "capped"), 0.0 if self.zeroed else np.nan
        return expected_attention(q, k, v, self.heads, self.groups, mask, cap, empty)


@settings(max_examples=12, deadline=None)
@given(
    scores=st.sampled_from(sorted(SCORES)),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 300)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    known=st.booleans(),
)
def test_shapes_and_masks(
    scores: str, sizes: tuple[int, int, int], heads: tuple[int, int], widths: tuple[int, int], known: bool
) -> None:
    Model(scores, *heads, *widths).check(sizes, known)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("sizes", [(1, 32, 128), (2, 33, 127), (1, 200, 350), (1, 1, 1030), (1, 3, 5), (2, 50, 1)])
def test_blocks_and_rows(sizes: tuple[int, int, int], known: bool) -> None:
    Model(width=64, depth=64).check(sizes, known)


@pytest.mark.parametrize("rows", [1, 40])
def test_the_past_alone_is_seen(rows: int) -> None:
    Model("causal").check((1, rows, 700))
    Model("causal").check((1, rows, 40), known=False)
    Model("window").check((1, rows, 700))


@pytest.mark.parametrize("rows", [2, 34])
@pytest.mark.parametrize("zeroed", [True, False])
def test_rows_without_any_score(zeroed: bool, rows: int) -> None:
    Model("chosen", zeroed=zeroed).check((1, rows, 200))


@pytest.mark.parametrize("rows", [1, 20])
def test_no_queries_and_no_keys(rows: int) -> None:
    model = compile_graph(Model(zeroed=True).graph(), Target.host(), Options(threads=1))
    x = np.ones((1, rows, 32), np.float32)
    assert model(x[:, :0], x, x).shape == (1, 0, 2, 16)  # type: ignore[operator]
    assert not np.asarray(model(x, x[:, :0], x[:, :0])).any()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["haswell", "x86-64", "x86-64-v3"])
def test_other_widths_of_vectors(name: str) -> None:
    target = replace(Target.parse(name), threads=1)
    for sizes in ((1, 45, 150), (1, 2, 150)):
        Model("causal", width=20, depth=24).check(sizes, target=target)
        Model("row", width=32, depth=21).check(sizes, known=False, target=target)


def kernels(graph: Graph, target: Target) -> list[str]:
    return list(lower(graph, schedule, target).kernels)


def test_one_kernel_reads_slices_of_a_merged_product_in_place() -> None:
    graph = parsed(
        """
        graph @g(%x: f32[1, 40, 96]) -> (%y: f32[1, 40, 2, 16]) {
          %scale = constant 0.25 : f32[]
          %q, %k, %v = Split(%x) {axis = 2, split = [32, 32, 32]} : f32[1, 40, 32], f32[1, 40, 32], f32[1, 40, 32]
          %q1 = Reshape(%q) {shape = [1, 40, 2, 16]} : f32[1, 40, 2, 16]
          %k1 = Reshape(%k) {shape = [1, 40, 2, 16]} : f32[1, 40, 2, 16]
          %v1 = Reshape(%v) {shape = [1, 40, 2, 16]} : f32[1, 40, 2, 16]
          %q2 = Transpose(%q1) {perm = [0, 2, 1, 3]} : f32[1, 2, 40, 16]
          %k2 = Transpose(%k1) {perm = [0, 2, 3, 1]} : f32[1, 2, 16, 40]
          %v2 = Transpose(%v1) {perm = [0, 2, 1, 3]} : f32[1, 2, 40, 16]
          %p = MatMul(%q2, %k2) : f32[1, 2, 40, 40]
          %s = Mul(%p, %scale) : f32[1, 2, 40, 40]
          %w = Softmax(%s) : f32[1, 2, 40, 40]
          %o = MatMul(%w, %v2) : f32[1, 2, 40, 16]
          %y = Transpose(%o) {perm = [0, 2, 1, 3]} : f32[1, 40, 2, 16]
        }
        """
    )
    graph = run_pipeline(graph, parse_pipeline("canonicalize,fold,cleanup,attention,fuse"))
    assert len(kernels(graph, Target.parse("x86-64-v4"))) == 1


def test_operands_that_are_computed_are_copied_first() -> None:
    """Values of 17 channels cannot be read by whole vectors where there are no masks."""
    sizes = {"b": 1, "l": 40, "s": 40}
    assert len(kernels(Model(depth=17).graph(**sizes), Target.parse("haswell"))) == 2
    assert len(kernels(Model(depth=17).graph(**sizes), Target.parse("x86-64-v4"))) == 1
    assert len(kernels(Model(type="f16").graph(**sizes), Target.parse("x86-64-v4"))) == 3


def test_few_queries_are_done_one_by_one() -> None:
    model = Model(width=64, depth=64)
    names = [kernels(model.graph(b=1, l=rows, s=100), Target.parse("x86-64-v4"))[0] for rows in (1, 30)]
    assert names[0].startswith("attention_64_1") and names[1].startswith("attention_64_32x8")


def test_the_choice_between_rows_and_blocks_follows_the_lanes() -> None:
    from onnxc.backends.kernels.attention_problem import problem_of
    from onnxc.passes.regions import Region

    seen: list[int] = []

    def watching(region: Region, target: Target) -> Any:
        if region.anchor is not None and region.anchor.op == "onnxc.Attention":
            found = problem_of(region)
            assert found is not None
            seen.append(few(found[0], target))
        return schedule(region, target)

    graph = Model(width=64, depth=64).graph()
    for name in ("x86-64-v4", "haswell", "x86-64"):
        lower(graph, watching, Target.parse(name))
    assert seen == sorted(seen, reverse=True) and seen[0] > seen[-1] >= 1
