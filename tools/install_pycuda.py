"""Installs what target="cuda" needs into this Python environment: NVRTC and PyCUDA.

    python -m onnxc.tools.install_pycuda [--cuda 12|13]

For machines on which `pip install onnxc[cuda]` fails, as PyCUDA comes as source code that wants a CUDA toolkit: this
builds it with nothing but a C++ compiler and Python's headers, with a GPU, a driver and a toolkit or without them. A
toolkit that CUDA_HOME names is used; else CUDA's headers come from NVIDIA's Python packages, of CUDA 13, or of CUDA 12
for an older driver. What PyCUDA links to, libcuda.so.1, belongs to the driver: a library with the functions' names
alone stands in for it. The wheel is kept in onnxc's cache folder, so that the next environment has it in a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import click

from ..backends.cuda import nvrtc
from ..backends.object_cache import cache_folder
from ..ir.errors import OnnxcError, TargetError

HEADERS = ("cuda.h", "cudaProfiler.h")
"""What PyCUDA includes of CUDA, besides its own."""
HEADER_PACKAGES = {
    13: ("nvidia-cuda-runtime==13.0.*", "nvidia-cuda-profiler-api==13.0.*"),
    12: ("nvidia-cuda-runtime-cu12==12.9.*", "nvidia-cuda-profiler-api-cu12==12.9.*"),
}
EXTRAS = {13: "cuda", 12: "cuda12"}
"""Of this package, by CUDA's major version."""


@click.command(help=__doc__)
@click.option("--cuda", type=click.Choice(["12", "13"]), help="CUDA's version; default: the driver's, else 13.")
def main(cuda: str | None) -> None:
    try:
        version = int(cuda) if cuda else min(max(driver_version() or 13, 12), 13)
        if not nvrtc.is_available():
            pip("install", requirement(version, "nvidia-cuda-nvrtc"))
        click.echo(install(version))
    except OnnxcError as error:
        raise click.ClickException(str(error)) from error


def install(cuda: int) -> str:
    """Installs PyCUDA if it is not there. Returns a sentence that says what was done; raises TargetError."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return f"PyCUDA {metadata.version('pycuda')} is there"
    wanted, toolkit = requirement(cuda, "pycuda"), toolkit_headers()
    kept = wheel_folder(header_version(toolkit) if toolkit else cuda)
    with contextlib.suppress(TargetError):  # a wheel that was kept, or that the index has
        pip("install", "--only-binary", "pycuda", "--find-links", str(kept), wanted)
        return f"installed PyCUDA {metadata.version('pycuda')}"
    require_compiler()
    with tempfile.TemporaryDirectory(prefix="onnxc-pycuda-") as name:
        folder = Path(name)
        wheel = build(folder, toolkit or packaged_headers(cuda, folder / "headers"), wanted)
        with contextlib.suppress(OSError):
            kept.mkdir(parents=True, exist_ok=True)
            wheel = Path(shutil.copy2(wheel, kept))
        pip("install", str(wheel))
    return f"built and installed PyCUDA {metadata.version('pycuda')}"


def requirement(cuda: int, package: str) -> str:
    """What this package's extra for a version of CUDA asks for, as pip takes it. Raises TargetError."""
    for line in metadata.requires("onnxc") or ():
        wanted, _, marker = line.partition(";")
        if wanted.startswith(package) and re.search(rf"extra == ['\"]{EXTRAS[cuda]}['\"]", marker):
            return wanted.strip()
    raise TargetError(f"the installed onnxc has no extra {EXTRAS[cuda]!r} with {package}: install it anew")


def driver_version() -> int | None:
    """The newest major version of CUDA that this machine's driver knows; None where there is no driver."""
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            return version.value // 1000
    return None


def header_version(headers: Path) -> int:
    """CUDA's major version by its headers."""
    found = re.search(r"#define CUDA_VERSION (\d+)", (headers / "cuda.h").read_text())
    return int(found[1]) // 1000 if found else 0


def wheel_folder(cuda: int) -> Path:
    """Where wheels for this Python and this version of CUDA's headers are kept."""
    return cache_folder() / "wheels" / f"{sysconfig.get_config_var('SOABI') or sys.implementation.cache_tag}-cuda{cuda}"


