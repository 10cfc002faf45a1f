"""Tensors of a model: every element type in every form, views instead of copies, and what must be refused."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxc.compiler.importer import import_model
from onnxc.compiler.weights import IN_PLACE, Weights, load_model
from onnxc.ir.dtypes import ALL, BY_ONNX, DType, of_numpy
from onnxc.ir.errors import ModelError

NUMERIC = [dtype for dtype in ALL if dtype.kind != "string"]


def model_of(tensor: TensorProto, op: str = "Identity") -> ModelProto:
    """A model of one node that reads the tensor."""
    output = helper.make_tensor_value_info("y", tensor.data_type, None)
    graph = helper.make_graph([helper.make_node(op, [tensor.name], ["y"])], "g", [], [output], [tensor])
    return helper.make_model(graph)


def array_of(tensor: TensorProto) -> np.ndarray:
    """The tensor's array after a round through the file's bytes."""
    proto, weights = load_model(model_of(tensor).SerializeToString())
    return weights.array(proto.graph.initializer[0])


def sample(dtype: DType, count: int) -> np.ndarray:
    numbers = np.arange(count) % 3
    return (numbers - (1 if dtype.kind == "int" else 0)).astype(np.float32).astype(dtype.numpy)


@pytest.mark.parametrize("dtype", NUMERIC, ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, 3000])
def test_raw_data_of_every_element_type(dtype: DType, count: int) -> None:
    array = sample(dtype, count)
    found = array_of(numpy_helper.from_array(array, "w"))
    assert of_numpy(found.dtype) == dtype
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", NUMERIC, ids=str)
@pytest.mark.parametrize("count", [1, 6, 3000])
def test_typed_fields_of_every_element_type(dtype: DType, count: int) -> None:
    array = sample(dtype, count)
    found = array_of(helper.make_tensor("w", dtype.onnx, [count], array))
    assert of_numpy(found.dtype) == dtype
    assert found.tobytes() == array.tobytes()


def test_strings() -> None:
    found = array_of(helper.make_tensor("w", TensorProto.STRING, [2, 1], ["größer", ""]))
    assert found.tolist() == [["größer"], [""]]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1)])
def test_rank_0_and_empty(shape: tuple[int, ...]) -> None:
    assert array_of(numpy_helper.from_array(np.ones(shape, np.float16), "w")).shape == shape


def test_bools_are_zero_or_one() -> None:
    found = array_of(TensorProto(name="w", data_type=TensorProto.BOOL, dims=[3], raw_data=b"\x00\x02\xff"))
    assert found.view(np.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize("form", ["raw", "typed"])
def test_large_tensors_are_views_of_the_file(form: str) -> None:
    array = np.arange(IN_PLACE, dtype=np.float32)
    tensor = numpy_helper.from_array(array, "w") if form == "raw" else helper.make_tensor("w", 1, [IN_PLACE], array)
    data = model_of(tensor).SerializeToString()
    proto, weights = load_model(data)
    found = weights.array(proto.graph.initializer[0])
    assert np.shares_memory(found, np.frombuffer(data, np.uint8))
    assert not found.flags.writeable
    assert np.array_equal(found, array)
    assert proto.ByteSize() < IN_PLACE


def test_weights_inside_nodes_and_branches_are_views_too() -> None:
    array = np.arange(IN_PLACE, dtype=np.float32)
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(array))
    branch = helper.make_graph([constant], "branch", [], [helper.make_tensor_value_info("c", 1, [IN_PLACE])])
    node = helper.make_node("If", ["p"], ["y"], then_branch=branch, else_branch=branch)
    condition = helper.make_tensor_value_info("p", TensorProto.BOOL, [])
    graph = helper.make_graph([node], "g", [condition], [helper.make_tensor_value_info("y", 1, None)])
    data = helper.make_model(graph).SerializeToString()
    proto, weights = load_model(data)
    for attribute in proto.graph.node[0].attribute:
        found = weights.array(attribute.g.node[0].attribute[0].t)
        assert np.shares_memory(found, np.frombuffer(data, np.uint8))
        assert np.array_equal(found, array)


MEASURE = """
    import sys
    from onnxc.compiler.importer import import_model

    def peak():
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

    warm = import_model(sys.argv[1])
    before = peak()
    graph = import_model(sys.argv[2]) if sys.argv[3] == "path" else import_model(open(sys.argv[2], "rb").read())
    assert len(graph.constants) == 1
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize(("way", "megabytes"), [("path", 40), ("path", 96), ("bytes", 40)])
def test_importing_holds_the_weights_once_at_most(tmp_path: Path, way: str, megabytes: int) -> None:
    for name, count in (("small", 4), ("large", megabytes << 18)):
        onnx.save(model_of(numpy_helper.from_array(np.zeros(count, np.float32), "w"), "Neg"), tmp_path / f"{name}.onnx")
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), tmp_path / "small.onnx", tmp_path / "large.onnx", way]
    growth = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert growth < 1.2 * (megabytes << 20)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorProto(name="w", data_type=1, dims=[3], raw_data=b"\0" * 8), '"w" of shape .3. needs 12 bytes .* 8 are'),
        (TensorProto(name="w", data_type=1, dims=[3], float_data=[1, 2]), '"w" of shape .3.'),
        (TensorProto(name="w", data_type=1, dims=[3]), '"w" of shape .3.'),
        (TensorProto(name="w", data_type=1, dims=[1 << 40, 1 << 40], raw_data=b"\0" * 8), "8 are there: .* damaged"),
        (TensorProto(name="w", data_type=1, dims=[-3], raw_data=b"\0" * 12), "negative dimension"),
        (TensorProto(name="w", data_type=1, dims=[0, 1 << 62, 1 << 62]), '"w"'),
        (TensorProto(name="w", data_type=99, dims=[3], raw_data=b"\0" * 12), "unknown element type 99"),
        (TensorProto(name="w", dims=[3], raw_data=b"\0" * 12), "unknown element type 0"),
        (TensorProto(name="w", data_type=8, dims=[1], raw_data=b"abc"), "strings as raw bytes"),
        (TensorProto(name="w", data_type=8, dims=[3], string_data=[b"abc"]), "3 strings"),
        (TensorProto(name="w", data_type=22, dims=[3], raw_data=b"\0" * 3), "needs 2 bytes"),
    ],
)
def test_tensors_that_contradict_themselves(tensor: TensorProto, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        import_model(model_of(tensor).SerializeToString())
    with pytest.raises(ModelError, match=message):
        import_model(model_of(tensor))


def test_float_data_of_another_element_type() -> None:
    numbers = np.zeros(IN_PLACE, np.float32)
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [IN_PLACE], numbers)
    tensor.data_type = TensorProto.INT32
    with pytest.raises(ModelError, match="i32 keeps its elements in float_data"):
        import_model(model_of(tensor).SerializeToString())


