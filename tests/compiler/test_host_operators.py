"""Operators that Python runs: text, maps and images, as ONNX Runtime has them."""

from __future__ import annotations

import io

import numpy as np
import onnx
import onnxruntime
import pytest
from host_models import against_onnxruntime, assert_same, compiled, ml, text, with_types
from onnx import helper
from onnxc.ir.errors import ModelError, OnnxcError, ShapeError, TargetError
from small_models import model_of_text


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


def test_a_classifier_of_texts() -> None:
    """Words are counted by Python, scores are compiled, labels are named by Python."""
    words = ["good", "bad", "film", "the", "not", "good"]
    model = ml(
        model_of_text(
            """reviews (string[n] words) => (string[1] label, float y) {
                lower = StringNormalizer <case_change_action = "LOWER", locale = "C", stopwords = ["the"]> (words)
                counts = TfIdfVectorizer <mode = "TFIDF", min_gram_length = 1, max_gram_length = 2, max_skip_count = 0,
                    ngram_counts = [0, 4], ngram_indexes = [0, 1, 2, 3, 4], weights = [1.0, 2.0, 1.0, 0.5, 3.0],
                    pool_strings = [WORDS]> (lower)
                row = Unsqueeze (counts, zero)
                scaled = Div (row, two)
                label, shares = ai.onnx.ml.LinearClassifier <classlabels_strings = ["nice", "nasty"],
                    coefficients = [1.0, -1.0, 0.1, 0.0, -2.0, -1.0, 1.0, 0.1, 0.0, 2.0],
                    intercepts = [0.1, 0.0], multi_class = 1, post_transform = "SOFTMAX"> (scaled)
                y = ai.onnx.ml.ZipMap <classlabels_strings = ["nice", "nasty"]> (shares)
            }""".replace("WORDS", ", ".join(f'"{word}"' for word in words)),
            zero=np.array([0]),
            two=np.float32(2),
        )
    )
    model = with_types(model, y=helper.make_sequence_type_proto(map_type(8, 1)))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    executable = compiled(model)
    for given in (["The", "film", "not", "good"], ["good", "good", "film"], ["bad"]):
        label, shares = executable(text(*given))
        expected, (wanted,) = session.run(None, {"words": text(*given)})
        assert_same(label, expected)
        assert shares[0].keys() == wanted.keys()
        np.testing.assert_allclose([shares[0][key] for key in wanted], list(wanted.values()), rtol=1e-5)
    assert [line.split()[0] for line in executable.dump().splitlines()] == ["python"] * 2 + ["compiled"] + [
        "python"
    ] * 2
