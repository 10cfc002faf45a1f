"""Models that Python runs in part: text, sequences of unknown length, optionals, images, loops whose state changes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
import onnxruntime
import pytest
from host_models import assert_same, compiled, text
from onnx import helper
from onnxc.compiler.interface import Interface
from onnxc.ir.errors import LimitError, ModelError, OnnxcError, ShapeError, UnsupportedError
from small_models import model_of_text

GROWING = """growing (float[n] x, int64 count) => (float[m] y, int64 length, seq(float[k]) parts) {
    empty = SequenceEmpty ()
    parts = Loop (count, yes, empty) <body =
        body (int64 i, bool c, seq(float[k]) so_far) => (bool go, seq(float[k]) more) {
        go = Identity (c)
        one = Constant <value_int = 1> ()
        end = Add (i, one)
        zero = Constant <value_ints = [0]> ()
        ends = Unsqueeze (end, zero)
        part = Slice (x, zero, ends)
        scaled = Mul (part, weight)
        more = SequenceInsert (so_far, scaled)
    }>
    length = SequenceLength (parts)
    joined = ConcatFromSequence <axis = 0> (parts)
    y = Relu (joined)
}"""


def growing() -> onnx.ModelProto:
    return model_of_text(GROWING, yes=np.array(True), weight=np.float32(2))


def test_a_text_branch_beside_a_convolution() -> None:
    random = np.random.default_rng(0)
    model = model_of_text(
        """mixed (float[batch, 3, 8, 8] image, string[batch] words) => (float[batch, 4] y, string[batch, 1] shown) {
            convolved = Conv <pads = [1, 1, 1, 1]> (image, kernel)
            positive = Relu (convolved)
            pooled = GlobalAveragePool (positive)
            flat = Flatten (pooled)
            upper = StringNormalizer <case_change_action = "UPPER", is_case_sensitive = 1> (words)
            known = Equal (upper, yes)
            factor = Cast <to = 1> (known)
            column = Unsqueeze (factor, one)
            y = Mul (flat, column)
            shown = Unsqueeze (upper, one)
        }""",
        kernel=random.standard_normal((4, 3, 3, 3), np.float32),
        yes=text("YES"),
        one=np.array([1]),
    )
    executable = compiled(model)
    image = random.standard_normal((3, 3, 8, 8), np.float32)
    y, shown = executable(image, text("yes", "no", "yes"))
    plain = onnxruntime.InferenceSession(_tensor_part(model).SerializeToString())
    expected = plain.run(None, {"image": image})[0] * np.array([[1], [0], [1]], np.float32)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert_same(shown, text("YES", "NO", "YES").reshape(3, 1))
    lines = executable.dump("program").splitlines()
    assert [line.split()[0] for line in lines] == ["compiled", "python", "python", "python", "compiled"]
    assert '"Conv_0" (Conv), "Relu_1" (Relu), "GlobalAveragePool_2"' in lines[0]
    assert lines[2] == 'python   (upper, yes) -> (known): "Equal_5" (Equal)'


def _tensor_part(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model)).extract_model(["image"], ["flat"])


def test_a_loop_that_grows_a_sequence() -> None:
    executable = compiled(growing())
    x = np.arange(-2, 7, dtype=np.float32)
    for count in (1, 4, 9, 3):
        y, length, parts = executable(x, np.array(count))
        expected = [2 * x[: i + 1] for i in range(count)]
        assert_same(parts, expected)
        assert_same(y, np.maximum(np.concatenate(expected), 0))
        assert length == count


def test_a_loop_inside_is_compiled_where_its_body_is_of_tensors() -> None:
    model = model_of_text(
        """inside (float[n] x, string[k] words) => (float[n] y, int64[k] length) {
            y = Loop (three, yes, x) <body = body (int64 i, bool c, float[n] state) => (bool go, float[n] next) {
                go = Identity (c)
                next = Add (state, x)
            }>
            _, length = StringSplit (words)
        }""",
        three=np.array(3),
        yes=np.array(True),
    )
    executable = compiled(model)
    y, length = executable(np.ones(4, np.float32), text("a b", "c"))
    assert_same(y, np.full(4, 4, np.float32))
    assert_same(length, np.array([2, 1]))
    assert 'compiled (x) -> (y): "Loop_0" (Loop)' in executable.dump()


def test_states_that_change_their_shape_or_rank() -> None:
    model = model_of_text(
        """shapes (float[a] x, float[1] y, int64 count) => (float[b] z, float[c, d] rows, float[e] longer) {
            z, longer, rows = Loop (count, yes, y, y) <body =
                body (int64 i, bool c, float[s] state, float[t] other)
                    => (bool go, float[u] next, float[v] more, float[w] row) {
                go = Identity (c)
                next = Add (state, x)
                more = Concat <axis = 0> (other, y)
                row = Neg (next)
            }>
        }""",
        yes=np.array(True),
    )
    x, y = np.arange(3, dtype=np.float32), np.ones(1, np.float32)
    for count in (1, 2, 5):
        z, rows, longer = compiled(model)(x, y, np.array(count))
        assert_same(z, 1 + count * x)
        assert_same(rows, np.stack([-(1 + (i + 1) * x) for i in range(count)]))
        assert_same(longer, np.ones(1 + count, np.float32))
    model = model_of_text(
        """ranks (float[a] x, int64 count) => (float[...] y) {
            y = Loop (count, yes, x) <body = body (int64 i, bool c, float[s] state) => (bool go, float[t, u] next) {
                go = Identity (c)
                next = Unsqueeze (state, zero)
            }>
        }""".replace("float[...]", "float[b, c, d]"),
        yes=np.array(True),
        zero=np.array([0]),
    )
    assert compiled(model)(x, np.array(2)).shape == (1, 1, 3)


def test_scan_and_branches_over_text() -> None:
    model = model_of_text(
        """over_text (string[n] words, float[n, 2] x, bool shout) => (string[n] y, float[n, 2] z, string[1] last) {
            tail = Constant <value_strings = ["!"]> ()
            end = If (shout) <then_branch = loud () => (string[1] a) { a = StringConcat (tail, tail) },
                else_branch = quiet () => (string[1] b) { b = Identity (tail) }>
            last, z, y = Scan <num_scan_inputs = 2, scan_input_directions = [0, 1], body =
                body (string[1] before, string word, float[2] row) => (string[1] now, float[2] negated, string said) {
                now = StringConcat (before, word)
                negated = Neg (row)
                said = StringConcat (word, end_0)
                end_0 = Squeeze (end)
            }> (end, words, x)
        }""",
    )
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    y, z, last = compiled(model)(text("a", "b", "c"), x, np.array(True))
    assert_same(y, text("a!!", "b!!", "c!!"))
    assert_same(z, -x[::-1])
    assert_same(last, text("!!abc"))


def test_sequences_and_optionals_as_inputs_and_outputs() -> None:
    model = model_of_text(
        """ports (seq(float[n, 2]) parts, optional(seq(string)) names, optional(float[2]) offset)
            => (seq(float[n, 2]) y, seq(string) all, optional(float[2]) same) {
            there = OptionalHasElement (offset)
            shift = If (there) <then_branch = then () => (float[2] a) { a = OptionalGetElement (offset) },
                else_branch = otherwise () => (float[2] b) { b = Identity (zeros) }>
            y = SequenceMap (parts) <body =
                body (float[n, 2] part) => (float[n, 2] moved) { moved = Add (part, shift) }>
            named = OptionalHasElement (names)
            all = If (named) <then_branch = have () => (seq(string) c) { c = OptionalGetElement (names) },
                else_branch = havent () => (seq(string) d) { d = SequenceEmpty <dtype = 8> () }>
            same = Identity (offset)
        }""",
        zeros=np.zeros(2, np.float32),
    )
    executable = compiled(model)
    parts = [np.ones((1, 2), np.float32), np.zeros((3, 2), np.float32), np.full((5, 2), 2, np.float32)]
    y, names, same = executable(parts)
    assert_same(y, parts)
    assert_same(names, [])
    assert same is None
    y, names, same = executable(parts, [text("a"), np.array(["b", "c"])], np.array([1, 2], np.float32))
    assert_same(y, [part + np.array([1, 2], np.float32) for part in parts])
    assert_same(names, [text("a"), text("b", "c")])
    assert_same(same, np.array([1, 2], np.float32))
    assert [str(port) for port in executable.inputs] == [
        "parts: seq(f32[n, 2])",
        "names: optional(seq(string[]))",
        "offset: optional(f32[2])",
    ]


def test_functions_hold_steps_of_python() -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        outer (string[n] words, float[n] x) => (float[n] y) { y = local.chosen <factor = 3.0> (words, x) }
        <domain: "local", opset_import: ["" : 21, "local" : 1]>
        chosen <factor: float> (words, x) => (y) {
            yes = local.is_yes (words)
            scale = Constant <value_float: float = @factor> ()
            scaled = Mul (x, scale)
            y = Where (yes, scaled, x)
        }
        <domain: "local", opset_import: ["" : 21]>
        is_yes (words) => (yes) { yes = RegexFullMatch <pattern = "[yY]es"> (words) }
    """)
    y = compiled(model)(text("yes", "no", "Yes"), np.array([1, 2, 3], np.float32))
    assert_same(y, np.array([3, 2, 9], np.float32))