def pip(command: str, *arguments: str) -> None:
    """Runs pip of this environment. Raises TargetError with the end of what it said where it fails."""
    if find_spec("pip") is None:
        raise TargetError(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip` first")
    options = ("--quiet", "--disable-pip-version-check", "--no-input")
    _run([sys.executable, "-m", "pip", command, *options, *arguments])


def _run(command: Sequence[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        said = "\n".join((run.stdout + run.stderr).strip().splitlines()[-20:])
        raise TargetError(f"{' '.join(command)} failed:\n{said}")


def require_compiler() -> None:
    """Raises TargetError, saying what to install, where PyCUDA cannot be compiled."""
    if shutil.which(_compiler()) is None:
        raise TargetError(
            f"PyCUDA is built from source, and there is no C++ compiler ({_compiler()}): install it (on Debian and "
            "Ubuntu: apt-get install g++), or set CXX"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise TargetError(
            f"PyCUDA is built from source, and Python's headers are not in {sysconfig.get_path('include')}: install "
            f"them (on Debian and Ubuntu: apt-get install python{version}-dev)"
        )


def _compiler() -> str:
    return os.environ.get("CXX", "g++").split()[0]


def toolkit_headers() -> Path | None:
    """The headers of the toolkit that CUDA_HOME or CUDA_PATH names."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        folder = Path(os.environ.get(name, ""), "include")
        if os.environ.get(name) and all((folder / header).exists() for header in HEADERS):
            return folder
    return None


def packaged_headers(cuda: int, folder: Path) -> Path:
    """CUDA's headers out of NVIDIA's packages, put into a folder. Nothing of them is installed."""
    pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), *HEADER_PACKAGES[cuda])
    return unpack_headers(folder.glob("*.whl"), folder / "include")


def unpack_headers(wheels: Iterable[Path], folder: Path) -> Path:
    """What is in the wheels' `include` folders, in one folder. Raises TargetError where one of HEADERS is missing."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                _, marked, inside = name.partition("/include/")
                place = folder / inside
                if marked and not name.endswith("/") and place.resolve().is_relative_to(folder.resolve()):
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(archive.read(name))
    missing = [header for header in HEADERS if not (folder / header).exists()]
    if missing:
        raise TargetError(f"NVIDIA's packages lack the headers {', '.join(missing)}")
    return folder


def link_stub(headers: Path, folder: Path) -> Path:
    """A libcuda.so to link with, which loads as the driver's: every function that the headers declare, and no code."""
    names = {name for header in HEADERS for name in re.findall(r"\bcu[A-Z]\w+", (headers / header).read_text())}
    folder.mkdir(parents=True)
    source, library = folder / "stub.cpp", folder / "libcuda.so"
    source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in sorted(names)))
    _run([_compiler(), "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)])
    return library


def build(folder: Path, headers: Path, wanted: str) -> Path:
    """The wheel of the PyCUDA that is wanted, built in a folder with the given headers. Takes a minute."""
    click.echo(f"building PyCUDA with CUDA's headers of {headers}", err=True)
    stub = link_stub(headers, folder / "stub")
    pip("download", "--no-deps", "--no-binary", "pycuda", "--dest", str(folder / "source"), wanted)
    (archive,) = (folder / "source").glob("pycuda-*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(folder / "source", filter="data")
    (source,) = (path for path in (folder / "source").glob("pycuda-*") if path.is_dir())
    (source / "siteconf.py").write_text(configuration(headers, stub))
    pip("wheel", "--no-deps", "--wheel-dir", str(folder / "wheel"), str(source))
    (wheel,) = (folder / "wheel").glob("pycuda-*.whl")
    return wheel


def configuration(headers: Path, stub: Path) -> str:
    """PyCUDA's siteconf.py. CURAND is a library of the toolkit, which onnxc does not use."""
    settings = {
        "CUDA_INC_DIR": [str(headers)],
        "CUDADRV_LIB_DIR": [str(stub.parent)],
        "CUDA_ENABLE_CURAND": False,
        "CXXFLAGS": ["-g0"],
    }
    return "".join(f"{name} = {value!r}\n" for name, value in settings.items())


if __name__ == "__main__":
    main()