def sparse(indices: np.ndarray, dims: list[int]) -> onnx.SparseTensorProto:
    values = numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    return helper.make_sparse_tensor(values, numpy_helper.from_array(indices, "i"), dims)


def test_sparse_tensors_become_dense() -> None:
    weights = Weights(None, None)
    assert weights.dense(sparse(np.array([1, 5]), [2, 3])).tolist() == [[0, 1, 0], [0, 0, 2]]
    assert weights.dense(sparse(np.array([[0, 1], [1, 2]]), [2, 3])).tolist() == [[0, 1, 0], [0, 0, 2]]


@pytest.mark.parametrize("indices", [[1, 6], [-1, 2], [1], [[0, 1, 2], [0, 0, 0]], [[0, 3], [0, 0]]])
def test_sparse_tensors_with_wrong_indices(indices: list[object]) -> None:
    with pytest.raises(ModelError, match=r'sparse tensor "w".*\[2, 3\]'):
        Weights(None, None).dense(sparse(np.array(indices), [2, 3]))


# External data.

ARRAY = np.arange(24, dtype=np.float32).reshape(4, 6)


def external(location: str, shape: tuple[int, ...] = (4, 6), **entries: object) -> ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return model_of(tensor)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with data files, and one beside it that is out of bounds."""
    inside = tmp_path / "model"
    (inside / "deep").mkdir(parents=True)
    (inside / "weights.bin").write_bytes(b"\xff" * 16 + ARRAY.tobytes())
    (inside / "deep" / "weights.bin").write_bytes(ARRAY.tobytes())
    (tmp_path / "secret.bin").write_bytes(ARRAY.tobytes())
    return inside


def read(folder: Path, model: ModelProto) -> np.ndarray:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return import_model(path).constants["w"].array


def test_external_data_is_mapped(folder: Path) -> None:
    found = read(folder, external("weights.bin", offset=16, length=96))
    assert np.array_equal(found, ARRAY)
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    assert np.array_equal(read(folder, external("deep/weights.bin")), ARRAY)
    assert np.array_equal(read(folder, external("./deep/weights.bin", length=96)), ARRAY)


def test_external_data_that_onnx_itself_wrote(folder: Path) -> None:
    model = model_of(numpy_helper.from_array(ARRAY, "w"))
    onnx.save(model, folder / "saved.onnx", save_as_external_data=True, location="data.bin", size_threshold=0)
    assert np.array_equal(import_model(folder / "saved.onnx").constants["w"].array, ARRAY)


def test_the_folder_of_a_model_that_is_no_path(folder: Path) -> None:
    model = external("deep/weights.bin")
    for given in (model, model.SerializeToString()):
        assert np.array_equal(import_model(given, folder=folder).constants["w"].array, ARRAY)
        with pytest.raises(ModelError, match="pass folder="):
            import_model(given)


def test_a_link_that_stays_inside_is_followed(folder: Path) -> None:
    (folder / "link.bin").symlink_to(Path("deep") / "weights.bin")
    assert np.array_equal(read(folder, external("link.bin")), ARRAY)


@pytest.mark.parametrize(
    "location",
    [
        "../secret.bin",
        "deep/../../secret.bin",
        "/etc/passwd",
        "C:\\secret.bin",
        "..\\secret.bin",
        "\\\\host\\share",
        "",
        "a\0b",
    ],
)
def test_paths_that_leave_are_refused(folder: Path, location: str) -> None:
    with pytest.raises(ModelError, match="only a relative path inside it"):
        read(folder, external(location))


def test_links_that_leave_are_refused(folder: Path) -> None:
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    (folder / "way").symlink_to(folder.parent)
    os.link(folder.parent / "secret.bin", folder / "hard.bin")
    for location, why in (
        ("link.bin", "link that leaves"),
        ("way/secret.bin", "link that leaves"),
        ("hard.bin", "hard link"),
    ):
        with pytest.raises(ModelError, match=f"{why}.*copy the file"):
            read(folder, external(location))


def test_what_is_no_file_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    reasons = {"deep": "no regular file|cannot be read", "pipe": "no regular file", "none": "cannot be read"}
    for location, why in (reasons | {"loop": "cannot be read"}).items():
        with pytest.raises(ModelError, match=why):
            read(folder, external(location))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux tells what was opened")
def test_a_folder_that_becomes_a_link_while_it_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is checked, then its folder swapped for a link (CVE-2026-34447 and its kin leave such a gap)."""
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "weights.bin").write_bytes(ARRAY.tobytes())
    resolve = Path.resolve

    def swapping(path: Path, strict: bool = False) -> Path:
        found = resolve(path, strict=strict)
        if path.name == "weights.bin" and (folder / "deep").is_dir() and not (folder / "deep").is_symlink():
            (folder / "deep").rename(folder / "moved")
            (folder / "deep").symlink_to(folder.parent / "elsewhere")
        return found

    monkeypatch.setattr(Path, "resolve", swapping)
    with pytest.raises(ModelError, match="changed while it was opened"):
        read(folder, external("deep/weights.bin"))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a device")