def test_arguments_are_checked() -> None:
    executable = compiled(growing())
    with pytest.raises(ShapeError, match=r"input 'x' is int64\[3\]: it must be f32\[n\]"):
        executable(np.arange(3), np.array(1))
    with pytest.raises(ShapeError, match=r"missing: count.*the model takes x: f32\[n\], count: i64\[\]"):
        executable(np.zeros(3, np.float32))
    with pytest.raises(ShapeError, match="rank 1"):
        executable(np.zeros((3, 1), np.float32), np.array(1))
    words = compiled(
        model_of_text("""words (seq(string[n]) w, string[2] v) => (string[2] y, int64 n) {
        y = Identity (v)
        n = SequenceLength (w)
    }""")
    )
    with pytest.raises(ShapeError, match=r"input 'w\[1\]' is int64\[2\]: it must be string\[n\]; 0 is no text"):
        words([text("a"), np.arange(2)], text("a", "b"))
    with pytest.raises(ShapeError, match="a list"):
        words(text("a"), text("a", "b"))
    with pytest.raises(ShapeError, match="axis 0 of input 'v' is 1"):
        words([], text("a"))
    assert words([], ["a", "b"])[0].tolist() == ["a", "b"]


def test_failing_steps_name_their_node() -> None:
    model = model_of_text(
        """failing (string[n] words, int64 place) => (float[n] y, float[2] z) {
        y = Cast <to = 1> (words)
        a = Neg (y)
        pair = SequenceConstruct (y, a)
        z = SequenceAt (pair, place)
    }"""
    )
    model.graph.node[-1].name = "pick"
    model = _unequal(model)
    executable = compiled(model)
    with pytest.raises(OnnxcError, match=r'node "Cast_0" \(Cast\) on \(string\[1\]\): could not convert'):
        executable(text("one"), np.array(0))
    with pytest.raises(ShapeError, match=r'node "pick" \(SequenceAt\) on .*position 7 in a sequence of 2 elements'):
        executable(text("1"), np.array(7))
    loop = growing()
    loop.graph.node[1].attribute[0].g.node[7].name = "append"
    loop.graph.node[1].attribute[0].g.node[7].input.append("place")
    loop.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1), "place"))
    with pytest.raises(
        ShapeError, match=r'node "Loop_1" \(Loop\): iteration 0: node "append" \(SequenceInsert\) on \(\[\], '
    ):
        compiled(loop)(np.ones(3, np.float32), np.array(2))


