"""The installation of PyCUDA, without a network: headers out of packages, the stub to link with, what is missing."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner
from onnxc.ir.errors import TargetError
from onnxc.tools import install_pycuda as tool

needs_compiler = pytest.mark.skipif(shutil.which(tool._compiler()) is None, reason="there is no C++ compiler here")


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    """A folder with headers that declare three functions."""
    folder = tmp_path / "include"
    folder.mkdir()
    (folder / "cuda.h").write_text(
        "#define CUDA_VERSION 12090\n#define cuMemAlloc cuMemAlloc_v2\n"
        "CUresult CUDAAPI cuInit(unsigned int Flags);\nCUresult CUDAAPI cuMemAlloc(CUdeviceptr *p, size_t bytes);\n"
    )
    (folder / "cudaProfiler.h").write_text("CUresult CUDAAPI cuProfilerStart(void);\n")
    return folder


@needs_compiler
def test_the_stub_has_every_function_and_the_drivers_name(headers: Path, tmp_path: Path) -> None:
    library = tool.link_stub(headers, tmp_path / "stub")
    loaded = ctypes.CDLL(str(library))
    for name in ("cuInit", "cuMemAlloc", "cuMemAlloc_v2", "cuProfilerStart"):
        assert getattr(loaded, name)
    assert not hasattr(loaded, "cuLaunchKernel")
    # What is linked with it asks for the driver's library.
    (tmp_path / "user.cpp").write_text('extern "C" int cuInit(unsigned); int use() { return cuInit(0); }\n')
    command = ["-shared", "-fPIC", "-o", str(tmp_path / "user.so"), str(tmp_path / "user.cpp")]
    subprocess.run([tool._compiler(), *command, "-L", str(library.parent), "-lcuda"], check=True)
    assert b"libcuda.so.1\0" in (tmp_path / "user.so").read_bytes()


def test_headers_come_out_of_wheels(tmp_path: Path) -> None:
    wheels = []
    for name, files in {
        "runtime": ["nvidia/cu13/include/cuda.h", "nvidia/cu13/include/crt/part.h", "nvidia/cu13/lib/libcudart.so"],
        "profiler": ["nvidia/cu13/include/cudaProfiler.h", "nvidia/cu13/include/../../../escaped.h"],
    }.items():
        wheels.append(tmp_path / f"{name}.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            for file in files:
                archive.writestr(file, file)
    folder = tool.unpack_headers(wheels, tmp_path / "headers" / "include")
    found = {str(path.relative_to(tmp_path / "headers")) for path in (tmp_path / "headers").rglob("*.*")}
    assert found == {"include/cuda.h", "include/crt/part.h", "include/cudaProfiler.h"}
    assert (folder / "cuda.h").read_text() == "nvidia/cu13/include/cuda.h"
    with pytest.raises(TargetError, match=r"lack the headers cudaProfiler\.h"):
        tool.unpack_headers(wheels[:1], tmp_path / "other")


def test_the_toolkit_that_is_named_is_used(headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(headers.parent))
    assert tool.toolkit_headers() == headers
    assert tool.header_version(headers) == 12
    (headers / "cudaProfiler.h").unlink()
    assert tool.toolkit_headers() is None


def test_the_configuration_of_pycuda(headers: Path, tmp_path: Path) -> None:
    names: dict[str, object] = {}
    exec(tool.configuration(headers, tmp_path / "stub" / "libcuda.so"), names)
    assert names["CUDA_INC_DIR"] == [str(headers)]
    assert names["CUDADRV_LIB_DIR"] == [str(tmp_path / "stub")]


def test_the_extras_name_what_is_installed() -> None:
    assert tool.requirement(13, "nvidia-cuda-nvrtc") == "nvidia-cuda-nvrtc==13.0.*"
    assert tool.requirement(12, "nvidia-cuda-nvrtc") == "nvidia-cuda-nvrtc-cu12==12.9.*"
    assert tool.requirement(12, "pycuda") == tool.requirement(13, "pycuda")
    with pytest.raises(TargetError, match="no extra 'cuda' with nonsense"):
        tool.requirement(13, "nonsense")


def test_wheels_are_kept_by_python_and_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXC_CACHE_DIR", str(tmp_path))
    folders = tool.wheel_folder(12), tool.wheel_folder(13)
    assert folders[0] != folders[1]
    assert all(folder.parent == tmp_path / "wheels" for folder in folders)
    assert f"{sys.version_info.major}{sys.version_info.minor}" in folders[0].name


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(
        TargetError, match=r"no C\+\+ compiler \(no-such-compiler\): install it .*apt-get install g\+\+"
    ):
        tool.require_compiler()


@needs_compiler
def test_missing_headers_of_python_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(TargetError, match=r"Python's headers are not in .*apt-get install python3\.\d+-dev"):
        tool.require_compiler()


def installed(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def test_where_the_index_cannot_be_reached_pip_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(TargetError, match=r"(?s)-m pip download .*failed:.*nvidia-cuda-runtime"):
        tool.packaged_headers(13, tmp_path / "headers")


@pytest.mark.parametrize(("driver", "chosen"), [(None, 13), (11, 12), (12, 12), (14, 13)])
def test_the_driver_decides(driver: int | None, chosen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(tool, "driver_version", lambda: driver)
    monkeypatch.setattr(tool.nvrtc, "is_available", lambda: True)
    monkeypatch.setattr(tool, "install", lambda cuda: asked.append(cuda) or "installed")
    result = CliRunner().invoke(tool.main, [])
    assert (result.exit_code, result.output, asked) == (0, "installed\n", [chosen])
    assert CliRunner().invoke(tool.main, ["--cuda", "12"]).exit_code == 0
    assert asked[-1] == 12


def test_a_failure_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cuda: int) -> str:
        raise TargetError(f"no compiler for CUDA {cuda}")

    monkeypatch.setattr(tool.nvrtc, "is_available", lambda: True)
    monkeypatch.setattr(tool, "install", fail)
    result = CliRunner().invoke(tool.main, ["--cuda", "12"])
    assert (result.exit_code, result.output) == (1, "Error: no compiler for CUDA 12\n")


def test_a_wheel_that_was_kept_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    versions = iter([None, "2026.1"])

    def version(name: str) -> str:
        return next(versions) or installed(name)

    monkeypatch.setenv("ONNXC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tool.metadata, "version", version)
    monkeypatch.setattr(tool, "pip", lambda *arguments: calls.append(arguments))
    assert tool.install(13) == "installed PyCUDA 2026.1"
    ((command, *arguments),) = calls
    assert command == "install" and str(tool.wheel_folder(13)) in arguments
