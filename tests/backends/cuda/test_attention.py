"""Attention on the emulator against f64, and what NVRTC makes of it."""

from __future__ import annotations

import math
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
    FINITE,
    PLAIN,
    WHOLE,
    WINDOW,
    ZEROED,
    attention_text,
    expected_attention,
)
from cuda_lowered import run_program
from emulator import harness
from onnxc.backends.cuda import nvrtc, report
from onnxc.backends.cuda.schedules import schedule
from onnxc.backends.cuda.source import prelude, render_kernel
from onnxc.backends.kernels.attention_scores import KEY, PRODUCT, QUERY, score_of
from onnxc.compiler.graph_text import specialised
from onnxc.ir import scalars as s
from onnxc.ir.dims import known_le, symbol
from onnxc.ir.dtypes import BOOL, BY_NAME, F16, F32
from onnxc.ir.program import Program
from onnxc.ir.target import Target
from onnxc.passes.lower import lower
from onnxc.passes.pipeline import parse_pipeline, run_pipeline
from pass_checks import parsed

Array = np.ndarray[Any, Any]
TARGET = Target.parse("cuda:sm_80,sm_90")
KINDS = {"f32": ("f32", "f32"), "tf32": ("f32", "tf32"), "f16": ("f16", "f32"), "bf16": ("bf16", "f32")}
"""For each way to multiply the type of the operands, and in which products of f32 may be computed."""
TOLERANCE = {"f32": 1e-5, "tf32": 1.5e-3, "f16": 1.5e-3, "bf16": 1.2e-2}
LARGE, SMALL = 1, 1000
"""Multiprocessors for which tiles are large, or as small as can be."""
emulated = pytest.mark.skipif(harness.compiler() is None, reason="the emulator needs g++")
compiled = pytest.mark.skipif(not nvrtc.is_available(), reason="NVRTC is not installed")


@dataclass(frozen=True)
class Model:
    """Attention of [b, l, heads, ...]: keys and values have `groups` heads, queries and keys `width` channels, values
    `depth`. `scores` are lines that make %scores of %scaled, `weights` lines that make %whole of %weights."""

    kind: str = "f32"
    heads: int = 2
    groups: int = 2
    width: int = 16
    depth: int = 16
    scores: str = PLAIN
    inputs: str = ""
    weights: str = WHOLE

    @property
    def type(self) -> str:
        return KINDS[self.kind][0]

    def program(self, multiprocessors: int | None = None, **sizes: int) -> Program:
        """For given sizes, the others open; a GPU of fewer multiprocessors gets larger tiles."""
        text = attention_text(
            self.type, self.heads, self.groups, self.width, self.depth, self.scores, self.weights, self.inputs
        )
        graph = specialised(parsed(text), sizes, {})
        graph = run_pipeline(graph, parse_pipeline("canonicalize,fold,cleanup,attention,fuse"))
        assert sum(node.op == "onnxc.Attention" for node in graph.walk()) == 1
        assert not any(node.op in ("Softmax", "MatMul") for node in graph.walk())
        target = replace(TARGET, products=KINDS[self.kind][1])
        return lower(graph, schedule, replace(target, multiprocessors=multiprocessors or target.multiprocessors))

    def operands(self, b: int, rows: int, keys: int, seed: int = 0) -> list[Array]:
        random = np.random.default_rng(seed)
        shapes = [(b, rows, self.heads * self.width), *((b, keys, self.groups * n) for n in (self.width, self.depth))]
        return [random.normal(size=shape).astype(BY_NAME[self.type].numpy) for shape in shapes]

    def expected(self, q: Array, k: Array, v: Array, mask: Any = 0, cap: float = 0, empty: float = np.nan) -> Array:
        """As `attention_graphs.expected_attention` has it."""
        return expected_attention(q, k, v, self.heads, self.groups, mask, cap, empty)

    def check(
        self,
        program: Program,
        sizes: Sequence[int],
        others: Sequence[Array] = (),
        checked: bool = False,
        seed: int = 0,
        **known: Any,
    ) -> None:
        """Runs the program on random operands of sizes (b, l, s) and compares with f64, relative to the greatest."""
        q, k, v = self.operands(*sizes, seed)
        expected = self.expected(q, k, v, **known)
        (result,) = run_program(program, [q, k, v, *others], checked, seed)
        actual = result.astype(np.float64).reshape(expected.shape)
        np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
        top = np.nanmax(np.abs(expected), initial=1e-30)
        assert np.nanmax(np.abs(actual - expected), initial=0) <= TOLERANCE[self.kind] * top


