"""Narrow precision: what lies in memory in 16 bits, what must not, and that models agree with f32."""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxc.compiler.driver import passes_of
from onnxc.compiler.options import Options, target_of
from onnxc.ir.dtypes import BY_NAME
from onnxc.ir.errors import OnnxcError, UnsupportedError
from onnxc.ir.graph import Graph
from onnxc.ir.ops import REGISTRY
from onnxc.ir.ops.declare import SPECTRUM
from onnxc.ir.text import print_graph
from onnxc.passes.pipeline import parse_pipeline
from onnxc.passes.precision import narrowed
from pass_checks import Arrays, agree, filecheck, parsed, random_inputs, reference, transformed
from small_models import small_cnn

NARROW = ("f16", "bf16")
TOLERANCE = 2e-2
"""Of the largest value."""
LEAST = float(np.finfo(np.float32).min)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Weights that keep the size of what they are multiplied with: [depth, columns] or [filters, *summed]."""
    depth = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
    return np.random.default_rng(seed).standard_normal(shape, np.float32) / np.float32(np.sqrt(depth))


def narrow(text: str, constants: Arrays | None = None, to: str = "f16", inputs: Arrays | None = None) -> Graph:
    """The graph of a text stored as `to`, compared with the CHECK lines and with what the text's graph computes."""
    before = parsed(text, constants)
    after = transformed(f'fuse,precision{{to="{to}"}}', before)
    filecheck(text, print_graph(after))
    agree(before, after, tolerance=TOLERANCE, inputs=inputs)
    return after


def stored(graph: Graph) -> dict[str, str]:
    """The element types in memory of all that kernels make."""
    return {value.name: str(value.dtype) for node in graph.nodes for value in node.outputs if node.op != "Constant"}


# What is stored how.


def test_groups_widen_what_they_read_and_round_what_they_store() -> None:
    narrow(
        """
        graph @g(%x: f32[b, 64]) -> (%y: f32[b, 64]) {
          %w = constant @"w" : f32[64, 64]
          %bias = constant @"bias" : f32[64]
          %p = MatMul(%x, %w) : f32[b, 64]     // from "first"
          %q = Add(%p, %bias) : f32[b, 64]
          %r = Relu(%q) : f32[b, 64]
          %y = MatMul(%r, %w) : f32[b, 64]     // from "second"
        }
        // CHECK:      %x.f16 = Fused(%x) {kind = "map"} : f16[b, 64]
        // CHECK:        Cast(%x) {to = f16}
        // CHECK:      %bias = constant @"bias" : f32[64]
        // CHECK:      %w = constant @"w.f16" : f16[64, 64]
        // CHECK:      %r = Fused(%x.f16, %w, %bias) {kind = "heavy"} : f16[b, 64]
        // CHECK:        %p.inner = MatMul(%x.f16, %w) {result = f32} : f32[b, 64]
        // CHECK-NEXT:   %q.inner = Add(%p.inner, %bias) : f32[b, 64]
        // CHECK-NEXT:   %r.inner = Relu(%q.inner) : f32[b, 64]
        // CHECK-NEXT:   %r.inner.f16 = Cast(%r.inner) {to = f16} : f16[b, 64]
        // CHECK:      %y = Fused(%r, %w) {kind = "heavy"} : f32[b, 64]
        // CHECK:        MatMul(%r, %w) {result = f32} : f32[b, 64]
        """,
        {"w": normal(64, 64), "bias": normal(64)},
    )


def test_what_only_moves_stays_narrow_and_views_follow() -> None:
    narrow(
        """
        graph @g(%x: f32[b, 6, 64]) -> (%y: f32[b, 64, 64]) {
          %w = constant @"w" : f32[64, 64]
          %p = MatMul(%x, %w) : f32[b, 6, 64]
          %h = Reshape(%p) {shape = [b, 64, 6]} : f32[b, 64, 6]
          %t = Transpose(%h) {perm = [0, 2, 1]} : f32[b, 6, 64]
          %y = MatMul(%h, %t) : f32[b, 64, 64]
        }
        // CHECK:      %p = Fused({{.*}}) {kind = "heavy"} : f16[b, 6, 64]
        // CHECK:        MatMul(%x.f16, %w) : f16[b, 6, 64]
        // CHECK:      %h = Reshape(%p) {shape = [b, 64, 6]} : f16[b, 64, 6]
        // CHECK:      %y = Fused(%h) {kind = "heavy"} : f32[b, 64, 64]
        // CHECK:        %t.inner = Transpose(%h) {perm = [0, 2, 1]} : f16[b, 6, 64]
        // CHECK-NEXT:   MatMul(%h, %t.inner) {result = f32}
        """,
        {"w": normal(64, 64)},
    )