def _unequal(model: onnx.ModelProto) -> onnx.ModelProto:
    """The elements of the sequence made of several types, so that the run has to choose."""
    model.graph.node[1].op_type = "Unsqueeze"
    model.graph.node[1].input.append("zero")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "zero"))
    return model


def test_nothing_is_written_ahead_of_time(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(growing(), path)
    executable = onnxc.compile(path)
    for attempt in (lambda: executable.save(tmp_path / "model.onnxc"), lambda: executable.plan):
        with pytest.raises(
            UnsupportedError, match=r'"Loop_1" \(Loop\), "SequenceInsert_7".*onnxc.compile or onnxc run'
        ):
            attempt()
    from onnxc.compiler.driver import compiled_model
    from onnxc.compiler.options import Options

    with pytest.raises(UnsupportedError, match=r'Python runs 5 steps of this model: "SequenceEmpty_0"'):
        compiled_model(path, Options("x86-64-v3"))


def test_two_threads_run_one_executable() -> None:
    executable = compiled(growing())
    x = np.arange(40, dtype=np.float32)
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        found[number] = [executable(x * number, np.array(count))[0] for count in (3, 30, 7, 1, 12)]

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (1, 2):
        for y, count in zip(found[number], (3, 30, 7, 1, 12), strict=True):
            assert_same(y, np.concatenate([2 * number * x[: i + 1] for i in range(count)]))


def test_segments_run_on_a_gpu(gpu: None) -> None:
    executable = compiled(growing(), target="cuda")
    y, length, _ = executable(np.arange(5, dtype=np.float32), np.array(3))
    assert_same(y, np.array([0, 0, 2, 0, 2, 4], np.float32))
    assert length == 3
    assert executable.dump("cuda")


def test_weights_beside_the_model(tmp_path: Path) -> None:
    weight = np.arange(600, dtype=np.float32).reshape(2, 300)
    model = model_of_text(
        "beside (float[n, 2] x, string[n] words) => (float[n, 300] y, string[n] z)"
        " { y = MatMul (x, weight) z = Identity (words) }",
        weight=weight,
    )
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, size_threshold=100)
    y, _ = onnxc.compile(tmp_path / "model.onnx")(np.ones((1, 2), np.float32), text("a"))
    assert_same(y, weight.sum(0, keepdims=True))


