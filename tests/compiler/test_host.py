"""Models that Python runs in part: text, sequences of unknown length, optionals, images, loops whose state changes."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
import onnxruntime
import pytest
from onnx import helper
from onnxc.compiler.host.executable import HostExecutable
from onnxc.compiler.interface import Interface
from onnxc.ir.errors import ModelError, OnnxcError, ShapeError, TargetError, UnsupportedError
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


def text(*items: Any) -> np.ndarray:
    return np.array(items, object)


def compiled(model: onnx.ModelProto, **options: Any) -> HostExecutable:
    executable = onnxc.compile(model, **options)
    assert isinstance(executable, HostExecutable)
    return executable


def growing() -> onnx.ModelProto:
    return model_of_text(GROWING, yes=np.array(True), weight=np.float32(2))


def assert_same(found: Any, expected: Any) -> None:
    """Lists, arrays, dicts and None, the same in type, shape and every element."""
    assert type(found) is type(expected), (found, expected)
    if isinstance(found, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(found, np.ndarray):
        np.testing.assert_array_equal(found, expected, strict=True)
    else:
        assert found == expected


def against_onnxruntime(model: onnx.ModelProto, inputs: Mapping[str, Any]) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert_same(list(compiled(model).run(inputs).values()), session.run(None, dict(inputs)))


def with_types(model: onnx.ModelProto, **types: onnx.TypeProto) -> onnx.ModelProto:
    """The model with other types for inputs and outputs: those that ONNX's text has no syntax for."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name in types:
            value.type.CopyFrom(types[value.name])
    return model


def ml(model: onnx.ModelProto) -> onnx.ModelProto:
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 5))
    return model


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


@pytest.mark.parametrize(
    "nodes",
    [
        'y = StringNormalizer <case_change_action = "LOWER", locale = "C", stopwords = ["b"]> (x)',
        "s = Shape (x) f = ConstantOfShape (s) y = Cast <to = 8> (big)  big = Cast <to = 7> (f)",
        "y = Cast <to = 1> (big) big = Constant <value_strings = ['1', '2.5', '-inf', 'NaN', '1e3']> ()",
        "y = Tile (x, two)",
        "y = Where (choice, x, other) choice = Equal (x, b) b = Constant <value_strings = ['b']> ()"
        " other = Identity (b)",
        "y = Slice (x, start, end, axis, back)",
        "y = Gather (x, two)",
        "y = Concat <axis = 0> (x, x)",
        "y, i, j, k = Unique <sorted = 0> (x)",
        "u, y = Unique (x)",
        "y = Expand (r, shape) r = Reshape (x, column) column = Constant <value_ints = [3, 1]> ()"
        " shape = Constant <value_ints = [3, 2]> ()",
        'y = ai.onnx.ml.CategoryMapper <cats_strings = ["a", "b"], cats_int64s = [5, 6]> (x)',
        'y = ai.onnx.ml.OneHotEncoder <cats_strings = ["a", "b"]> (x)',
        'y = ai.onnx.ml.LabelEncoder <keys_strings = ["a", "b"], values_floats = [0.5, 0.25]> (x)',
        'i = ai.onnx.ml.LabelEncoder <keys_strings = ["a", "b"], values_int64s = [1, 0]> (x)'
        ' y = ai.onnx.ml.LabelEncoder <keys_int64s = [0, 1], values_strings = ["p", "q"]> (i)',
        "y = ai.onnx.ml.ArrayFeatureExtractor (x, two)",
        'y = TfIdfVectorizer <mode = "TF", min_gram_length = 1, max_gram_length = 2, max_skip_count = 1,'
        ' ngram_counts = [0, 2], ngram_indexes = [0, 1, 2], pool_strings = ["a", "b", "a", "b"]> (x)',
        'y = RegexFullMatch <pattern = "[ab]+c?"> (x)',
        'y, i = StringSplit <delimiter = "b", maxsplit = 1> (x)',
    ],
)
def test_operators_on_text_as_onnxruntime_has_them(nodes: str) -> None:
    text_model = "text (string[n] x) => (float y) {" + nodes.replace("'", '"') + "}"
    constants = {"two": [2], "start": [-1], "end": [-10], "axis": [0], "back": [-1]}
    used = {name: np.array(value) for name, value in constants.items() if name in nodes.replace("two_", "")}
    model = ml(model_of_text(text_model, **used))
    _sorted_nodes(model)
    (result,) = model.graph.output
    result.type.Clear()
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {value.name: value.type for value in (*inferred.graph.value_info, *inferred.graph.output)}
    result.type.CopyFrom(types["y"])
    against_onnxruntime(model, {"x": text("b", "a", "abc")})


