"""LLVM IR text to object code: in parallel, and only once for each text and target."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
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
    modules: Iterable[tuple[str, str]],
    target: Target,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: ObjectCache | None = None,
) -> list[bytes]:
    """The object file of each (name, LLVM IR text), from the cache where it is known.

    Large work is shared by up to `jobs` processes, by default as many as there are CPUs; they begin while the texts are
    still being made. `progress` is told how many modules are done, of how many that are known by then. Raises
    RuntimeError, naming the module, where LLVM rejects one.
    """
    with Compilation(target, jobs, progress, cache) as work:
        for name, text in modules:
            work.add(name, text)
        return [content for _, content in work.finish()]


class Compilation:
    """Modules that are compiled while more are being made; arguments as of `compile_objects`."""

    def __init__(
        self,
        target: Target,
        jobs: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        cache: ObjectCache | None = None,
    ) -> None:
        self._cache = cache or ObjectCache.default()
        self._machine = target_machine(target)
        # Besides the text, an object depends on LLVM, on what the worker asks of it, and on the target.
        recipe = (llvmlite.__version__, Path(worker.__file__).read_text(), target.triple, target.cpu, target.features)
        self._recipe, self._progress = recipe, progress
        self._keys: list[tuple[str, str]] = []
        self._found: dict[str, bytes] = {}
        self._known: set[str] = set()
        self._work = _Work(target, self._finished, jobs or usable_processors())

    def __enter__(self) -> Compilation:
        self._work.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._work.__exit__(*error)

    def _finished(self, key: str, content: bytes) -> None:
        self._found[key] = content
        self._cache.store(key, content)
        if self._progress is not None:
            self._progress(len(self._found), len(self._known))

    def add(self, name: str, text: str) -> None:
        """One more module."""
        key = key_of(*self._recipe, text)
        if key not in self._known:
            self._known.add(key)
            content = self._cache.load(key)
            if content is not None:
                self._found[key] = content
            else:
                self._work.add(key, name, text)
        self._keys.append((name, key))

    def finish(self) -> list[tuple[str, bytes]]:
        """The name and object file of each, in order. RuntimeError, naming the module, where LLVM rejects one."""
        if self._work.finish(self._machine):
            self._cache.keep_within_limit()
        return [(name, self._found[key]) for name, key in self._keys]


class _Work:
    """Modules that wait to be compiled, by helpers and at last by this process, the largest first."""

    def __init__(self, target: Target, done: Callable[[str, bytes], None], processes: int):
        self._waiting: dict[str, tuple[str, str]] = {}
        self._added = self._text_bytes = 0
        self._complete = False
        self._target = target
        self._done = done
        # A program with Python inside is not to be started again.
        can_start = Path(sys.executable or "").name.lower().startswith(("python", "pypy"))
        self._most_helpers = processes - 1 if can_start else 0
        self._changed = threading.Condition()
        self._errors: list[RuntimeError] = []
        self._helpers: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        for process in self._processes:
            process.kill()

    def add(self, key: str, name: str, text: str) -> None:
        """One more module; starts one more helper where there is work for it."""
        with self._changed:
            self._waiting[key] = (name, text)
            self._added, self._text_bytes = self._added + 1, self._text_bytes + len(text)
            self._changed.notify()
        wanted = min(self._most_helpers, self._added // 4, self._text_bytes // _WORKER_BYTES)
        if len(self._helpers) < wanted:
            thread = threading.Thread(target=self._help, daemon=True)
            self._helpers.append(thread)
            thread.start()

    def finish(self, machine: binding.TargetMachine) -> int:
        """Compiles what waits, when all modules are known; their number. RuntimeError where LLVM rejected one."""
        with self._changed:
            self._complete = True
            self._changed.notify_all()
        self._drain(lambda text: worker.emit(text, machine))
        for thread in self._helpers:
            thread.join()
        self._drain(lambda text: worker.emit(text, machine))  # what a helper that died has left
        if self._errors:
            raise self._errors[0]
        return self._added

    def _end(self) -> None:
        with self._changed:
            self._complete = True
            self._waiting.clear()
            self._changed.notify_all()

    def _next(self) -> tuple[str, tuple[str, str]] | None:
        with self._changed:
            while not self._waiting and not self._complete:
                self._changed.wait()
            if not self._waiting:
                return None
            key = max(self._waiting, key=lambda key: len(self._waiting[key][1]))
            return key, self._waiting.pop(key)

    def _drain(self, compile_text: Callable[[str], bytes]) -> None:
        """Compiles until nothing waits and nothing more comes. A module whose compiler is gone waits again."""
        while (item := self._next()) is not None:
            key, (name, text) = item
            try:
                content = compile_text(text)
            except RuntimeError as error:
                self._errors.append(RuntimeError(f"LLVM rejects module {name}: {error}"))
                self._end()
                return
            except (EOFError, OSError):
                with self._changed:
                    self._waiting[key] = (name, text)
                raise
            with self._changed:
                self._done(key, content)

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