def test_an_output_of_the_model_has_a_narrow_copy_for_products() -> None:
    narrow(
        """
        graph @g(%x: f32[b, 8], %past: f32[n, 8]) -> (%y: f32[b, b+n], %present: f32[b+n, 8]) {
          %present = Concat(%past, %x) {axis = 0} : f32[b+n, 8]
          %k = Transpose(%present) {perm = [1, 0]} : f32[8, b+n]
          %y = MatMul(%x, %k) : f32[b, b+n]
        }
        // CHECK: %present, %present.f16 = Fused(%past, %x) {kind = "map"} : f32[b+n, 8], f16[b+n, 8]
        // CHECK: %y = Fused(%present.f16, %x.f16) {kind = "heavy"} : f32[b, b+n]
        """
    )


def test_numbers_inside_a_group_stay_exact() -> None:
    """An epsilon that f16 does not have, and squares beyond its range, are in registers."""
    graph = narrow(
        """
        graph @g(%x: f32[b, 64]) -> (%y: f32[b, 64]) {
          %w = constant @"w" : f32[64, 64]
          %tiny = constant 1e-12 : f32[]
          %many = constant 300.0 : f32[]
          %p = MatMul(%x, %w) : f32[b, 64]
          %large = Mul(%p, %many) : f32[b, 64]
          %square = Mul(%large, %large) : f32[b, 64]
          %mean = ReduceMean(%square) {axes = [1]} : f32[b, 1]
          %safe = Add(%mean, %tiny) : f32[b, 1]
          %root = Sqrt(%safe) : f32[b, 1]
          %n = Div(%large, %root) : f32[b, 64]
          %y = MatMul(%n, %w) : f32[b, 64]
        }
        // CHECK: %tiny = constant 1e-12 : f32[]
        // CHECK: Add({{.*}}, %tiny) : f32[b, 1]
        """,
        {"w": normal(64, 64)},
    )
    assert stored(graph)["n"] == "f16"