def test_positions_and_lengths_that_inputs_tell_are_compiled_by_value() -> None:
    """A model that is compiled by values of inputs for another reason has its sequences resolved by them too."""
    model = model_of_text("""by_value (float[2, 6] x, int64 axis, int64[k] sizes) => (float[...] y) {
        parts = SplitToSequence <axis = 1> (x, sizes)
        first = SequenceAt (parts, zero)
        y = CumSum (first, axis)
    }""".replace("float[...]", "float[2, n]"), zero=np.array(0))  # fmt: skip
    x = np.ones((2, 6), np.float32)
    executable = onnxc.compile(model)
    assert_same(executable(x, np.array(1), np.array([4, 2])), np.cumsum(x[:, :4], 1))
    assert_same(executable(x, np.array(0), np.array([1, 2, 3])), np.cumsum(x[:, :1], 0))


def test_models_without_such_values_are_compiled_wholly() -> None:
    executable = onnxc.compile(model_of_text("plain (float[n] x) => (float[n] y) { y = Relu (x) }"))
    assert isinstance(executable, Interface)


def test_results_share_no_memory_with_anything() -> None:
    model = model_of_text("""own (string[n] words, seq(float[n]) parts, float[2] x)
            => (string[n] a, string[n] b, seq(float[n]) c, float[2] d, float[2] e) {
        a = Identity (words)
        b = Identity (words)
        c = SequenceInsert (parts, weight)
        d = Identity (x)
        e = Identity (weight)
    }""", weight=np.ones(2, np.float32))  # fmt: skip
    words, parts, x = text("p", "q"), [np.zeros(2, np.float32)], np.zeros(2, np.float32)
    executable = compiled(model)
    for _ in range(2):
        a, b, c, d, e = executable(words, parts, x)
        assert_same([a, b, c, d, e], [words, words, [*parts, np.ones(2, np.float32)], x, np.ones(2, np.float32)])
        a[0], d[:], e[:] = "changed", 5, 5
        c[0][:], c[1][:] = 7, 7
        assert_same(
            [words, b, parts, x], [text("p", "q"), text("p", "q"), [np.zeros(2, np.float32)], np.zeros(2, np.float32)]
        )


def test_what_cannot_be_compiled_is_told_before_a_run() -> None:
    model = model_of_text(
        "soon (string[n] words, float[n] x) => (string[n] y, float[n] z) { y = Identity (words) z = Neg (x) }"
    )
    model.graph.node[1].op_type, model.graph.node[1].domain = "Unheard", "of"
    model.opset_import.append(helper.make_opsetid("of", 1))
    with pytest.raises(UnsupportedError, match=r'"Unheard_1" \(of.Unheard\): neither ONNX nor onnxc knows'):
        onnxc.compile(model)
    model = model_of_text("worse (string[n] words) => (string[n] y) { y = Identity (words) }")
    model.graph.node[0].op_type, model.graph.node[0].domain = "Unheard", "of"
    model.opset_import.append(helper.make_opsetid("of", 1))
    with pytest.raises(UnsupportedError, match=r'"Unheard_0" \(of.Unheard\): neither onnxc nor ONNX.s reference'):
        onnxc.compile(model)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("y = StringConcat (words, lost)", r'node "StringConcat_0" \(StringConcat\): "lost" is read, which no node'),
        (
            "y = StringConcat (words)",
            r'node "StringConcat_0" \(StringConcat\): it has 1 operands, the operator takes 2',
        ),
        ("y, n = StringSplit <limit = 3> (words)", r'it has the attribute "limit", which opset 20 does not know'),
        ("y = If <then_branch = a () => (string b) { b = Identity (words) }> (words)", "If"),
        ("a = Identity (words)", r'"y" is read, which no node'),
        ("y = StringConcat (z, words) z = Identity (y)", "form a cycle"),
    ],
)
def test_broken_models_are_refused_by_node(nodes: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        onnxc.compile(model_of_text(f"broken (string[n] words) => (string[n] y) {{ {nodes} }}"))


def test_functions_that_never_end_or_explode_are_refused() -> None:
    def model(bodies: list[str]) -> onnx.ModelProto:
        functions = "".join(
            f'<domain: "local", opset_import: ["" : 21, "local" : 1]> f{i} (x) => (y) {{ {body} }}\n'
            for i, body in enumerate(bodies)
        )
        return onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 21, "local" : 1]>'
            f"many (string[n] words) => (string[n] y) {{ y = local.f0 (words) }}\n{functions}"
        )

    with pytest.raises(ModelError, match=r"functions call themselves: f[01] -> f[01] -> f[01]"):
        onnxc.compile(model(["y = local.f1 (x)", "y = local.f0 (x)"]))
    doubling = [f"a = local.f{i + 1} (x) y = local.f{i + 1} (a)" for i in range(40)]
    with pytest.raises(LimitError, match="expand to too many nodes"):
        onnxc.compile(model([*doubling, "y = Identity (x)"]))


