"""Object files: the same from every process, cached on disk whatever happens to the files, loaded and freed."""

from __future__ import annotations

import ctypes
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from onnxc.backends.cpu import worker
from onnxc.backends.cpu.jit import CodeImage
from onnxc.backends.cpu.objects import assembly, compile_objects
from onnxc.backends.object_cache import PRUNING_PAUSE, ObjectCache
from onnxc.ir.errors import TargetError
from onnxc.ir.target import ARM_CPUS, X86_CPUS, Target

HOST = Target.host()


def module(name: str, value: int, rows: int = 1) -> tuple[str, str]:
    """A function of one integer; `rows` makes its text long."""
    lines = "".join(f"  %r{i + 1} = xor i64 %r{i}, {i + value}\n" for i in range(rows))
    return name, f"define i64 @{name}(i64 %r0) {{\n{lines}  %sum = add i64 %r{rows}, {value}\n  ret i64 %sum\n}}\n"


def call(image: CodeImage, name: str, value: int) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(image.address(name))(value))


@pytest.fixture
def cache(tmp_path: Path) -> ObjectCache:
    return ObjectCache(tmp_path / "objects")


def test_objects_call_each_other_and_two_images_do_not_clash(cache: ObjectCache) -> None:
    caller = "define i64 @caller(i64 %x) {\n  %y = call i64 @f(i64 %x)\n  ret i64 %y\n}\ndeclare i64 @f(i64)\n"
    images = []
    for value in (10, 20):
        built = compile_objects([module("f", value), ("caller", caller)], HOST, cache=cache)
        images.append(CodeImage(built, ["caller", "f"], HOST))
    assert [call(image, "caller", 1) for image in images] == [(1 ^ 10) + 10, (1 ^ 20) + 20]
    images[0].close()
    assert call(images[1], "f", 2) == (2 ^ 20) + 20
    with pytest.raises(KeyError):
        images[1].address("g")


def test_an_undefined_symbol_is_an_error(cache: ObjectCache) -> None:
    text = "define void @f() {\n  call void @nowhere()\n  ret void\n}\ndeclare void @nowhere()\n"
    with pytest.raises(RuntimeError, match="Failed to materialize"):
        CodeImage(compile_objects([("f", text)], HOST, cache=cache), ["f"], HOST)


def test_loading_again_and_again_gives_memory_back(cache: ObjectCache) -> None:
    built = compile_objects([module("f", 1, 20_000)], HOST, cache=cache)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def load_and_drop(times: int) -> None:
        for _ in range(times):
            call(CodeImage(built, ["f"], HOST), "f", 1)

    load_and_drop(20)
    before = resident()
    load_and_drop(200)
    assert resident() - before < 100 * len(built[0])


def test_the_cache_answers_and_survives_damage(cache: ObjectCache, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [module("f", 1), module("g", 2), module("f", 1)]
    first = compile_objects(modules, HOST, cache=cache)
    assert first[0] == first[2] != first[1]
    emitted: list[str] = []
    emit = worker.emit
    monkeypatch.setattr(worker, "emit", lambda text, machine: emitted.append(text) or emit(text, machine))
    assert compile_objects(modules, HOST, cache=cache) == first
    assert not emitted
    damaged, truncated = sorted(cache.folder.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    truncated.write_bytes(b"")
    assert compile_objects(modules, HOST, cache=cache) == first
    assert len(emitted) == 2
    assert compile_objects(modules, Target.parse("aarch64"), cache=cache) != first


def test_the_cache_forgets_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path, limit=5000)
    for number in range(8):
        cache.store(f"{number}", bytes(1000))
        os.utime(tmp_path / f"{number}", (number, number))
    assert cache.load("1") == bytes(1000)  # used just now
    cache.prune()
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"1", "6", "7"}


def test_files_are_not_counted_after_each_compilation(tmp_path: Path) -> None:
    """But now and then; a mark from the future, as after a change of the clock, counts as old."""
    cache = ObjectCache(tmp_path / "objects", limit=1500)
    mark = tmp_path / "objects.pruned"

    def kept() -> int:
        for number in range(2):
            cache.store(f"{number}", bytes(1000))
        cache.keep_within_limit()
        return len(cache.sizes())

    assert kept() == 1
    assert kept() == 2
    for seconds in (-PRUNING_PAUSE - 1, 3600):
        os.utime(mark, (time.time() + seconds,) * 2)
        assert kept() == 1


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert len(compile_objects([module("f", 1)], HOST, cache=ObjectCache(blocked / "objects"))) == 1


def test_the_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXC_CACHE_DIR", str(tmp_path))
    compile_objects([module("f", 1)], HOST)
    assert len(list((tmp_path / "objects").iterdir())) == 1


