"""Arrays from the command line: files, numbers, made-up values; and back to files."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import numpy_helper
from onnxc.compiler.binding import Port
from onnxc.ir.dtypes import BY_NAME
from onnxc.ir.errors import OnnxcError
from onnxc.tools import arrays
from PIL import Image

X = Port("x", "f32", ("batch", 3))


def test_numbers_take_the_type_and_shape_of_the_input() -> None:
    cases = [
        (Port("x", "f32", (2, 2)), "1,2.5,-3,1e2", np.array([[1, 2.5], [-3, 100]], np.float32)),
        (Port("x", "i64", (1, "tokens")), "7,8,9", np.array([[7, 8, 9]])),
        (Port("x", "i64", ()), "5", np.array(5)),
        (Port("x", "bool", (3,)), "true,0,False", np.array([True, False, False])),
        (Port("x", "i32", ("batch", "tokens")), "1,2", np.array([[1, 2]], np.int32)),
        (Port("x", "bf16", (2,)), "1,0.5", np.array([1, 0.5], ml_dtypes.bfloat16)),
    ]
    for port, text, expected in cases:
        found = arrays.read_array(text, port)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("port", "text", "message"),
    [
        (X, "1,2", "2 numbers do not fill this shape"),
        (X, "1,two", "neither numbers of .*, nor a file"),
        (X, "lost.npy", "no such file"),
        (Port("x", "u8", (2,)), "255,256", "not all of 255,256 are from 0 to 255"),
        (Port("x", "i32", (1,)), "1.5", "neither numbers of .*, nor a file"),
        (Port("x", "seq(f32[])", ()), "1", "cannot be given as numbers, only as a file"),
    ],
)
def test_what_cannot_be_read_is_said(port: Port, text: str, message: str) -> None:
    with pytest.raises(OnnxcError, match=message):
        arrays.read_array(text, port)


def test_files(tmp_path: Path) -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    other = value + 1
    np.save(tmp_path / "x.npy", value)
    np.savez(tmp_path / "both.npz", x=value, other=other)
    (tmp_path / "x.pb").write_bytes(numpy_helper.from_array(value).SerializeToString())
    for name in ("x.npy", "both.npz", "both.npz:x", "x.pb"):
        assert np.array_equal(arrays.read_array(str(tmp_path / name), X), value), name
    assert np.array_equal(arrays.read_array(f"{tmp_path}/both.npz:other", X), other)
    with pytest.raises(OnnxcError, match="holds x, other; say which"):
        arrays.read_array(f"{tmp_path}/both.npz", Port("y", "f32", (2, 3)))
    (tmp_path / "broken.npy").write_bytes(b"no numbers here")
    with pytest.raises(OnnxcError, match=r"broken\.npy cannot be read"):
        arrays.read_array(f"{tmp_path}/broken.npy", X)


def test_inputs_by_name_or_as_the_only_one(tmp_path: Path) -> None:
    y = Port("y=1", "i64", (2,))
    np.save(tmp_path / "x.npy", np.ones((1, 3), np.float32))
    np.savez(tmp_path / "all.npz", x=np.zeros((1, 3), np.float32))
    found, fills = arrays.read_arrays([f"{tmp_path}/x.npy"], [X])
    assert (list(found), fills) == (["x"], {})
    found, fills = arrays.read_arrays([f"x={tmp_path}/x.npy", "y=random"], [X, Port("y", "i64", (2,))])
    assert (list(found), fills) == (["x"], {"y": "random"})
    found, _ = arrays.read_arrays([f"{tmp_path}/all.npz"], [X, y])
    assert not found["x"].any()
    for wrong, message in (
        (f"{tmp_path}/x.npy", "which of x, y=1"),
        ("z=ones", r"no input z; it takes x: f32\[batch, 3\]"),
    ):
        with pytest.raises(OnnxcError, match=message):
            arrays.read_arrays([wrong], [X, y])


def test_types_that_files_lack_are_converted(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([1, 2], np.float32))
    found, _ = arrays.read_arrays([f"{tmp_path}/x.npy"], [Port("x", "bf16", (2,))])
    assert found["x"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("shape", [(1, 3, 4, 8), (1, 4, 8, 3), ("batch", 3, "height", "width"), (3, 4, 8)])
def test_pictures_fit_the_input(tmp_path: Path, shape: tuple[int | str, ...]) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    found = arrays.read_array(f"{tmp_path}/x.png", Port("x", "f32", shape))
    last = shape[-1] == 3
    expected = (picture if last else picture.transpose(2, 0, 1)).astype(np.float32) / 255
    assert found.dtype == np.float32
    assert np.allclose(found, expected[None] if len(shape) == 4 else expected)


def test_pictures_are_resized_and_made_grey(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (255, 255, 255)).save(tmp_path / "x.png")
    found = arrays.read_array(f"{tmp_path}/x.png", Port("x", "u8", (1, 1, 5, 7)))
    assert (found.shape, found.dtype) == ((1, 1, 5, 7), np.dtype(np.uint8))
    assert found.min() == 255
    with pytest.raises(OnnxcError, match="does not look like a picture"):
        arrays.read_array(f"{tmp_path}/x.png", X)


def test_sizes_follow_the_arrays_that_are_given() -> None:
    ids, mask, image = (
        Port("ids", "i64", ("n", "s")),
        Port("mask", "f32", ("n", "s+past")),
        Port("i", "f32", (1, 3, "h", "?")),
    )
    sizes = arrays.sizes_for([ids, mask, image], {"ids": np.zeros((4, 9))})
    random = np.random.default_rng(0)
    assert arrays.made_up(ids, sizes, "random", random).shape == (4, 9)
    assert arrays.made_up(mask, sizes, "zeros", random).shape == (4, 9 + arrays.USUAL_SIZE)
    assert arrays.made_up(image, sizes, "ones", random).shape == (1, 3, arrays.USUAL_IMAGE, arrays.USUAL_IMAGE)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "i64", "i8", "u8", "bool", "f64"])
def test_made_up_values_have_the_type_and_repeat(dtype: str) -> None:
    port = Port("x", dtype, (50, 20, 3))
    first, second = (arrays.made_up(port, {}, "random", np.random.default_rng(3)) for _ in range(2))
    assert BY_NAME[dtype].numpy == first.dtype
    assert np.array_equal(first, second)
    assert len(np.unique(first)) >= 2
    assert arrays.made_up(port, {}, "ones", np.random.default_rng(3)).astype(float).mean() == 1


def test_written_arrays_are_read_back(tmp_path: Path) -> None:
    narrow = np.array([[1, 2.5]], ml_dtypes.bfloat16)
    arrays.write_array(tmp_path / "x.npy", narrow)
    assert np.array_equal(np.load(tmp_path / "x.npy"), narrow.astype(np.float32))
    whole = np.array(3, np.int64)
    arrays.write_array(tmp_path / "x.pb", whole)
    assert arrays.read_array(f"{tmp_path}/x.pb", Port("x", "i64", ())) == whole
    with pytest.raises(OnnxcError, match=r"written as \.npy or \.pb"):
        arrays.write_array(tmp_path / "x.csv", whole)
    assert arrays.file_name("/model/layer:0") == "_model_layer_0"
    assert arrays.file_name("..") == "output"
