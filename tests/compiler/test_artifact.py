"""Artifacts: saved and loaded they do what the model did; what is broken or foreign is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxc
import pytest
from onnxc.compiler import artifact
from onnxc.compiler.compiled import Compiled
from onnxc.ir.target import Target
from small_models import image, model_of_text, small_cnn


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnxc.Executable, Path]:
    executable = onnxc.compile(small_cnn())
    assert isinstance(executable, onnxc.Executable)
    return executable, executable.save(tmp_path_factory.mktemp("artifacts") / "cnn.onnxc")


def test_a_loaded_artifact_is_the_model(saved: tuple[onnxc.Executable, Path]) -> None:
    executable, path = saved
    loaded = onnxc.load(path)
    assert (loaded.inputs, loaded.outputs) == (executable.inputs, executable.outputs)
    assert repr(loaded) == repr(executable)
    assert loaded.plan == executable.plan
    assert loaded.plan.at(batch=7, height=5) == executable.plan.at(batch=7, height=5)
    for shape in ((1, 3, 8, 8), (3, 3, 9, 7), (0, 3, 4, 4)):
        expected = executable(image(*shape))
        np.testing.assert_array_equal(loaded(image(*shape)), expected)
        np.testing.assert_array_equal(loaded.run({"image": image(*shape)})["scores"], expected)
    with pytest.raises(onnxc.ShapeError, match="axis 1 of input 'image' is 4: it must be 3"):
        loaded(image(1, 4, 8, 8))


def test_texts_are_kept(saved: tuple[onnxc.Executable, Path]) -> None:
    executable, path = saved
    loaded = onnxc.load(path)
    for stage in ("import", "graph"):
        assert loaded.dump(stage) == executable.dump(stage)
    assert "Softmax" in loaded.dump("graph")
    with pytest.raises(onnxc.UnsupportedError, match="holds no text of the stage 'llvm'"):
        loaded.dump("llvm")


def test_a_loaded_artifact_can_be_saved(saved: tuple[onnxc.Executable, Path], tmp_path: Path) -> None:
    _, path = saved
    again = onnxc.load(path).save(tmp_path / "again.onnxc")
    assert again.read_bytes() == path.read_bytes()


def test_loading_compiles_nothing_and_maps_the_weights(saved: tuple[onnxc.Executable, Path]) -> None:
    """In a process of its own: neither the passes nor the importer are asked for anything."""
    _, path = saved
    script = f"""
import onnxc, sys
from onnxc.backends.cpu import objects
from onnxc.compiler import artifact, driver
def refuse(*arguments, **named): raise AssertionError("compiled")
driver.compiled_model = driver.import_model = objects.compile_objects = refuse
loaded = onnxc.load({str(path)!r})
for array in loaded.compiled.constants.values():
    assert array.ctypes.data % 64 == 0 and not array.flags.writeable and not array.flags.owndata
assert str({str(path)!r}) in open("/proc/self/maps").read() or sys.platform != "linux"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_symbols_that_the_run_binds(tmp_path: Path) -> None:
    model = model_of_text(
        """g (float[n] x, float[n] y) => (int64[1, count] where, float[n] total) {
            positive = Greater (x, y)
            where = NonZero (positive)
            total = Add (x, y)
        }"""
    )
    loaded = onnxc.load(onnxc.compile(model).save(tmp_path / "m.onnxc"))
    x, y = np.float32([1, -2, 3, 4]), np.float32([0, 0, 5, 0])
    where, total = loaded(x, y)
    np.testing.assert_array_equal(where, [[0, 3]])
    np.testing.assert_array_equal(total, x + y)
    with pytest.raises(onnxc.ShapeError, match="axis 0 of input 'y' is 3: it must be n"):
        loaded(x, y[:3])


def test_every_flipped_byte_is_noticed(saved: tuple[onnxc.Executable, Path], tmp_path: Path) -> None:
    content = bytearray(saved[1].read_bytes())
    damaged = tmp_path / "damaged.onnxc"
    random = np.random.default_rng(0)
    places = {*range(88), len(content) - 1, *random.integers(0, len(content), 300).tolist()}
    for place in places:
        content[place] ^= 0x10
        damaged.write_bytes(content)
        content[place] ^= 0x10
        with pytest.raises((onnxc.ModelError, onnxc.UnsupportedError), match=r"damaged\.onnxc: "):
            artifact.read(damaged)