def test_a_device_is_no_model() -> None:
    with pytest.raises(ModelError, match="is a device"):
        import_model("/dev/zero")


def test_keys_of_external_data_change_nothing_else(folder: Path) -> None:
    """CVE-2026-34445: keys named after attributes of a loader's object."""
    assert np.array_equal(read(folder, external("deep/weights.bin", __class__="x", basepath="..", _data="1")), ARRAY)


def test_many_external_files(folder: Path) -> None:
    model = external("f0.bin", (2,))
    for index in range(300):
        (folder / f"f{index}.bin").write_bytes(np.float32([index, 1]).tobytes())
        tensor = external(f"f{index}.bin", (2,)).graph.initializer[0]
        tensor.name = f"w{index}"
        model.graph.initializer.append(tensor)
    model.graph.node.add(op_type="Sum", input=[f"w{index}" for index in range(300)], output=["z"])
    model.graph.output.add(name="z").type.tensor_type.elem_type = 1
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    graph = import_model(folder / "model.onnx")
    assert graph.constants["w299"].array.tolist() == [299, 1]


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": 17},
        {"offset": -1},
        {"offset": 0, "length": 113},
        {"offset": "x"},
        {"offset": 1 << 70},
        {"length": -4},
    ],
)
def test_places_outside_the_file_are_refused(folder: Path, entries: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r'"weights.bin"|is no number'):
        read(folder, external("weights.bin", **entries))


def test_a_length_that_contradicts_the_shape(folder: Path) -> None:
    with pytest.raises(ModelError, match="needs 96 bytes"):
        read(folder, external("weights.bin", length=92))


def test_the_element_types_are_all_tested() -> None:
    assert set(BY_ONNX.values()) == {*NUMERIC, BY_ONNX[TensorProto.STRING]}
