"""Work in processes of its own: a kernel that fails for good or never ends takes only its process with it."""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import queue
import re
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("spawn")
_LOST = ("DeviceError", "AcceleratorError", "OutOfMemoryError")
"""Errors after which CUDA may answer every call of the process with an error."""
_PATIENCE = 3.0
"""Seconds that a process without a task has to end."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class TaskError(Exception):
    """A task has failed in its process: `kind` is the error's class, `details` where it arose."""

    def __init__(self, kind: str, message: str, details: str = "") -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind, self.message, self.details = kind, message, details


def called(name: str) -> Any:
    """Calls the function "module:function"; None where there is none."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)() if name else None


def _serve(connection: Connection, setup: str) -> None:
    called(setup)
    while True:
        try:
            function, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer: tuple[bool, Any] = True, function(*arguments)
        except BaseException as error:
            message = " ".join(_COLOURS.sub("", str(error)).split())
            lost = (
                type(error).__name__ in _LOST or type(error).__module__.startswith("pycuda") or "CUDA error" in message
            )
            answer = False, (lost, type(error).__name__, message, traceback.format_exc(limit=-6))
        connection.send(answer)


class Process:
    """A process that does one task after another; it is started for the first one, and anew after one that killed it.

    `setup` ("module:function") is called first in it.
    """

    def __init__(self, setup: str = "") -> None:
        self._setup = setup
        self._process: Any = None
        self._connection: Connection | None = None
        self._busy = False
        self.starts = 0

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        """What a function of a module gives for arguments that can be pickled.

        Raises TaskError where it fails, where the process dies or where there is no answer after `timeout` seconds; a
        process that cannot be trusted any more is ended.
        """
        connection = self._started()
        self._busy = True
        try:
            connection.send((function, arguments))
            if not connection.poll(timeout):
                raise TaskError("Timeout", f"no answer within {timeout:.0f} s; the process was ended")
            good, answer = connection.recv()
            self._busy = False
        except TaskError:
            self.close()
            raise
        except (EOFError, OSError) as error:
            code = self._code()
            self.close()
            raise TaskError("ProcessDied", f"the process ended with code {code}") from error
        if good:
            return answer
        lost, kind, message, details = answer
        if lost:
            self.close()
        raise TaskError(kind, message, details)

    def _started(self) -> Connection:
        if self._connection is None:
            connection, other = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(other, self._setup))
            process.start()
            other.close()
            self.starts += 1
            # Another thread may close what is seen of it: only what has been started is.
            self._process, self._connection = process, connection
            return connection
        return self._connection

    def _code(self) -> int | None:
        """With which code the process has ended; None where it has not."""
        process = self._process
        if process is None:
            return None
        process.join(1)
        code: int | None = process.exitcode
        return code

    def close(self) -> None:
        """Ends the process, whatever it does."""
        process, connection, self._process, self._connection = self._process, self._connection, None, None
        if process is None or connection is None:
            return
        if not self._busy:
            connection.close()  # it ends by itself
            process.join(_PATIENCE)
        process.kill()
        process.join()
        connection.close()
        self._busy = False

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pool:
    """Several processes that take tasks from one queue: those of the least priority first, else in order."""

    def __init__(self, count: int, setup: str = "") -> None:
        self._tasks: queue.PriorityQueue[tuple[int, int, _Task | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._closed = False
        self._processes = [Process(setup) for _ in range(count)]
        self._threads = [threading.Thread(target=self._work, args=(process,)) for process in self._processes]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any, timeout: float, priority: int = 0) -> Future[Any]:
        """The future of `Process.call`."""
        task = _Task(Future(), function, arguments, timeout)
        self._tasks.put((priority, next(self._numbers), task))
        return task.future

    def _work(self, process: Process) -> None:
        while (task := self._tasks.get()[2]) is not None:
            if self._closed:
                task.future.cancel()
            if not task.future.set_running_or_notify_cancel():
                continue
            try:
                task.future.set_result(process.call(task.function, *task.arguments, timeout=task.timeout))
            except Exception as error:
                task.future.set_exception(error)

    def close(self) -> None:
        """Ends all processes; tasks that wait are cancelled, those under way fail."""
        self._closed = True
        for _ in self._threads:
            self._tasks.put((_LAST, next(self._numbers), None))
        while any(thread.is_alive() for thread in self._threads):
            for process, thread in zip(self._processes, self._threads, strict=True):
                process.close()
                thread.join(0.1)
        for process in self._processes:
            process.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Task:
    future: Future[Any]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    timeout: float


_LAST = 1 << 30
"""The priority of what ends the threads, when they have cancelled all tasks."""
