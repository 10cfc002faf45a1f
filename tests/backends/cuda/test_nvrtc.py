"""NVRTC: images for architectures, what they take, faults shown with their lines, and the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from onnxc.backends.cuda import nvrtc, report
from onnxc.backends.cuda.launch import Launch
from onnxc.backends.cuda.nvrtc import Resources, compile_kernels, compile_source, parse_resources
from onnxc.backends.object_cache import ObjectCache
from onnxc.ir.cuda_devices import DEVICES
from onnxc.ir.dims import product
from onnxc.ir.errors import OnnxcError, TargetError, UnsupportedError

needs_nvrtc = pytest.mark.skipif(not nvrtc.is_available(), reason="nvidia-cuda-nvrtc is not installed")

PRELUDE = "__device__ __forceinline__ float twice(float x) { return x + x; }\n"
SCALE = """extern "C" __global__ void scale(const float* __restrict__ x, float* __restrict__ y, int size)
{
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i < size) y[i] = twice(x[i]) / 3.0f;
}
"""
REVERSE = """extern "C" __global__ void __launch_bounds__(256) reverse(const float* x, float* y)
{
    __shared__ float tile[256];
    tile[threadIdx.x] = twice(x[threadIdx.x]);
    __syncthreads();
    y[threadIdx.x] = tile[255 - threadIdx.x];
}
"""
KERNELS = {"scale": SCALE, "reverse": REVERSE}
# 64 values that live across the barrier do not fit the 32 registers that 2048 threads of a multiprocessor leave each.
SPILLING = """extern "C" __global__ void __launch_bounds__(1024, 2) spilling(const float* x, float* y)
{
    float v[64];
    #pragma unroll
    for (int i = 0; i < 64; i++) v[i] = x[threadIdx.x + i * 1024];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 64; i++) y[threadIdx.x + i * 1024] = v[i] * v[63 - i];
}
"""


@pytest.fixture
def objects(tmp_path: Path) -> ObjectCache:
    return ObjectCache(tmp_path / "objects")


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_cubins(architecture: str, objects: ObjectCache) -> None:
    done: list[tuple[int, int]] = []
    results = compile_kernels(PRELUDE, KERNELS, architecture, lambda *counts: done.append(counts), objects=objects)
    assert list(results) == list(KERNELS)
    assert done == [(1, 2), (2, 2)]
    for name, result in results.items():
        assert result.image.startswith(b"\x7fELF")
        assert f".text.{name}".encode() in result.image
        (used,) = result.resources.values()
        assert list(result.resources) == [name]
        assert 0 < used.registers < 64
        assert used.spill_store_bytes == used.spill_load_bytes == used.stack_bytes == 0
        assert used.shared_bytes == (1024 if name == "reverse" else 0)
        assert used.barriers == (name == "reverse")


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_ptx(architecture: str, objects: ObjectCache) -> None:
    result = compile_kernels(PRELUDE, {"scale": SCALE}, f"compute_{architecture}", objects=objects)["scale"]
    assert result.image.endswith(b"\0")
    text = result.image.decode()
    assert f".target sm_{architecture}\n" in text and ".visible .entry scale(" in text
    assert "div.rn.f32" in text, "division is not the accurate one"
    assert not result.resources


@needs_nvrtc
def test_spills_are_counted() -> None:
    used = compile_source(SPILLING, "sm_90").resources["spilling"]
    assert used.registers == 32
    assert used.spill_store_bytes >= 16 and used.spill_load_bytes >= 16


def test_what_ptxas_says() -> None:
    log = """ptxas info    : 304 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 360 bytes cmem[0]