def test_every_truncation_is_noticed(saved: tuple[onnxc.Executable, Path], tmp_path: Path) -> None:
    content = saved[1].read_bytes()
    short = tmp_path / "short.onnxc"
    for length in {*range(0, 100, 7), len(content) // 2, len(content) - 64, len(content) - 1}:
        short.write_bytes(content[:length])
        with pytest.raises(onnxc.ModelError, match=r"truncated|no artifact"):
            artifact.read(short)
    short.write_bytes(content + bytes(64))
    with pytest.raises(onnxc.ModelError, match="damaged"):
        artifact.read(short)


def test_unread_weights_are_trusted(saved: tuple[onnxc.Executable, Path], tmp_path: Path) -> None:
    content = bytearray(saved[1].read_bytes())
    content[-1] ^= 1
    path = tmp_path / "weights.onnxc"
    path.write_bytes(content)
    assert isinstance(artifact.read(path, verify=False), Compiled)
    with pytest.raises(onnxc.ModelError, match="checksum of its weights"):
        onnxc.load(path)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(small_cnn().SerializeToString())
    with pytest.raises(onnxc.ModelError, match=r"no artifact of onnxc; `onnxc compile model\.onnx"):
        onnxc.load(path)
    with pytest.raises(onnxc.ModelError, match="cannot be read"):
        onnxc.load(tmp_path / "absent.onnxc")
    with pytest.raises(onnxc.ModelError, match="cannot be read"):
        onnxc.load(tmp_path)


def test_another_version_is_refused(saved: tuple[onnxc.Executable, Path], tmp_path: Path) -> None:
    content = bytearray(saved[1].read_bytes())
    content[8] = 99
    path = tmp_path / "future.onnxc"
    path.write_bytes(content)
    with pytest.raises(onnxc.UnsupportedError, match="format 99, but this onnxc reads 2: compile it anew"):
        onnxc.load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"segments":1', '"segments":2'),
        ('"ready":[0]', '"ready":[9]'),
        ('"ready":[0]', '"ready":[]'),
        ('"dtype":"f32"', '"dtype":"f99"'),
        ('["batch",5]', '["batch+",5]'),
        ('["batch",5]', '["other",5]'),
        ('"objects":[[', '"objects":[[-64,64],['),
        ('"objects":[[', '"objects":[[0,1e9],['),
        ('"objects":[[', '"objects":[[0,999999999],['),
        ('"constants":{', '"constants":{"wrong":[8,8],'),
        ('"kernels":{', '"kernels":{"k":7,'),
        ('"symbols":[', '"symbols":[[],'),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(
    saved: tuple[onnxc.Executable, Path], tmp_path: Path, old: str, new: str
) -> None:
    """The checksums are right, the content is not."""
    content = saved[1].read_bytes()
    magic, version, manifest_bytes, total, weights_start, *checksums = artifact._HEADER.unpack_from(content)
    end = artifact._HEADER.size + manifest_bytes
    manifest = content[artifact._HEADER.size : end].decode()
    assert old in manifest and json.loads(manifest)["onnxc"] == onnxc.__version__
    changed = manifest.replace(old, new, 1).encode()
    # The code moves by as much as the description grew, the weights by a page: places count from where a part begins.
    code = content[end:weights_start] + bytes(artifact.PAGE - len(changed) + manifest_bytes)
    head = magic, version, len(changed), total + artifact.PAGE, weights_start + artifact.PAGE
    fields = artifact._HEADER.pack(*head, *checksums)[: artifact._CHECKSUMS]
    header = artifact._HEADER.pack(*head, artifact._digest(fields, changed), artifact._digest(code), checksums[2])
    path = tmp_path / "senseless.onnxc"
    path.write_bytes(header + changed + code + content[weights_start:])
    with pytest.raises(onnxc.ModelError, match=r"senseless\.onnxc: the artifact is damaged"):
        artifact.read(path)


def test_code_for_another_machine_is_refused(saved: tuple[onnxc.Executable, Path], tmp_path: Path) -> None:
    compiled = saved[0].compiled
    host = compiled.target
    better = replace(host, enabled=host.enabled | {"avx1024", "sgx"})
    path = artifact.save(replace(compiled, target=better), tmp_path / "better.onnxc")
    with pytest.raises(onnxc.TargetError, match=r"which lacks avx1024$"):
        onnxc.load(path)
    foreign = Target.parse("aarch64" if host.architecture == "x86_64" else "x86-64-v3")
    path = artifact.save(replace(compiled, target=foreign), tmp_path / "foreign.onnxc")
    with pytest.raises(onnxc.TargetError, match="cannot run on this machine"):
        onnxc.load(path)


def test_a_file_is_replaced_only_by_a_whole_one(saved: tuple[onnxc.Executable, Path], tmp_path: Path) -> None:
    compiled = saved[0].compiled
    path = artifact.save(compiled, tmp_path / "m.onnxc")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        artifact.save(replace(compiled, objects=(b"", None)), path)  # type: ignore[arg-type]
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnxc"]
    assert path.read_bytes() == before


def test_a_model_that_values_compile_cannot_be_saved(tmp_path: Path) -> None:
    model = model_of_text("g (float[n, m] x, int64[1] axis) => (float[k] y) { y = ReduceSum <keepdims = 0> (x, axis) }")
    executable = onnxc.compile(model)
    with pytest.raises(onnxc.UnsupportedError, match="compiled anew for axis"):
        executable.save(tmp_path / "m.onnxc")