READERS = {
    "Sin": ("%y = Sin(%v) : f32[1, 8]", "f32"),
    "Cos of what is moved": ("%m = Transpose(%v) {perm = [1, 0]} : f32[8, 1] %y = Cos(%m) : f32[8, 1]", "f32"),
    "Floor": ("%y = Floor(%v) : f32[1, 8]", "f32"),
    "integers": ("%y = Cast(%v) {to = i64} : i64[1, 8]", "f32"),
    "comparison": ("%c = constant 0.5 : f32[] %y = Less(%v, %c) : bool[1, 8]", "f32"),
    "ArgMax": ("%y = ArgMax(%v) {axis = 1} : i64[1, 1]", "f32"),
    "TopK": ("%k = constant [3] : i64[1] %i, %y = TopK(%v, %k) : f32[1, 3], i64[1, 3]", "f32"),
    "CumSum": ("%axis = constant 1 : i64[] %y = CumSum(%v, %axis) : f32[1, 8]", "f32"),
    "a logarithm": ("%y = Log(%v) : f32[1, 8]", "f32"),
    "Tanh": ("%y = Tanh(%v) : f32[1, 8]", "f16"),
    "Softmax": ("%y = Softmax(%v) : f32[1, 8]", "f32"),
    "ReduceMean": ("%y = ReduceMean(%v) {axes = [1]} : f32[1, 1]", "f16"),
    "products": ("%w = constant @w : f32[8, 4] %y = MatMul(%v, %w) : f32[1, 4]", "f16"),
}
MAKERS = {
    "Tanh": ("Tanh(%x)", "f16"),
    "Exp": ("Exp(%x)", "f32"),
    "a square": ("Mul(%x, %x)", "f32"),
    "a mean": ("ReduceMean(%x) {axes = [0]}", "f32"),
    "positions": ("Cast(%n) {to = f32}", "f32"),
    "a mask": ("Where(%m, %zero, %least)", "f32"),
    "data behind a mask": ("Where(%m, %x, %least)", "f32"),
    "data in a range without end": ("Clip(%x, %zero, %most)", "f16"),
    "data behind an infinite mask": ("Where(%m, %x, %infinite)", "f16"),
    "random numbers": ('RandomUniform() {shape = [1, 8], dtype = f32, seed = 1.0}', "f32"),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_readers_decide_what_may_be_rounded(reader: str) -> None:
    nodes, dtype = READERS[reader]
    result = nodes.rsplit(" : ", 1)[1].split("], ")[-1]
    text = f"graph @g(%x: f32[1, 8]) -> (%y: {result}) {{ %v = Sigmoid(%x) : f32[1, 8] {nodes} }}"
    graph = parsed(text, {"w": normal(8, 4)} if "@w" in nodes else None)
    assert stored(transformed("fuse{max_members=1},precision", graph))["v"] == dtype


@pytest.mark.parametrize("maker", MAKERS)
def test_origins_decide_what_may_be_rounded(maker: str) -> None:
    node, dtype = MAKERS[maker]
    graph = parsed(
        f"""
        graph @g(%x: f32[1, 8], %n: i64[1, 8], %m: bool[1, 8]) -> (%y: f32[1, 8]) {{
          %zero = constant 0.0 : f32[]
          %least = constant {LEAST} : f32[]
          %most = constant {-LEAST} : f32[]
          %infinite = constant -inf : f32[]
          %v = {node} : f32[1, 8]
          %y = Sigmoid(%v) : f32[1, 8]
        }}
        """
    )
    assert stored(transformed("fuse{max_members=1},precision", graph))["v"] == dtype


def test_a_product_that_sums_nothing_is_none() -> None:
    """Angles of rotary embeddings: positions times frequencies, written as a matrix product."""
    narrow(
        """
        graph @g(%position: i64[1, 1, s], %x: f32[1, s, 32]) -> (%y: f32[1, s, 32]) {
          %frequency = constant @"frequency" : f32[1, 32, 1]
          %w = constant @"w" : f32[32, 32]
          %p = Cast(%position) {to = f32} : f32[1, 1, s]
          %angle = MatMul(%frequency, %p) : f32[1, 32, s]
          %turned = Transpose(%angle) {perm = [0, 2, 1]} : f32[1, s, 32]
          %c = Cos(%turned) : f32[1, s, 32]
          %h = MatMul(%x, %w) : f32[1, s, 32]
          %y = Mul(%h, %c) : f32[1, s, 32]
        }
        // CHECK: %frequency = constant @"frequency" : f32[1, 32, 1]
        // CHECK: MatMul(%frequency, %p{{.*}}) : f32[1, 32, s]
        // CHECK: MatMul(%x.f16, %w) {result = f32}
        """,
        {"frequency": np.geomspace(1, 1e-3, 32, dtype=np.float32).reshape(1, 32, 1), "w": normal(32, 32)},
        inputs={"position": np.array([[[0, 999, 4095]]]), "x": normal(1, 3, 32)},
    )


def test_the_spectrum_behind_a_logarithm_stays_f32() -> None:
    """Frames by a convolution, their power, bands, a logarithm; then an ordinary layer."""
    arrays = {"basis": normal(16, 1, 32), "bands": np.abs(normal(16, 8)), "w": normal(8, 8)}
    graph = narrow(
        """
        graph @g(%sound: f32[1, 1, 128]) -> (%y: f32[1, 97, 8]) {
          %basis = constant @"basis" : f32[16, 1, 32]
          %bands = constant @"bands" : f32[16, 8]
          %w = constant @"w" : f32[8, 8]
          %small = constant 1e-10 : f32[]
          %frames = Conv(%sound, %basis) : f32[1, 16, 97]
          %power = Mul(%frames, %frames) : f32[1, 16, 97]
          %turned = Transpose(%power) {perm = [0, 2, 1]} : f32[1, 97, 16]
          %sums = MatMul(%turned, %bands) : f32[1, 97, 8]
          %safe = Add(%sums, %small) : f32[1, 97, 8]
          %loud = Log(%safe) : f32[1, 97, 8]
          %y = MatMul(%loud, %w) : f32[1, 97, 8]
        }
        // CHECK-DAG: %basis = constant @"basis" : f32[16, 1, 32]
        // CHECK-DAG: %bands = constant @"bands" : f32[16, 8]
        // CHECK: MatMul({{.*}}, %w) {result = f32}
        """,
        arrays,
        inputs={"sound": 1e-4 * np.sin(np.arange(128, dtype=np.float32)).reshape(1, 1, 128)},
    )
    assert stored(graph)["power" if "power" in stored(graph) else "turned"] == "f32"


def test_recurrent_layers_have_narrow_weights_and_f32_states() -> None:
    arrays = {"w": normal(1, 32, 8), "r": normal(1, 32, 8), "b": normal(1, 64)}
    narrow(
        """
        graph @g(%x: f32[5, b, 8]) -> (%y: f32[5, 1, b, 8], %h: f32[1, b, 8], %c: f32[1, b, 8]) {
          %w = constant @"w" : f32[1, 32, 8]
          %r = constant @"r" : f32[1, 32, 8]
          %b = constant @"b" : f32[1, 64]
          %y, %h, %c = LSTM(%x, %w, %r, %b) {hidden_size = 8} : f32[5, 1, b, 8], f32[1, b, 8], f32[1, b, 8]
        }
        // CHECK: %y.f16, %h, %c = LSTM(%x.f16, %w, %r, %b) {hidden_size = 8, result = f32}
        // CHECK-SAME: f16[5, 1, b, 8], f32[1, b, 8], f32[1, b, 8]
        // CHECK: %y = Fused(%y.f16)
        """,
        arrays,
    )


def test_states_of_loops_stay_f32_and_what_bodies_read_is_narrow() -> None:
    narrow(
        """
        graph @g(%n: i64[], %start: f32[2, 16]) -> (%end: f32[2, 16]) {
          %w = constant @"w" : f32[16, 16]
          %go = constant true : bool[]
          %end = Loop(%n, %go, %start) : f32[2, 16]
            body: graph @body(%i: i64[], %on: bool[], %s: f32[2, 16]) -> (%on: bool[], %t: f32[2, 16]) {
              %p = MatMul(%s, %w) : f32[2, 16]
              %q = Tanh(%p) : f32[2, 16]
              %r = MatMul(%q, %w) : f32[2, 16]
              %t = Add(%r, %s) : f32[2, 16]
            }
        }
        // CHECK: %w = constant @"w.f16" : f16[16, 16]
        // CHECK: %end = Loop(%n, %go, %start) : f32[2, 16]
        // CHECK:   %s.f16 = Fused(%s) {kind = "map"} : f16[2, 16]
        // CHECK:   %q = Fused(%s.f16, %w) {kind = "heavy"} : f16[2, 16]
        // CHECK:   %t = Fused(%q, %w, %s) {kind = "heavy"} : f32[2, 16]
        """,
        {"w": normal(16, 16)},
        inputs={"n": np.array(3), "start": normal(2, 16)},
    )


def test_branches_read_narrow_values_from_around() -> None:
    narrow(
        """
        graph @g(%which: bool[], %x: f32[2, 16]) -> (%y: f32[2, 16]) {
          %w = constant @"w" : f32[16, 16]
          %h = MatMul(%x, %w) : f32[2, 16]
          %y = If(%which) : f32[2, 16]
            then_branch: graph @then() -> (%a: f32[2, 16]) {
              %a = MatMul(%h, %w) : f32[2, 16]
            }
            else_branch: graph @else() -> (%b: f32[2, 16]) {
              %b = Sigmoid(%h) : f32[2, 16]
            }
        }
        // CHECK: %h = Fused({{.*}}) {kind = "heavy"} : f16[2, 16]
        // CHECK:   %a = Fused(%h, %w) {kind = "heavy"} : f32[2, 16]
        // CHECK:   %b = Fused(%h) {kind = "map"} : f32[2, 16]
        """,
        {"w": normal(16, 16)},
    )


def test_integer_products_are_left_alone() -> None:
    text = """
        graph @g(%x: f32[2, 16]) -> (%y: f32[2, 16]) {
          %w = constant @"w" : i8[16, 16]
          %q, %scale, %zero = DynamicQuantizeLinear(%x) : u8[2, 16], f32[], u8[]
          %p = MatMulInteger(%q, %w, %zero) : i32[2, 16]
          %f = Cast(%p) {to = f32} : f32[2, 16]
          %y = Mul(%f, %scale) : f32[2, 16]
        }
        """
    before = transformed("fuse", parsed(text, {"w": np.arange(256, dtype=np.int8).reshape(16, 16)}))
    assert transformed("precision", before) is before


def test_declarations_name_what_is_there() -> None:
    for name, operator in REGISTRY.items():
        operands = {parameter.name for parameter in operator.parameters}
        assert operands >= set(operator.products), name
        assert operands | {"result", SPECTRUM} >= set(operator.precise), name
        assert "result" in operator.attributes or not operator.products, name


# Constants.


@pytest.mark.parametrize("to", NARROW)
def test_tables_are_narrow_what_is_small_or_counts_is_not(to: str) -> None:
    wide = np.tile(np.arange(300, dtype=np.float32), 20).reshape(20, 300)
    arrays = {
        "table": normal(100, 300), "short": normal(10, 300), "places": wide + 0.5,
        "mask": np.where(wide > 9, np.float32(LEAST), 0),
    }  # fmt: skip
    for name, array in arrays.items():
        rows = len(array)
        graph = parsed(
            f"""
            graph @g(%i: i64[n]) -> (%y: f32[n, 300]) {{
              %c = constant @"{name}" : f32[{rows}, 300]
              %g = Gather(%c, %i) {{axis = 0}} : f32[n, 300]
              %y = Tanh(%g) : f32[n, 300]
            }}
            """,
            {name: array},
        )
        after = transformed(f'fuse,precision{{to="{to}"}}', graph)
        (constant,) = (node.output for node in after.nodes if node.op == "Constant")
        with np.errstate(over="ignore"):
            exact = np.array_equal(array.astype(BY_NAME[to].numpy).astype(np.float32), array)
        is_narrow = name == "table" or (name == "places" and exact)
        assert str(constant.dtype) == (to if is_narrow else "f32"), name
        agree(graph, after, tolerance=TOLERANCE, inputs={"i": np.array([0, rows - 1, 3])})


@pytest.mark.parametrize("to", NARROW)
def test_weights_beyond_the_range_become_the_greatest_finite_ones(to: str) -> None:
    dtype = BY_NAME[to]
    array = np.array([[1e-3, 1e30, LEAST], [-np.inf, np.nan, 65504.0]], np.float32)
    with np.errstate(over="ignore"):
        found = narrowed(array, dtype).astype(np.float32)
    assert found.dtype == np.float32
    finite = np.isfinite(array)
    assert np.isfinite(found[finite]).all()
    np.testing.assert_array_equal(found[~finite], array[~finite])
    np.testing.assert_allclose(found[finite], np.clip(array[finite], *dtype.limits), rtol=2.0**-8)


def test_one_number_for_all_elements_is_converted_once() -> None:
    array = np.broadcast_to(np.float32(0.1), (1 << 14, 1 << 14))
    found = narrowed(array, BY_NAME["f16"])
    assert found.shape == array.shape
    assert found.strides == (0, 0)
    assert found[5, 7] == np.float16(0.1)


# Options.


def test_every_target_has_its_precisions() -> None:
    assert target_of(Options(target="cuda:sm_90", precision="tf32")).products == "tf32"
    assert target_of(Options(target="cuda:sm_90", precision="f16")).products == "f32"
    for target, precision, known in (("x86-64-v3", "tf32", "f32, f16, bf16"), ("cuda", "int4", "f32, tf32, f16, bf16")):
        with pytest.raises(UnsupportedError, match=f"no precision '{precision}', only {known}"):
            target_of(Options(target=target, precision=precision))
    with pytest.raises(UnsupportedError, match="tf32"):
        onnxc.compile(small_cnn(), precision="tf32")


def test_the_pass_stands_behind_fusion() -> None:
    def names(**options: str) -> list[str]:
        return [str(item) for item in passes_of(Options(**{"target": "x86-64-v3", **options}))]  # type: ignore[arg-type]

    assert names(precision="bf16")[-3:] == ["fuse", "precision{to='bf16', sums='wide'}", "reorder"]
    assert names(precision="f16", pipeline="fold,fuse") == ["fold", "fuse", "precision{sums='wide'}"]
    assert names(precision="f16", pipeline="fold") == ["fold", "precision{sums='wide'}"]
    assert names(target="cuda:sm_80", precision="f16", pipeline="fold") == ["fold", "precision"]
    assert names(precision="f16", pipeline="fuse,precision{large=1}") == ["fuse", "precision{large=1}"]
    assert "precision" not in "".join(names())
    assert [str(item) for item in parse_pipeline('precision{to="bf16"}')] == ["precision{to='bf16'}"]


def test_residuals_may_stay_wide() -> None:
    """A sum that only other sums and normalization read is not rounded by each layer; one that is multiplied is."""
    graph = parsed(
        """graph @g(%x: f32[4, 64]) -> (%z: f32[4, 64]) {
          %v = constant @"v" : f32[64, 64]
          %w = constant @"w" : f32[64, 64]
          %0 = MatMul(%x, %v) : f32[4, 64]
          %1 = Add(%x, %0) : f32[4, 64]
          %2 = Relu(%1) : f32[4, 64]
          %3 = MatMul(%2, %w) : f32[4, 64]
          %4 = Add(%1, %3) : f32[4, 64]
          %5 = MatMul(%4, %w) : f32[4, 64]
          %z = Add(%4, %5) : f32[4, 64]
        }""",
        {"v": normal(64, 64), "w": normal(64, 64)},
    )
    for sums, residual in (("narrow", "bf16"), ("wide", "f32")):
        after = transformed(f'fuse,precision{{to="bf16", sums="{sums}"}}', graph)
        types = stored(after)
        assert (types["1"], types["2"], types["4"]) == (residual, "bf16", "bf16"), types
        agree(graph, after, tolerance=TOLERANCE)
    with pytest.raises(OnnxcError, match="narrow or wide"):
        transformed('precision{sums="f64"}', graph)


def test_other_types_are_refused() -> None:
    with pytest.raises(OnnxcError, match="f16 or bf16"):
        transformed('precision{to="f64"}', parsed("graph @g(%x: f32[1]) -> (%x: f32[1]) {\n}"))


def test_without_fusion_products_alone_are_narrow() -> None:
    text = """
        graph @g(%x: f32[b, 16]) -> (%y: f32[b, 16]) {
          %w = constant @"w" : f32[16, 16]
          %p = MatMul(%x, %w) : f32[b, 16]
          %y = Relu(%p) : f32[b, 16]
        }
        """
    before = parsed(text, {"w": normal(16, 16)})
    after = transformed("precision", before)
    filecheck("// CHECK: %p = MatMul(%x.f16, %w) {result = f32} : f32[b, 16]", print_graph(after))
    agree(before, after, tolerance=TOLERANCE)


# Masks and epsilons of any size.

EXTREMES = st.sampled_from([0.0, -1.0, -1e4, -65504.0, -65520.0, -1e9, -3.39e38, LEAST, -np.inf])


@settings(max_examples=40)
@given(
    st.lists(st.lists(EXTREMES, min_size=5, max_size=5), min_size=3, max_size=3),
    st.sampled_from([1e-12, 1e-9, 1e-7, 1e-5, 1e-3]),
    st.sampled_from([1e-3, 1.0, 100.0]),
    st.sampled_from(NARROW),
    st.booleans(),
)
def test_masks_and_epsilons(mask: list[list[float]], epsilon: float, size: float, to: str, constant: bool) -> None:
    """Scores behind a mask that comes as a constant or as an input, then a root mean square spelt out."""
    rows = np.array(mask, np.float32)
    graph = parsed(
        f"""
        graph @g(%x: f32[3, 16], {"" if constant else "%mask: f32[3, 5], "}%k: f32[16, 5]) -> (%y: f32[3, 16]) {{
          {'%mask = constant @"mask" : f32[3, 5]' if constant else ""}
          %w = constant @"w" : f32[5, 16]
          %epsilon = constant {epsilon} : f32[]
          %s = MatMul(%x, %k) : f32[3, 5]
          %m = Add(%s, %mask) : f32[3, 5]
          %p = Softmax(%m) : f32[3, 5]
          %v = MatMul(%p, %w) : f32[3, 16]
          %q = Mul(%v, %v) : f32[3, 16]
          %mean = ReduceMean(%q) {{axes = [1]}} : f32[3, 1]
          %safe = Add(%mean, %epsilon) : f32[3, 1]
          %root = Sqrt(%safe) : f32[3, 1]
          %y = Div(%v, %root) : f32[3, 16]
        }}
        """,
        {"w": size * normal(5, 16), **({"mask": rows} if constant else {})},
    )
    inputs = random_inputs(graph) | ({} if constant else {"mask": rows})
    for pipeline in ("fuse", "fuse{max_members=1}"):
        after = transformed(f'{pipeline},precision{{to="{to}"}}', graph)
        (expected,), (actual,) = reference(graph, inputs), reference(after, inputs)
        np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
        finite = np.isfinite(expected)
        assert np.abs(actual - expected)[finite].max(initial=0) <= TOLERANCE * np.abs(expected[finite]).max(initial=1)