def test_axes_and_branches_that_the_run_computes() -> None:
    """What they decide is compiled behind them, for each value."""
    model = model_of_text("""late (float[n, m] x, float[k] scores) => (float[n, m] y) {
        doubled = Add (x, x)
        best = ArgMax <axis = 0, keepdims = 0> (scores)
        summed = CumSum (doubled, best)
        y = Relu (summed)
    }""")
    executable = onnxc.compile(model)
    x = np.random.default_rng(0).standard_normal((3, 4), np.float32)
    for scores in ([1, 0], [0, 1], [0, 2], [3, 1]):
        y = executable(x, np.array(scores, np.float32))
        np.testing.assert_allclose(y, np.maximum(np.cumsum(2 * x, int(np.argmax(scores))), 0), rtol=1e-5, atol=1e-6)
    model = model_of_text(
        """ranks (float[n, m] x) => (float[r] y) {
            total = ReduceSum <keepdims = 0> (x)
            positive = Greater (total, zero)
            y = If (positive) <then_branch = a () => (float[n, m] p) { p = Relu (x) },
                else_branch = b () => (float[m] q) { q = ReduceSum <keepdims = 0> (x, axes) }>
        }""",
        zero=np.float32(0),
        axes=np.array([0]),
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    executable = onnxc.compile(model)
    np.testing.assert_array_equal(executable(abs(x)), abs(x))
    np.testing.assert_allclose(executable(-abs(x)), -abs(x).sum(0), rtol=1e-5)
    with pytest.raises(UnsupportedError):
        executable.save("never.onnxc")


def test_ragged_lists_are_no_tensors() -> None:
    executable = compiled(model_of_text("ragged (string[n] w, float[n] x) => (string[n] y) { y = Identity (w) }"))
    with pytest.raises(ShapeError, match=r"input 'x' is .*float, float.*inhomogeneous"):
        executable(["a"], [[1.0], [1.0, 2.0]])


def test_names_that_are_no_text_are_refused() -> None:
    model = model_of_text("damaged (string[n] w) => (string[n] y) { y = StringConcat (w, w) }")
    damaged = model.SerializeToString().replace(b"StringConcat", b"String\xffoncat")
    with pytest.raises(ModelError):
        onnxc.compile(damaged)


def test_a_function_holds_a_loop_whose_state_grows() -> None:
    """The loop has no name by which the plan could find it: all loops are repeated by Python."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        outer (float[a] x, float[1] y, int64 count) => (float[b] z) { z = local.grown (x, y, count) }
        <domain: "local", opset_import: ["" : 21]>
        grown (x, y, count) => (z) {
            yes = Constant <value = bool {1}> ()
            z = Loop (count, yes, y) <body = body (int64 i, bool c, float[s] state) => (bool go, float[u] next) {
                go = Identity (c)
                next = Concat <axis = 0> (state, x)
            }>
        }
    """)
    z = compiled(model)(np.ones(2, np.float32), np.zeros(1, np.float32), np.array(3))
    assert_same(z, np.array([0, 1, 1, 1, 1, 1, 1], np.float32))
