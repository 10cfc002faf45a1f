"""Compiled models as builtin functions of CPython: a call costs some 0.2 us beside its work, all checks included.

`runtime/python_call.ll` holds the functions; they read numpy's arrays by its stable ABI, and serve all models.
What they cannot do they leave to functions in Python, which also serve where the interpreter is another one.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, resources
from typing import Any, NamedTuple

import numpy as np

from ...ir.target import Target
from . import runtime
from .jit import CodeImage
from .objects import compile_objects

HELD = 1 << 16
"""Bytes of inputs, outputs, constants and arena up to which a run keeps the interpreter's lock: it takes a few
microseconds then, and letting go costs 0.05 us, and a change of threads where another waits."""

_METH_FASTCALL = 0x80
_ARRAY_TYPE, _ARRAY_EMPTY, _VERSION_FUNCTION = 2, 184, 0
"""Places in numpy's table of functions, as numpy/__multiarray_api.h has them since 1.7."""
_API = (
    *("Py_IncRef", "Py_DecRef", "PyErr_Clear", "PyErr_BadArgument", "PyObject_CallFunctionObjArgs"),
    *("PyDict_New", "PyDict_Size", "PyDict_GetItemWithError", "PyDict_SetItem"),
    *("PyTuple_New", "PyTuple_Size", "PyTuple_GetItem", "PyTuple_SetItem"),
    *("PyLong_FromVoidPtr", "PyLong_AsVoidPtr", "PyEval_SaveThread", "PyEval_RestoreThread"),
)


class Port(NamedTuple):
    """An input or output: its name, numpy's object for its type, its rank."""

    name: str
    dtype: np.dtype[Any]
    rank: int


class _Method(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("documentation", ctypes.c_char_p),
    )


def word_at(address: int, kind: Any = ctypes.c_uint64) -> int:
    return int(kind.from_address(address).value)


def arrays_are_as_known() -> bool:
    """Whether this is a CPython with a lock and 64 bits whose numpy keeps arrays as its ABI says (one is looked at)."""
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return False
    if ctypes.sizeof(ctypes.c_void_p) != 8 or sys.byteorder != "little" or object.__basicsize__ != 16:
        return False
    probe = np.empty((3, 5, 7), np.int16)[1:]
    at = id(probe)
    found = [word_at(at + offset) for offset in (8, 16, 32, 40, 48, 56)]
    integers = [word_at(at + offset, ctypes.c_int32) for offset in (24, 64)]
    if [found[0], found[1], *found[4:], *integers] != [
        id(np.ndarray), probe.ctypes.data, id(probe.base), id(probe.dtype), probe.ndim, probe.flags.num
    ]:  # fmt: skip
        return False
    pointers = zip(found[2:4], (probe.shape, probe.strides), strict=True)
    return all([word_at(place + 8 * i) for i in range(3)] == list(values) for place, values in pointers)


@functools.cache
def _functions() -> dict[str, _Method] | None:
    """The builtin functions, made once for a process; None where they would not work."""
    if not arrays_are_as_known():
        return None
    try:
        api = import_module("numpy._core._multiarray_umath")._ARRAY_API
    except ImportError:  # numpy 1
        return None
    capsule = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    table = capsule(api, None)
    if not table or word_at(table + 8 * _ARRAY_TYPE) != id(np.ndarray):
        return None
    version = ctypes.PYFUNCTYPE(ctypes.c_uint)(word_at(table + 8 * _VERSION_FUNCTION))()
    if version >> 24 != 2:
        return None
    imports = {name: ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0 for name in _API}
    imports["PyArray_Empty"] = word_at(table + 8 * _ARRAY_EMPTY)
    text = (resources.files(runtime) / "python_call.ll").read_text(encoding="utf-8")
    target = Target.host()
    names = ("run", "call", "take", "give")
    objects = compile_objects([("python_call", f'target triple = "{target.triple}"\n{text}')], target)
    image = CodeImage(objects, [f"onnxc_python_{name}" for name in names], target, imports)
    image.keep()  # a function may be called while the interpreter exits
    return {name: _Method(name.encode(), image.address(f"onnxc_python_{name}"), _METH_FASTCALL, None) for name in names}


@dataclass(frozen=True)
class PythonCalls:
    """The builtin functions of one model.

    `run(executable, {name: array})` gives a dict, `call(executable, arrays)` one output or a tuple of them; `take()`
    gives the address of a free workspace's record, or 0, and `give(address)` frees it.
    """

    run: Callable[[Any, Any], Any]
    call: Callable[[Any, tuple[Any, ...]], Any]
    take: Callable[[], int]
    give: Callable[[int], int]
    _model: np.ndarray
    _kept: list[Any]
    _settings: list[np.ndarray]

    @staticmethod
    def of(
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        code: int,
        slow: tuple[Callable[..., Any], Callable[..., Any]],
    ) -> PythonCalls | None:
        """Of the code at an address (table, symbols, threads); `slow` are the Python functions `run` and `call`.

        None where this interpreter has no such functions.
        """
        functions = _functions()
        if functions is None:
            return None
        ports = np.array([[id(p.name), id(p.dtype), p.rank] for p in (*inputs, *outputs)], np.uint64)
        head = [0, 0, ports.ctypes.data, len(inputs), len(outputs), code]
        model = np.array([*head, *map(id, (np.ndarray, dict, *slow))], np.uint64)
        new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)(
            ("PyCFunction_NewEx", ctypes.pythonapi)
        )
        made = {name: new(ctypes.addressof(method), model, None) for name, method in functions.items()}
        kept = [ports, *inputs, *outputs, *slow, functions]
        return PythonCalls(**made, _model=model, _kept=kept, _settings=[])

    def know(self, sizes: Sequence[int], symbols: Sequence[int], arena: int, releases: bool) -> None:
        """From now on calls of inputs with these sizes (those of the outputs follow) need no Python."""
        head = 6
        record = np.array([0, 0, 0, len(symbols), arena, releases, *sizes, *symbols], np.int64)
        start = record.ctypes.data
        record[:3] = int(self._model[0]), start + 8 * head, start + 8 * (head + len(sizes))
        self._settings.append(record)
        self._model[0] = start

    def forget(self) -> None:
        """No sizes are known any more. Records are read under the interpreter's lock only: they may go."""
        self._model[0] = 0
        self._settings.clear()


def workspace_record(
    table: int, symbols: int, faults: int, fault_words: int, threads: int, ports: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the functions know of a workspace, by addresses, and the places for a call's objects, to be kept with it."""
    objects = np.zeros(max(ports, 1), np.uint64)
    return np.array([0, table, symbols, 0, faults, fault_words, objects.ctypes.data, threads], np.uint64), objects


ARENA = 3
"""The word of a workspace's record that holds the bytes of its arena."""
