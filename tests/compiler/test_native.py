"""Native code: C programs that link the object file, or load the shared library, compute what Python does."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxc
import pytest
from onnxc.backends.cpu.elf import ObjectFile, join
from onnxc.compiler import artifact
from onnxc.compiler.compiled import Compiled
from onnxc.compiler.driver import compiled_model
from onnxc.compiler.native import c_header, c_identifier, object_file, write_native
from onnxc.compiler.options import Model, Options
from onnxc.ir.target import Target
from small_models import image, model_of_text, small_cnn

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
STRICT = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1"]

# Reads an image from the standard input, its sizes and the number of threads from the command line; writes the scores.
MAIN = r"""
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cnn.h"
#ifdef LOADED
#include <dlfcn.h>
#endif

int main(int count, char** arguments) {
    int64_t sizes[CNN_SIZES];
    int threads, status;
    size_t read, elements, classes;
    void *arena = 0, *library = 0;
    CNN_INPUT_0_TYPE* image;
    CNN_OUTPUT_0_TYPE* scores;
    const void* inputs[CNN_INPUTS];
    void* outputs[CNN_OUTPUTS];
    int64_t (*arena_bytes)(const int64_t*);
    int (*run)(const void* const*, void* const*, const int64_t*, void*, int);

    if (count < 2 + CNN_SIZES || strcmp(CNN_INPUT_0_NAME, "image") || CNN_INPUT_0_RANK != 4) return 90;
    threads = atoi(arguments[1]);
    for (int i = 0; i < CNN_SIZES; i++) sizes[i] = atol(arguments[2 + i]);
#ifdef LOADED
    library = dlopen(arguments[count - 1], RTLD_NOW | RTLD_LOCAL);
    if (!library) return 91;
    *(void**)&arena_bytes = dlsym(library, "cnn_arena_bytes");
    *(void**)&run = dlsym(library, "cnn_run");
    if (!arena_bytes || !run) return 92;
#else
    arena_bytes = cnn_arena_bytes;
    run = cnn_run;
    if (library) return 93;
#endif
    if (arena_bytes(sizes) < 0) return run(inputs, outputs, sizes, 0, threads);
    if (posix_memalign(&arena, CNN_ALIGNMENT, (size_t)arena_bytes(sizes) + 1)) return 94;
    elements = (size_t)(sizes[0] * 3 * sizes[1] * sizes[2]), classes = (size_t)(sizes[0] * 5);
    image = malloc(elements * sizeof *image + 1), scores = malloc(classes * sizeof *scores + 1);
    read = fread(image, sizeof *image, elements, stdin);
    if (read != elements) return 95;
    inputs[0] = image, outputs[0] = scores;
    if (run(inputs, outputs, sizes, (char*)arena + 1, threads) != 2) return 96;
    for (int i = 0; i < 3; i++)
        if ((status = run(inputs, outputs, sizes, arena, threads))) return status;
    fwrite(scores, sizeof *scores, classes, stdout);
    free(arena), free(image), free(scores);
    return 0;
}
"""


def compiled(model: Model, target: str = "host") -> Compiled:
    return compiled_model(model, Options(target))


@pytest.fixture(scope="module")
def cnn() -> onnxc.Executable:
    executable = onnxc.compile(small_cnn())
    assert isinstance(executable, onnxc.Executable)
    return executable


def build(folder: Path, *arguments: str) -> Path:
    """The C program, compiled with these arguments behind it."""
    (folder / "main.c").write_text(MAIN)
    command = ["cc", *STRICT, f"-I{folder}", str(folder / "main.c"), *arguments, "-o", str(folder / "program")]
    subprocess.run(command, check=True)
    return folder / "program"


def check(
    command: list[str], cnn: onnxc.Executable, *after: str, threads: int, batch: int, height: int, width: int
) -> None:
    """The program's scores beside the model's."""
    pixels = image(batch, 3, height, width)
    numbers = map(str, (threads, batch, height, width))
    done = subprocess.run([*command, *numbers, *after], input=pixels.tobytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    scores = np.frombuffer(done.stdout, np.float32).reshape(batch, 5)
    np.testing.assert_allclose(scores, cnn(pixels), rtol=1e-4, atol=1e-6)


SIZES = [(1, 8, 8), (3, 9, 7), (2, 1, 33), (0, 4, 4)]


@needs_cc
@pytest.mark.parametrize("threaded", [False, True])
def test_a_program_links_the_object_file(cnn: onnxc.Executable, tmp_path: Path, threaded: bool) -> None:
    written = write_native(cnn.compiled, tmp_path / "cnn.o", threaded)
    assert written == (tmp_path / "cnn.o", tmp_path / "cnn.h")
    program = build(tmp_path, str(tmp_path / "cnn.o"), *["-pthread"] * threaded)
    for batch, height, width in SIZES:
        for threads in (1, 2, 0):
            check([str(program)], cnn, threads=threads, batch=batch, height=height, width=width)
    assert subprocess.run([program, "1", "-1", "8", "8"], check=False).returncode == 1


@needs_cc
def test_a_program_loads_the_shared_library(cnn: onnxc.Executable, tmp_path: Path) -> None:
    write_native(cnn.compiled, tmp_path / "cnn.so")
    program = build(tmp_path, "-DLOADED", "-ldl")
    for batch, height, width in SIZES:
        check([str(program)], cnn, str(tmp_path / "cnn.so"), threads=2, batch=batch, height=height, width=width)


@needs_cc
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.skipif(not Target.parse("x86-64-v3").enabled <= Target.host().enabled, reason="needs AVX2")
def test_native_code_touches_its_own_memory_only(cnn: onnxc.Executable, tmp_path: Path) -> None:
    write_native(compiled(small_cnn(), "x86-64-v3"), tmp_path / "cnn.o", threaded=False)  # valgrind knows no AVX-512
    program = build(tmp_path, str(tmp_path / "cnn.o"))
    command = ["valgrind", "-q", "--error-exitcode=97", "--leak-check=full", str(program)]
    for batch, height, width in ((1, 8, 8), (3, 9, 7)):
        check(command, cnn, threads=1, batch=batch, height=height, width=width)


@needs_cc
def test_two_models_in_one_program(cnn: onnxc.Executable, tmp_path: Path) -> None:
    """They have kernels and a thread pool of the same names."""
    write_native(cnn.compiled, tmp_path / "cnn.o")
    write_native(cnn.compiled, tmp_path / "twin.o")
    program = build(tmp_path, str(tmp_path / "cnn.o"), str(tmp_path / "twin.o"), "-pthread")
    check([str(program)], cnn, threads=2, batch=2, height=8, width=8)


@pytest.mark.parametrize("target", ["x86-64", "x86-64-v3", "x86-64-v4", "aarch64", "neoverse-v1"])
def test_one_thread_needs_no_library(target: str) -> None:
    content = b"".join(object_file(compiled(small_cnn(), target), "cnn", threaded=False))
    found = ObjectFile.parse(content)
    assert found.undefined == []
    assert {symbol.name for symbol in found.symbols if symbol.binding} == {"cnn_run", "cnn_arena_bytes"}
    for section in found.sections.values():
        places = section.relocations["info"] >> 32
        assert all(found.symbols[place].section in found.sections for place in places.tolist())
        assert (section.relocations["offset"] < section.size).all()
    (weights,) = (symbol for symbol in found.symbols if symbol.name == "cnn_weights")
    assert found.sections[weights.section].alignment == 64
    again = b"".join(join([found], {"cnn_run", "cnn_arena_bytes"}))
    assert ObjectFile.parse(again).undefined == []


def test_threads_come_from_the_system() -> None:
    found = ObjectFile.parse(b"".join(object_file(compiled(small_cnn(), "x86-64-v3"), "cnn")))
    assert "pthread_create" in found.undefined
    visible = {symbol.name for symbol in found.symbols if symbol.binding and symbol.section}
    assert visible == {"cnn_run", "cnn_arena_bytes", "onnxc_parallel_for"}


def test_a_loaded_artifact_becomes_native(cnn: onnxc.Executable, tmp_path: Path) -> None:
    loaded = onnxc.load(cnn.save(tmp_path / "cnn.onnxc"))
    assert b"".join(object_file(loaded.compiled, "cnn")) == b"".join(object_file(cnn.compiled, "cnn"))


@needs_cc
def test_the_header_is_strict_c_and_cpp(tmp_path: Path) -> None:
    model = model_of_text(
        "g (float16[n, 2] x, bool[n, 2] m, bfloat16[2] b, int64 s) => (float16[n, 2] y, bfloat16[2] z, int64 t)"
        " { y = Relu (x) z = Identity (b) t = Identity (s) p = Not (m) }"
    )
    model.graph.input[0].name = model.graph.node[0].input[0] = '"*/ %d \\ \n名'
    text = c_header(compiled(model), "odd")
    (tmp_path / "odd.h").write_text(text, encoding="utf-8")
    assert "size 0: n" in text and "#define ODD_INPUT_3_RANK 0 /* [] */" in text
    source = tmp_path / "main.c"
    source.write_text(
        '#include "odd.h"\n#include "odd.h"\nint main(void) { return sizeof(ODD_INPUT_0_TYPE) != 2 || ODD_SIZES != 1; }'
    )
    for language in (["-xc", *STRICT], ["-xc++", "-Wall", "-Wextra", "-Werror"]):
        if language[0] == "-xc++" and shutil.which("c++") is None:
            continue
        subprocess.run(["cc", *language, str(source), "-o", str(tmp_path / "odd")], check=True)
        assert subprocess.run([tmp_path / "odd"], check=False).returncode == 0


@needs_cc
def test_sizes_that_contradict_are_refused(tmp_path: Path) -> None:
    code = compiled(model_of_text("g (float[2, n] x, float[m, 3] y) => (float[2, 3] z) { z = MatMul (x, y) }"))
    assert code.assumptions
    write_native(code, tmp_path / "product.o", threaded=False)
    assert "The sizes must keep: n = m." in (tmp_path / "product.h").read_text()
    source = tmp_path / "main.c"
    source.write_text(
        '#include "product.h"\nint main(void) { int64_t good[] = {4, 4}, bad[] = {4, 3};\n'
        "if (product_arena_bytes(good) < 0 || product_arena_bytes(bad) != -1) return 1;\n"
        "return product_run(0, 0, bad, 0, 1) != 1; }"
    )
    program = str(tmp_path / "program")
    subprocess.run(["cc", *STRICT, str(source), str(tmp_path / "product.o"), "-o", program], check=True)
    assert subprocess.run([program], check=False).returncode == 0


def test_names_for_c() -> None:
    names = {"resnet-50": "resnet_50", "3d.net": "model_3d_net", "_x": "model__x", "naïve": "na_ve", "int": "int"}
    assert {name: c_identifier(name) for name in names} == names


def test_what_cannot_be_native_is_refused(
    cnn: onnxc.Executable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = compiled(model_of_text("g (float[n] x) => (int64[1, k] y) { y = NonZero (x) }"))
    with pytest.raises(onnxc.UnsupportedError, match="sizes that depend on data"):
        write_native(counting, tmp_path / "m.o")
    with pytest.raises(onnxc.UnsupportedError, match=r"m\.exe: native code is written as \.o or \.so"):
        artifact.write(cnn, tmp_path / "m.exe")
    with pytest.raises(onnxc.TargetError, match="64-bit little-endian ELF"):
        write_native(replace(cnn.compiled, objects=(b"\xcf\xfa\xed\xfe" + bytes(60),)), tmp_path / "m.o")
    foreign = "aarch64" if Target.host().architecture == "x86_64" else "x86-64"
    with pytest.raises(onnxc.TargetError, match=r"cannot be linked here for .*; write m\.o or \.onnxc"):
        write_native(compiled(small_cnn(), foreign), tmp_path / "m.so")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(onnxc.TargetError, match=r"there is no C compiler \(cc\); write m\.o"):
        write_native(cnn.compiled, tmp_path / "m.so")