def _sorted_nodes(model: onnx.ModelProto) -> None:
    """ONNX Runtime wants nodes behind those that they read."""
    from onnxc.compiler.nodes import in_order

    nodes = [node for _, node in in_order(model.graph.node)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def map_type(key: int, value: int) -> onnx.TypeProto:
    return helper.make_map_type_proto(key, helper.make_tensor_type_proto(value, []))


def test_maps() -> None:
    model = ml(
        model_of_text(
            "zip (float[n, 2] x) => (float y) { z = Neg (x)"
            ' y = ai.onnx.ml.ZipMap <classlabels_strings = ["a", "b"]> (z) }'
        )
    )
    model = with_types(model, y=helper.make_sequence_type_proto(map_type(8, 1)))
    against_onnxruntime(model, {"x": np.array([[1, 2], [3, 4]], np.float32)})
    for key, vocabulary, given in (
        (8, 'string_vocabulary = ["a", "b", "c"]', {"c": 1.5, "a": 2.0}),
        (7, "int64_vocabulary = [5, 6]", {6: 2.0, 9: 1.0}),
    ):
        model = ml(
            model_of_text(f"words (float x) => (float[1, n] y) {{ y = ai.onnx.ml.DictVectorizer <{vocabulary}> (x) }}")
        )
        against_onnxruntime(with_types(model, x=map_type(key, 1)), {"x": given})
    for form in ("", ', map_form = "SPARSE", max_map = 5'):
        model = ml(
            model_of_text(
                f'cast (float x) => (float[1, n] y) {{ y = ai.onnx.ml.CastMap <cast_to = "TO_FLOAT"{form}> (x) }}'
            )
        )
        model = with_types(model, x=map_type(7, 1))
        against_onnxruntime(model, {"x": {3: 2.5, 1: 0.5}})
        with pytest.raises(ShapeError, match=r"input 'x' is map: it must be map\(i64, f32\[\]\); a key is no int"):
            compiled(model)({"a": 1.0})
        with pytest.raises(ShapeError, match="a dict"):
            compiled(model)(np.zeros(1, np.float32))


def test_classifiers_with_labels_of_text_are_compiled_but_for_the_labels() -> None:
    model = ml(
        model_of_text(
            """classifier (float[n, 2] x) => (string[n] label, float[n, 3] scores) {
            scaled = Mul (x, x)
            label, scores = ai.onnx.ml.LinearClassifier <
                classlabels_strings = ["a", "b", "c"], post_transform = "SOFTMAX",
                coefficients = [1.0, -2.0, 0.5, 0.25, -1.0, 2.0], intercepts = [0.5, 1.0, -1.0]> (scaled)
        }"""
        )
    )
    x = np.random.default_rng(0).standard_normal((9, 2), np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    executable = compiled(model)
    label, scores = executable(x)
    expected = session.run(None, {"x": x})
    assert_same(label, expected[0])
    np.testing.assert_allclose(scores, expected[1], rtol=1e-5, atol=1e-6)
    assert [line.split()[0] for line in executable.dump().splitlines()] == ["compiled", "python"]


def encoded(image: np.ndarray, kind: str) -> np.ndarray:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def decoder(pixels: str) -> onnx.ModelProto:
    return model_of_text(f"""decoder (uint8[n] file) => (uint8[h, w, c] image, float[c] mean) {{
        image = ImageDecoder <pixel_format = "{pixels}"> (file)
        wide = Cast <to = 1> (image)
        mean = ReduceMean <keepdims = 0> (wide, axes)
    }}""", axes=np.array([0, 1]))  # fmt: skip


def test_images_of_any_mode_have_the_channels_asked_for() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    grey = colours[:, :, 0]
    for pixels, image, expected in (
        ("RGB", colours, colours),
        ("BGR", colours, colours[:, :, ::-1]),
        ("RGB", grey, np.stack([grey] * 3, -1)),
        ("Grayscale", grey, grey[:, :, None]),
    ):
        decoded, mean = compiled(decoder(pixels))(encoded(image, "PNG"))
        assert_same(decoded, np.ascontiguousarray(expected))
        np.testing.assert_allclose(mean, expected.mean((0, 1)), rtol=1e-5)
    with pytest.raises(OnnxcError, match=r'"ImageDecoder_0" \(ImageDecoder\) on \(uint8\[3\]\): cannot identify'):
        compiled(decoder("RGB"))(np.zeros(3, np.uint8))
    with pytest.raises(ModelError, match="no pixel format 'CMYK'"):
        compiled(decoder("CMYK"))(encoded(colours, "PNG"))


def test_images_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(TargetError, match=r"pip install onnxc\[image\]"):
        compiled(decoder("RGB"))(np.zeros(3, np.uint8))


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
