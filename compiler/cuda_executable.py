"""A compiled model on a GPU of this machine: called with arrays of the host or of the GPU, it gives such arrays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from ..backends.cuda.runtime.arrays import View, is_on_gpu, view_of
from ..backends.cuda.runtime.driver import open_device
from ..backends.cuda.runtime.program import DeviceProgram
from ..backends.cuda.runtime.workspace import Setting
from ..ir.errors import TargetError
from ..ir.graph import Value
from ..ir.run_state import with_state
from .compiled import Compiled
from .interface import Interface, computed_shape
from .limits import check_outputs, check_run

SHAPES_KEPT = 64
"""How many settings of the input shapes are remembered, with their launches: some 300 bytes a kernel each."""


class CudaExecutable(Interface):
    """A compiled model on a GPU. Calls from several threads at once are fine; each gets a workspace of its own.

    Where an input is an array in the GPU's memory, of any library that speaks DLPack or the CUDA array interface, the
    outputs are such arrays (`GpuArray`), and the call does not wait for them; else they are numpy's.
    Raises ShapeError where an argument does not fit, TargetError where there is no GPU that the code runs on or what it
    takes is not installed, DeviceError where memory is short or a kernel fails.
    """

    def __init__(self, compiled: Compiled, most: int | None = None) -> None:
        super().__init__(compiled)
        self._most = most
        if compiled.device is None:
            raise TargetError(f"code for {compiled.target.name} does not run on a GPU")
        self._device = open_device()
        self._program = DeviceProgram(
            self._device,
            compiled.device,
            [(value.name, value.dtype) for value in compiled.inputs],
            [(value.name, value.dtype) for value in compiled.outputs],
            compiled.ready,
            compiled.arena,
            with_state(compiled.constants),
            partial(_shape_of, compiled.outputs, most),
            compiled.checks,
        )
        self._known: OrderedDict[tuple[tuple[int, ...], ...], Setting] = OrderedDict()

    def run(self, inputs: Mapping[str, Any], on_device: bool | None = None) -> dict[str, Any]:
        """The outputs by name, for inputs by name; in the GPU's memory where `on_device` says so, by default where an
        input is in it."""
        return self._run(inputs, on_device)

    def _execute(self, arguments: Sequence[Any], on_device: bool | None = None, *settings: Any) -> list[Any]:
        dtypes = self._input_dtypes
        if len(arguments) != len(dtypes):
            raise self._wrong_count(arguments)
        taken: list[np.ndarray | View] = []
        for position, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray) and argument.dtype == dtypes[position]:
                taken.append(argument)
            elif is_on_gpu(argument):
                taken.append(self._viewed(argument, position))
                on_device = True if on_device is None else on_device
            else:
                taken.append(self._converted(argument, position))
        setting = self._setting(tuple(argument.shape for argument in taken))
        return self._program(setting, taken, bool(on_device))

    def _viewed(self, argument: Any, position: int) -> View:
        view = view_of(argument, self._device)
        if view.dtype != self._input_dtypes[position]:
            raise self._wrong_type(position, view.dtype)
        return view

    def _setting(self, shapes: tuple[tuple[int, ...], ...]) -> Setting:
        known = self._known
        setting = known.get(shapes)
        if setting is None:
            setting = known[shapes] = self._new_setting(shapes)
            if len(known) > SHAPES_KEPT:
                known.popitem(last=False)
            return setting
        with suppress(KeyError):  # another thread may have dropped it
            known.move_to_end(shapes)
        return setting

    def _new_setting(self, shapes: tuple[tuple[int, ...], ...]) -> Setting:
        bound, outputs = self._bound(shapes)
        if self._most is not None:
            written = check_outputs(self._compiled.outputs, outputs, self._most)
            check_run(self._compiled.arena.slots[0], written, bound, self._most)
        return Setting(bound, shapes, outputs)


def _shape_of(outputs: Sequence[Value], most: int | None, position: int, bound: Mapping[str, int]) -> tuple[int, ...]:
    shape = computed_shape(outputs[position], bound)
    if most is not None:
        check_outputs([outputs[position]], [shape], most)
    return shape