ptxas info    : Function properties for called
ptxas         .     0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Compile time = 1.2 ms
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 8 bytes cmem[0], 4 bytes cmem[2]
"""
    assert parse_resources(log) == {
        "first": Resources(40, 16, 12, 16, 1024, 1, 360),
        "second": Resources(registers=8, constant_bytes=12),
    }


@needs_nvrtc
def test_a_fault_is_shown_with_its_lines() -> None:
    faulty = SCALE.replace("twice(x[i])", "thrice(x[i])")
    with pytest.raises(OnnxcError) as caught:
        compile_kernels(PRELUDE, {"reverse": REVERSE, "scale": faulty}, "sm_80")
    message = str(caught.value)
    assert "NVRTC rejects kernel scale for sm_80" in message
    assert 'identifier "thrice" is undefined' in message
    assert ">     6 |     if (i < size) y[i] = thrice(x[i]) / 3.0f;\n      7 | }" in message


@needs_nvrtc
def test_a_fault_of_inline_ptx_is_shown_with_its_lines() -> None:
    source = 'extern "C" __global__ void k() { asm volatile("wgmma.fence.sync.aligned;"); }\n'
    with pytest.raises(OnnxcError, match=r"(?s)not supported on .target 'sm_80'.*> +\d+ \| .*wgmma\.fence"):
        compile_source(source, "sm_80")
    assert compile_source(source, "sm_90a").image


@needs_nvrtc
def test_unknown_architectures() -> None:
    for name in ("sm_12", "avx2", "sm_90x"):
        with pytest.raises(TargetError, match=rf"does not compile for {name}; it knows .*sm_80.*sm_90"):
            compile_source(SCALE, name)


@needs_nvrtc
def test_every_device_is_compiled_for() -> None:
    known = nvrtc.library().architectures()
    for name, device in DEVICES.items():
        if device.capability in known:
            assert compile_source(PRELUDE + SCALE, name).resources["scale"].registers


@needs_nvrtc
def test_only_what_is_new_is_compiled(objects: ObjectCache, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, str]] = []
    compile_one = nvrtc.Nvrtc.compile

    def counting(self: nvrtc.Nvrtc, source: str, architecture: str, name: str) -> nvrtc.CompileResult:
        compiled.append((architecture, name))
        return compile_one(self, source, architecture, name)

    monkeypatch.setattr(nvrtc.Nvrtc, "compile", counting)
    first = compile_kernels(PRELUDE, KERNELS, "sm_80", jobs=2, objects=objects)
    assert sorted(compiled) == [("sm_80", "reverse"), ("sm_80", "scale")]
    assert compile_kernels(PRELUDE, KERNELS, "sm_80", objects=objects) == first
    assert len(compiled) == 2
    changed = KERNELS | {"scale": SCALE.replace("3.0f", "5.0f")}
    second = compile_kernels(PRELUDE, changed, "sm_80", objects=objects)
    assert compiled[2:] == [("sm_80", "scale")]
    assert second["reverse"] == first["reverse"] and second["scale"].image != first["scale"].image
    compile_kernels(PRELUDE, KERNELS, "sm_90", objects=objects)
    compile_kernels(PRELUDE + "// changed\n", KERNELS, "sm_80", objects=objects)
    assert len(compiled) == 7
    for path in objects.folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert compile_kernels(PRELUDE, KERNELS, "sm_80", objects=objects)["scale"].image == first["scale"].image
    assert len(compiled) == 9


@needs_nvrtc
def test_nothing_to_compile(objects: ObjectCache) -> None:
    assert compile_kernels(PRELUDE, {}, "sm_80", objects=objects) == {}


def test_where_nvrtc_is_missing_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["libnvrtc-not-here.so.13", "/nowhere/libnvrtc.so.13"]))
    nvrtc.library.cache_clear()
    try:
        assert not nvrtc.is_available()
        with pytest.raises(TargetError, match=r"(?s)pip install nvidia-cuda-nvrtc.*CUDA_HOME.*/nowhere/libnvrtc"):
            nvrtc.library()
    finally:
        nvrtc.library.cache_clear()


def test_a_toolkit_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "PACKAGES", ())
    assert str(tmp_path / "lib64" / "libnvrtc.so.13") in nvrtc._candidates()


def test_importing_loads_no_library() -> None:
    code = "import onnxc.backends.cuda.nvrtc, onnxc.backends.cuda.report\nprint(open('/proc/self/maps').read())"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "libpython" in loaded or "python" in loaded
    assert "nvrtc" not in loaded


@needs_nvrtc
def test_the_report(objects: ObjectCache) -> None:
    device = DEVICES["sm_90"]
    results = compile_kernels(PRELUDE, KERNELS, device.name, objects=objects)
    used = {name: result.resources[name] for name, result in results.items()}
    launches = {"reverse": Launch(product([4]), 256, 60_000, 32), "scale": Launch(product([4]), 256, 0, 32)}
    reverse, scale = found = report.rows(used, launches, device)
    assert (reverse.shared_bytes, reverse.occupancy.blocks, reverse.occupancy.limit) == (61_024, 3, "shared memory")
    assert (scale.shared_bytes, scale.occupancy.share, scale.occupancy.limit) == (0, 1.0, "threads")
    heading, *lines = report.table(found, device).splitlines()
    assert heading.split()[:4] == ["//", "sm_90", "threads", "registers"]
    registers = str(used["reverse"].registers)
    assert lines[0].split() == ["reverse", "256", registers, "61024", "0", "0", "3", "38%", "shared", "memory"]
    assert lines[1].startswith("scale  ") and lines[1].endswith("100%  threads")


@needs_nvrtc
@pytest.mark.skipif(not report.has_disassembler(), reason="neither nvdisasm nor cuobjdump is here")
def test_machine_code_as_text() -> None:
    text = report.sass(compile_source(REVERSE.replace("twice", ""), "sm_90").image)
    assert ".text.reverse:" in text and "BAR.SYNC" in text and "STS" in text
    with pytest.raises(OnnxcError, match="failed"):
        report.sass(b"no cubin")


def test_machine_code_without_a_disassembler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(report, "toolkit_folders", lambda: iter([tmp_path]))
    monkeypatch.setattr(report, "packaged_files", lambda packages, name: iter(()))
    assert not report.has_disassembler()
    with pytest.raises(UnsupportedError, match="pip install nvidia-cuda-nvdisasm"):
        report.sass(b"")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "cuobjdump"
    program.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1], open(sys.argv[2]).read())\n")
    program.chmod(0o755)
    assert report.sass(b"cubin") == "--dump-sass cubin\n"