def causal(rows: int, keys: int, masked: float = -np.inf) -> Array:
    """What is added to scores whose key is behind the query, the last query being the last key."""
    return np.where(np.arange(keys) <= np.arange(keys - rows, keys)[:, None], 0, masked)


@emulated
@pytest.mark.parametrize("multiprocessors", [LARGE, SMALL])
@pytest.mark.parametrize("kind", KINDS)
def test_one_kernel_for_all_sizes(kind: str, multiprocessors: int) -> None:
    model = Model(kind, width=24, depth=40)
    program = model.program(multiprocessors)
    assert len(program.kernels) == 1
    for seed, sizes in enumerate([(1, 1, 1), (2, 5, 3), (1, 16, 64), (1, 33, 70), (2, 130, 33), (1, 65, 129)]):
        model.check(program, sizes, seed=seed)


@emulated
@pytest.mark.parametrize("kind", KINDS)
def test_no_queries_and_no_keys(kind: str) -> None:
    model = Model(kind)
    program = model.program()
    model.check(program, (1, 0, 4))
    q, k, v = model.operands(1, 3, 0)
    (result,) = run_program(program, [q, k, v])
    assert not result.astype(np.float32).any()


@emulated
@pytest.mark.parametrize(("width", "depth"), [(64, 64), (128, 128), (17, 20), (80, 256), (256, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_widths(kind: str, width: int, depth: int) -> None:
    model = Model(kind, heads=1, groups=1, width=width, depth=depth)
    sizes = {"b": 1, "l": 35, "s": 50}
    model.check(model.program(**sizes), (1, 35, 50))
    if width in (64, 256):
        model.check(model.program(LARGE, b=2, l=140, s=100), (2, 140, 100))


@emulated
@pytest.mark.parametrize("multiprocessors", [LARGE, SMALL])
@pytest.mark.parametrize("kind", KINDS)
def test_the_past_alone_is_seen(kind: str, multiprocessors: int) -> None:
    model = Model(kind, scores=CAUSAL)
    program = model.program(multiprocessors)
    for b, rows, keys in [(1, 1, 1), (1, 70, 70), (1, 20, 150), (2, 3, 64)]:
        model.check(program, (b, rows, keys), mask=causal(rows, keys), seed=rows)


@emulated
def test_other_masks_by_position() -> None:
    rows, keys = 40, 150
    model = Model(scores=FINITE)
    model.check(model.program(SMALL), (1, rows, keys), mask=causal(rows, keys))
    model = Model("f16", scores=WINDOW)
    far = np.where(np.arange(keys - rows, keys)[:, None] - 3 < np.arange(keys), 0, -np.inf)
    model.check(model.program(SMALL), (1, rows, keys), mask=causal(rows, keys) + far)


def turns(model: Model, **sizes: int) -> str:
    """How many tiles of keys a block goes through, in the text."""
    (kernel,) = model.program(SMALL, **sizes).kernels.values()
    text = render_kernel(kernel)
    return "\n".join(line for line in text.splitlines() if "first_turn = " in line or "end_turn = " in line)


def test_tiles_in_which_no_score_counts_are_left_out() -> None:
    assert "first_query" not in turns(Model())
    assert "first_query" not in turns(Model(scores=CAPPED))
    # What is not infinite may be left out where every row has another score.
    assert "first_query" not in turns(Model(scores=FINITE))
    for found in (turns(Model(scores=CAUSAL)), turns(Model(scores=FINITE), l=100, s=150)):
        first, end = found.splitlines()
        assert "first_query" in end and "first_query" not in first
    first, end = turns(Model(scores=WINDOW)).splitlines()
    assert "first_query" in end and "first_query" in first
    assert "first_query" not in turns(Model(scores=WINDOW.replace("%lowest", "%least")), l=100, s=150)


KEY_IS_LATE = s.binary("lt", s.index(symbol(QUERY) + 5), s.index(symbol(KEY)))
KEY_IS_LATER = s.binary("le", s.index(symbol(QUERY) + symbol("past", 6)), s.index(symbol(KEY)))
PRODUCT_OF_BOTH = s.Element(F32, 1, PRODUCT, (symbol(QUERY), symbol(KEY)))
MANY = s.const(-3e38, F32)


def masks() -> dict[str, s.Scalar]:
    """Scores in which keys 6 behind the query count for nothing."""
    scaled, zero, one = PRODUCT_OF_BOTH * 0.25, s.const(0, F32), s.const(1, F32)
    lowest = s.const(-math.inf, F32)
    return {
        "chosen": s.select(KEY_IS_LATE, lowest, scaled),
        "added": scaled + s.select(KEY_IS_LATE, lowest, zero),
        "large numbers": s.select(KEY_IS_LATE, MANY, scaled),
        "both": s.select(s.binary("or", KEY_IS_LATE, KEY_IS_LATER), lowest, scaled),
        "by numbers": scaled + s.select(KEY_IS_LATE, MANY, zero) * s.select(KEY_IS_LATE, one, zero),
        "halves": s.cast(s.cast(scaled, F16) + s.cast(s.select(KEY_IS_LATE, lowest, zero), F16), F32),
    }


@pytest.mark.parametrize("case", masks())
def test_what_a_mask_hides(case: str) -> None:
    score = score_of(masks()[case])
    assert known_le(score.end_key(0, 9, 100), 15) and known_le(15, score.end_key(0, 9, 100))
    assert score.first_key(0, 9) == 0
    if case not in ("by numbers", "halves"):
        assert score.seen == PRODUCT_OF_BOTH and score.scale == 0.25
    assert score.seen is not None and not any(isinstance(part, s.Select) for part in s.walk(score.seen))
    assert score.moderate == (case in ("chosen", "added", "both"))
    assert s.Const(BOOL, 1, True) == score.is_seen(0, 9, 0, 6)
    assert s.Const(BOOL, 1, False) == score.is_seen(0, 9, 0, 7)


@emulated
@pytest.mark.parametrize("kind", KINDS)
def test_masks_from_memory(kind: str) -> None:
    b, rows, keys = 2, 21, 70
    random = np.random.default_rng(3)
    model = Model(kind, scores=BIASED, inputs=", %m: T[b, 1, 1, s]")
    mask = random.normal(size=(b, 1, 1, keys)).astype(BY_NAME[model.type].numpy)
    mask[1, ..., 60:] = -6e4  # finite: a row may have nothing else
    model.check(model.program(), (b, rows, keys), [mask], mask=mask.astype(np.float64))
    mask[...] = -6e4
    model.check(model.program(), (b, rows, keys), [mask], mask=mask.astype(np.float64))
    model = Model(kind, scores=BIASED, inputs=", %m: T[b, H, l, s]")
    mask = random.normal(size=(b, 2, rows, keys)).astype(BY_NAME[model.type].numpy)
    model.check(model.program(SMALL), (b, rows, keys), [mask], mask=mask.astype(np.float64))


@emulated
@pytest.mark.parametrize("multiprocessors", [LARGE, SMALL])
@pytest.mark.parametrize("zeroed", [False, True])
def test_rows_without_any_score(zeroed: bool, multiprocessors: int) -> None:
    b, rows, keys = 1, 34, 70
    chosen = np.random.default_rng(4).random((b, 1, rows, keys)) < 0.5
    chosen[0, 0, [0, 17, 33]] = False
    model = Model("f16", scores=CHOSEN, inputs=", %m: bool[b, 1, l, s]")
    model = replace(model, weights=ZEROED) if zeroed else model
    mask = np.where(chosen, 0, -np.inf)
    empty = 0.0 if zeroed else np.nan
    model.check(model.program(multiprocessors), (b, rows, keys), [chosen], mask=mask, empty=empty)


@emulated
def test_scores_of_the_least_number_are_alike() -> None:
    """-3e38 is no -inf: a row that has nothing else is the mean of all values."""
    model = Model(scores=BIASED, inputs=", %m: T[b, 1, 1, s]")
    mask = np.full((1, 1, 1, 40), np.finfo(np.float32).min)
    q, k, v = model.operands(1, 3, 40)
    (result,) = run_program(model.program(), [q, k, v, mask])
    mean = v.reshape(40, 2, 16).mean(0)
    np.testing.assert_allclose(result.reshape(3, 2, 16), np.broadcast_to(mean, (3, 2, 16)), rtol=1e-5, atol=1e-6)


@emulated
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_heads_and_a_soft_cap(kind: str) -> None:
    model = Model(kind, heads=6, groups=2, scores=CAPPED)
    model.check(model.program(), (2, 19, 37), cap=2.0)


@emulated
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_share_the_keys_of_few_queries(kind: str) -> None:
    model = Model(kind, heads=4, groups=2, scores=CAUSAL)
    known = model.program(b=1, l=3, s=1500)
    assert len(known.kernels) == 2
    model.check(known, (1, 3, 1500), mask=causal(3, 1500))
    open_ended = model.program(b=1, l=1)
    for keys in (7, 1024, 1025, 2300):  # one block for up to 1024 keys, and nothing to combine
        model.check(open_ended, (1, 1, keys), mask=causal(1, keys))


@emulated
def test_a_result_that_goes_on() -> None:
    """What follows the attention in its group is computed where the result is stored."""
    zero_first = "%c = Less(%m, %zero) : bool[l, 1]\n %whole = Where(%c, %zero, %weights) : T[b, H, l, s]"
    model = Model(inputs=", %m: T[l, 1]", weights=zero_first)
    m = np.array([[1.0], [-1], [2], [-3]], np.float32)
    program = model.program()
    q, k, v = model.operands(2, 4, 9)
    result = run_program(program, [q, k, v, m])[0]
    expected = model.expected(q, k, v) * (m > 0)[None, :, :, None]
    np.testing.assert_allclose(result.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


@emulated
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_in_other_orders(kind: str) -> None:
    """No batch; keys that lie along channels; values that do, of which a part is read backwards."""
    text = """
        graph @g(%q: T[l, 24], %k: T[24, s], %v: T[20, 2*s]) -> (%y: T[20, l]) {
          %v1 = Slice(%v) {starts = [-1], ends = [-1-s], axes = [1], steps = [-1]} : T[20, s]
          %v2 = Transpose(%v1) {perm = [1, 0]} : T[s, 20]
          %products = MatMul(%q, %k) : T[l, s]
          %weights = Softmax(%products) : T[l, s]
          %rows = MatMul(%weights, %v2) : T[l, 20]
          %y = Transpose(%rows) {perm = [1, 0]} : T[20, l]
        }
    """
    graph = run_pipeline(parsed(text.replace("T[", f"{KINDS[kind][0]}[")), parse_pipeline("attention,fuse"))
    assert [node.op for node in graph.nodes] == ["Fused"]
    program = lower(graph, schedule, replace(TARGET, products=KINDS[kind][1]))
    random = np.random.default_rng(5)
    for rows, keys in ((3, 5), (40, 130)):
        shapes = ((rows, 24), (24, keys), (20, 2 * keys))
        q, k, v = (random.normal(size=shape).astype(BY_NAME[KINDS[kind][0]].numpy) for shape in shapes)
        weights = np.exp(q.astype(np.float64) @ k.astype(np.float64))
        expected = (weights / weights.sum(1, keepdims=True) @ v.astype(np.float64)[:, : keys - 1 : -1].T).T
        (result,) = run_program(program, [q, k, v])
        assert np.abs(result - expected).max() <= 2 * TOLERANCE[kind] * np.abs(expected).max()


@emulated
@pytest.mark.parametrize("multiprocessors", [LARGE, SMALL])
@pytest.mark.parametrize("kind", KINDS)
def test_races_and_addresses(kind: str, multiprocessors: int) -> None:
    """In the emulator's checked mode, with lanes and warps in another order."""
    model = Model(kind, heads=1, groups=1, scores=CAUSAL)
    sizes = (1, 130, 70) if multiprocessors == LARGE else (1, 20, 150)
    mask = causal(*sizes[1:])
    model.check(model.program(multiprocessors), sizes, checked=True, seed=2, mask=mask)


@emulated
def test_races_where_blocks_share_keys() -> None:
    model = Model("f16", heads=1, groups=1)
    model.check(model.program(b=1, l=2, s=600), (1, 2, 600), checked=True, seed=3)


@compiled
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [64, 128])
def test_no_spills_and_tensor_cores(width: int, kind: str, architecture: str) -> None:
    causal = Model(kind, width=width, depth=width, scores=CAUSAL)
    biased = Model(kind, width=width, depth=width, scores=BIASED, inputs=", %m: T[b, 1, 1, s]")
    programs = (causal.program(LARGE), biased.program(LARGE))
    texts = {name: render_kernel(kernel) for program in programs for name, kernel in program.kernels.items()}
    assert len(texts) == 2
    for name, result in nvrtc.compile_kernels(prelude(), texts, architecture).items():
        found = result.resources[name]
        assert found.spill_store_bytes == found.spill_load_bytes == found.stack_bytes == 0, name
        if report.has_disassembler():
            assert ("HMMA" in report.sass(result.image)) == (kind != "f32")
