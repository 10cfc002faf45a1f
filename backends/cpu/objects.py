"""LLVM IR text to object code: in parallel, and only once for each text and target."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import llvmlite
from llvmlite import binding

from ...ir.errors import TargetError
from ...ir.target import Target
from ..object_cache import ObjectCache, key_of, usable_processors
from . import worker

_WORKER_BYTES = 150_000
"""IR text that keeps one process busy for longer than another takes to start (about 0.2 s)."""


def target_machine(target: Target) -> binding.TargetMachine:
    """LLVM's code generator for a target. Raises TargetError where this LLVM has none."""
    try:
        return worker.create_machine(target.triple, target.cpu, target.features)
    except RuntimeError as error:
        raise TargetError(f"LLVM cannot compile for {target.name}: {error}") from error


def assembly(ir_text: str, target: Target) -> str:
    """The assembly that a module becomes."""
    machine = target_machine(target)
    text: str = machine.emit_assembly(worker.optimize(ir_text, machine))
    return text


def compile_objects(
    modules: Sequence[tuple[str, str]],
    target: Target,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: ObjectCache | None = None,
) -> list[bytes]:
    """The object file of each (name, LLVM IR text), from the cache where it is known.

    Large work is shared by up to `jobs` processes, by default as many as there are CPUs. `progress` is told how many
    of how many modules are done. Raises RuntimeError, naming the module, where LLVM rejects one.
    """
    cache = cache or ObjectCache.default()
    machine = target_machine(target)
    # Besides the text, an object depends on LLVM, on what the worker asks of it, and on the target.
    recipe = (llvmlite.__version__, Path(worker.__file__).read_text(), target.triple, target.cpu, target.features)
    keys = [key_of(*recipe, text) for _, text in modules]
    found: dict[str, bytes] = {}
    missing: dict[str, tuple[str, str]] = {}
    for key, module in zip(keys, modules, strict=True):
        content = None if key in found or key in missing else cache.load(key)
        if content is not None:
            found[key] = content
        elif key not in found:
            missing[key] = module

    def finish(key: str, content: bytes) -> None:
        found[key] = content
        cache.store(key, content)
        if progress is not None:
            progress(len(found), len(set(keys)))

    if missing:
        _Work(missing, target, finish).run(machine, jobs or usable_processors())
        cache.prune()
    return [found[key] for key in keys]


class _Work:
    """Modules that wait to be compiled, by this process and by helpers, the largest first."""

    def __init__(self, modules: Mapping[str, tuple[str, str]], target: Target, finish: Callable[[str, bytes], None]):
        self._waiting = deque(sorted(modules.items(), key=lambda item: -len(item[1][1])))
        self._text_bytes = sum(len(text) for _, text in modules.values())
        self._target = target
        self._finish = finish
        self._lock = threading.Lock()
        self._errors: list[RuntimeError] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self, machine: binding.TargetMachine, processes: int) -> None:
        helpers = min(processes - 1, len(self._waiting) // 4, self._text_bytes // _WORKER_BYTES)
        if not Path(sys.executable or "").name.lower().startswith(("python", "pypy")):
            helpers = 0  # a program with Python inside is not to be started again
        threads = [threading.Thread(target=self._help, daemon=True) for _ in range(helpers)]
        try:
            for thread in threads:
                thread.start()
            self._drain(lambda text: worker.emit(text, machine))
            for thread in threads:
                thread.join()
            self._drain(lambda text: worker.emit(text, machine))  # what a helper that died has left
        finally:
            self._waiting.clear()
            for process in self._processes:
                process.kill()
        if self._errors:
            raise self._errors[0]

    def _drain(self, compile_text: Callable[[str], bytes]) -> None:
        """Compiles until nothing waits. A module whose compiler is gone waits again."""
        while True:
            try:
                key, (name, text) = self._waiting.popleft()
            except IndexError:
                return
            try:
                content = compile_text(text)
            except RuntimeError as error:
                self._errors.append(RuntimeError(f"LLVM rejects module {name}: {error}"))
                self._waiting.clear()
                return
            except (EOFError, OSError):
                self._waiting.append((key, (name, text)))
                raise
            with self._lock:
                self._finish(key, content)

    def _help(self) -> None:
        """Has a process of its own compile; leaves the rest to the others where it dies."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", worker.__file__]
        with contextlib.suppress(EOFError, OSError):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self._processes.append(process)
            requests, answers = process.stdin, process.stdout
            assert requests is not None and answers is not None

            def ask(text: str) -> bytes:
                worker.write_block(requests, text.encode())
                status, content = worker.read_exactly(answers, 1), worker.read_block(answers)
                if status != b"\0":
                    raise RuntimeError(content.decode())
                return content

            with process:
                for fact in (self._target.triple, self._target.cpu, self._target.features):
                    worker.write_block(requests, fact.encode())
                self._drain(ask)