MANY = [module(f"f{number}", number, 3000) for number in range(12)]


def test_helpers_make_the_same_objects(cache: ObjectCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a) or popen(*a, **k))
    seen: list[tuple[int, int]] = []
    shared = compile_objects(MANY, HOST, jobs=3, cache=cache, progress=lambda *counts: seen.append(counts))
    assert len(started) == 2
    assert seen == [(number + 1, 12) for number in range(12)]
    assert shared == compile_objects(MANY, HOST, jobs=1, cache=ObjectCache(tmp_path / "other"))
    assert len(started) == 2


def test_helpers_begin_while_texts_are_made(cache: ObjectCache) -> None:
    first = threading.Event()

    def texts() -> Iterator[tuple[str, str]]:
        yield from MANY[:-1]
        assert first.wait(60), "nothing was compiled while texts were made"
        yield MANY[-1]

    shared = compile_objects(texts(), HOST, jobs=2, cache=cache, progress=lambda *counts: first.set())
    assert len(shared) == len(set(shared)) == 12


def test_a_text_that_cannot_be_made_leaves_no_helper(cache: ObjectCache) -> None:
    def texts() -> Iterator[tuple[str, str]]:
        yield from MANY
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        compile_objects(texts(), HOST, jobs=2, cache=cache)
    assert len(compile_objects(MANY, HOST, jobs=2, cache=cache)) == 12


def test_a_helper_that_dies_leaves_its_work_to_others(cache: ObjectCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "__file__", os.devnull)
    assert len(compile_objects(MANY, HOST, jobs=3, cache=cache)) == 12


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_rejected_module_is_named(jobs: int, cache: ObjectCache) -> None:
    with pytest.raises(RuntimeError, match=r"module broken: .*parsing"):
        compile_objects([*MANY, ("broken", MANY[0][1] * 2)], HOST, jobs=jobs, cache=cache)


def test_the_worker_answers_until_its_input_ends() -> None:
    requests, answers = io.BytesIO(), io.BytesIO()
    for content in (HOST.triple, HOST.cpu, HOST.features, module("f", 1)[1], "nonsense"):
        worker.write_block(requests, content.encode())
    requests.seek(0)
    worker.serve(requests, answers)
    answers.seek(0)
    assert worker.read_exactly(answers, 1) == b"\0"
    assert worker.read_block(answers).startswith(b"\x7fELF")
    assert worker.read_exactly(answers, 1) == b"\1"
    assert b"error" in worker.read_block(answers)
    assert not answers.read()


def test_the_worker_imports_nothing_of_the_package() -> None:
    code = f"import runpy, sys; runpy.run_path({worker.__file__!r}); print(sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'llvmlite.binding'" in found.stdout
    assert "'onnxc" not in found.stdout


def test_assembly_is_the_targets() -> None:
    _, text = module("f", 5)
    assert "xorq\t$5" in assembly(text, Target.parse("x86-64"))
    assert "ret" in assembly(text, Target.parse("cortex-a76"))


def test_targets() -> None:
    assert Target.parse("cpu") == Target.parse(" host ") == HOST
    facts = [
        (t.vector_bits, t.vector_registers, t.fma)
        for t in map(Target.parse, ("x86-64", "x86-64-v3", "skylake-avx512", "aarch64"))
    ]
    assert facts == [(128, 16, False), (256, 16, True), (512, 32, True), (128, 32, True)]
    extended = Target.parse("cpu:haswell+avxvnni")
    assert extended.has("avxvnni") and "dot4_u8_i8" in extended.dot_products and extended.features == "+avxvnni"
    assert HOST.l1_bytes <= HOST.l2_bytes and HOST.threads >= 1
    with pytest.raises(TargetError, match="unknown target 'pentium'; known are cpu, x86-64"):
        Target.parse("pentium")


@pytest.mark.parametrize("name", [*X86_CPUS, *ARM_CPUS])
def test_llvm_knows_every_named_cpu_as_we_do(name: str) -> None:
    target = Target.parse(name)
    kind = "<16 x float>"
    text = f"""define void @f(ptr %p) "prefer-vector-width"="512" "min-legal-vector-width"="512" {{
  %x = load {kind}, ptr %p
  %y = call {kind} @llvm.fma.v16f32({kind} %x, {kind} %x, {kind} splat (float 1.0))
  %z = fadd {kind} %y, %x
  store {kind} %z, ptr %p
  ret void
}}
"""
    found = assembly(text, target)
    if target.architecture == "aarch64":
        assert "fmla" in found
    else:
        widest = next(bits for bits, register in ((512, "zmm"), (256, "ymm"), (128, "xmm")) if register in found)
        assert widest == target.vector_bits
        assert ("vfmadd" in found) == target.fma
