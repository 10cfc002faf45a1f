"""Calibration data: files, folders of files or a function, as inputs of a model, one portion at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...compiler.binding import Port
from ...ir.dtypes import BY_NAME
from ...ir.errors import OnnxcError
from ..arrays import IMAGES, read_array
from .settings import QuantizationError

Array = NDArray[Any]
Feed: TypeAlias = dict[str, Array]
Data: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any] | Callable[[], Iterable[Any]]"
SUFFIXES = (".npz", ".npy", ".pb", *IMAGES)


@dataclass
class Samples:
    """The calibration data of a model with these inputs.

    `data` is a file (.npz with arrays by the inputs' names; .npy, .pb or a picture for the only input), a folder of
    such files, "module:function", such a function, or what it returns: dicts by the inputs' names, or arrays for the
    only input. `limit` samples are used, drawn by `seed` where their number is known, else the first. `batch` samples
    are in a portion where the model takes several; it may be changed while the portions are taken.
    """

    data: Data
    ports: Sequence[Port]
    limit: int | None = None
    seed: int = 0
    batch: int = 1
    taken: int = field(default=0, init=False)
    total: int | None = field(default=None, init=False)
    """Samples in all, once they are known."""

    def __iter__(self) -> Iterator[Feed]:
        """The portions. QuantizationError where something does not suit the model's inputs."""
        random, self.taken = np.random.default_rng(self.seed), 0
        files = _files(self.data)
        if files is not None and self.limit is not None and len(files) > self.limit:
            files = [files[place] for place in sorted(random.choice(len(files), self.limit, replace=False))]
        whole = files is not None and len(files) > 1
        for name, record in self._records(files):
            left = None if self.limit is None else self.limit - self.taken
            if left == 0:
                return
            portions = Record(name, record, self.ports)
            count = portions.count
            chosen = np.arange(count)
            if left is not None and count > left:
                chosen = np.sort(random.choice(count, left, replace=False))
            if not whole and isinstance(self.data, str | os.PathLike | Mapping) and files != []:
                self.total = len(chosen)
            elif whole:
                self.total = len(files or ())
            for feed, size in portions.feeds(chosen, self):
                self.taken += size if not whole else 0
                yield feed
            self.taken += 1 if whole else 0

    @property
    def again(self) -> bool:
        """Whether the portions can be had a second time."""
        data = self.data
        return isinstance(data, str | os.PathLike | Mapping) or callable(data) or iter(data) is not data

    def _records(self, files: Sequence[Path] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if files is not None:
            for path in files:
                yield str(path), self._read(path)
            return
        data = self.data
        if isinstance(data, str | os.PathLike):
            data = _function(str(data))
        if callable(data):
            name, data = getattr(data, "__qualname__", "the function"), data()
        else:
            name = "the data"
        if isinstance(data, Mapping):
            yield name, data
            return
        for place, item in enumerate(data):
            if not isinstance(item, Mapping):
                item = {self._only(f"{name}, item {place}"): item}
            yield f"{name}, item {place}", item

    def _only(self, what: str) -> str:
        if len(self.ports) != 1:
            raise QuantizationError(f"{what}: which input is it for? Name it: {', '.join(map(str, self.ports))}")
        return self.ports[0].name

    def _read(self, path: Path) -> Mapping[str, Any]:
        try:
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as archive:
                    if len(self.ports) == 1 and len(archive.files) == 1:
                        return {self.ports[0].name: archive[archive.files[0]]}
                    return {name: archive[name] for name in archive.files}
            name = self._only(str(path))
            return {name: read_array(str(path), self.ports[0])}
        except OnnxcError:
            raise
        except Exception as error:  # each reader raises its own kinds
            raise QuantizationError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


class Record:
    """One file or item of the data: one sample or several.

    An array may have an axis more than its input, of samples; or, of the input's rank, a first axis that is the batch
    that the model leaves open, or a multiple of the size that it wants. Arrays that are as the input is declared go
    with every sample.
    """

    def __init__(self, name: str, arrays: Mapping[str, Any], ports: Sequence[Port]) -> None:
        self.name = name
        missing = [port for port in ports if port.name not in arrays]
        if missing:
            raise QuantizationError(
                f"{name} has no array for the input {', '.join(map(str, missing))}; it has "
                f"{', '.join(arrays) or 'none'}: give every input an array of its name"
            )
        self.arrays = {port.name: _converted(arrays[port.name], port, name) for port in ports}
        self.steps = {port.name: self._step(port) for port in ports}
        open_axes = [port for port in ports if self.steps[port.name] == -1]
        counts = {n: len(self.arrays[n]) // max(step, 1) for n, step in self.steps.items() if step is not None}
        certain = {counts[n] for n in counts if self.steps[n] != -1}
        # An open first axis is one of samples only if no other input has the same symbol elsewhere.
        symbols = {port.shape[0] for port in open_axes} - {"?"}
        elsewhere = symbols.intersection(size for port in ports for size in port.shape[1:])
        if len(certain) > 1 or (not certain and len({counts[port.name] for port in open_axes}) > 1):
            raise QuantizationError(
                f"{name} does not have as many samples for each input: "
                f"{', '.join(f'{n} {count}' for n, count in counts.items())}"
            )
        self.joint = not certain and bool(open_axes) and not elsewhere
        if certain:
            (self.count,) = certain
            for port in open_axes:
                self.steps[port.name] = 1 if counts[port.name] == self.count else None
        else:
            self.count = counts[open_axes[0].name] if self.joint else 1
        if not self.count:
            raise QuantizationError(f"{name} has no sample: its first axis is empty")

    def _step(self, port: Port) -> int | None:
        """Elements of the first axis that a sample takes: 0 where that axis is none of the input's, -1 where its size
        is open, None where the array is one sample."""
        shape, wanted = self.arrays[port.name].shape, port.shape
        if len(shape) == len(wanted) + 1 and _fits(shape[1:], wanted):
            return 0
        if len(shape) == len(wanted) and _fits(shape[1:], wanted[1:]):
            if not shape:
                return None
            if isinstance(wanted[0], str):
                return -1
            if shape[0] == wanted[0]:
                return None
            if wanted[0] > 0 and shape[0] % wanted[0] == 0:
                return wanted[0]
        raise QuantizationError(
            f"{self.name}: the array for the input {port} has the shape {list(shape)}; it must be that of the input, "
            "or have a further first axis of samples"
        )

    def feeds(self, chosen: Array, samples: Samples) -> Iterator[tuple[Feed, int]]:
        """The model's inputs for these samples, and of how many each is."""
        place = 0
        while place < len(chosen):
            size = min(samples.batch, len(chosen) - place) if self.joint else 1
            yield self._feed(chosen[place : place + size]), size
            place += size

    def _feed(self, chosen: Array) -> Feed:
        found = {}
        for name, array in self.arrays.items():
            step = self.steps[name]
            if step == -1:
                found[name] = array[chosen] if self.joint else array
            elif step is None:
                found[name] = array
            else:
                found[name] = array[chosen[0]] if step == 0 else array[chosen[0] * step : (chosen[0] + 1) * step]
        return found


def _fits(shape: Sequence[int], wanted: Sequence[int | str]) -> bool:
    return len(shape) == len(wanted) and all(
        isinstance(want, str) or size == want for size, want in zip(shape, wanted, strict=True)
    )


def _converted(value: Any, port: Port, name: str) -> Array:
    """An array in the input's type; of another kind only integers are taken for floats."""
    array, dtype = np.asarray(value), BY_NAME.get(port.dtype)
    if dtype is None or dtype.kind == "string" or array.dtype == dtype.numpy:
        return array
    both_integers = np.issubdtype(array.dtype, np.integer) and dtype.is_integer
    if array.dtype.kind == "c" or not (
        both_integers or dtype.is_float or (dtype.kind == "bool" and array.dtype.kind in "iu")
    ):
        raise QuantizationError(f"{name}: the array for the input {port} is of {array.dtype}; convert it")
    return array.astype(dtype.numpy)


def _files(data: Data) -> list[Path] | None:
    """The files that the data is in, in the order of their names; None where it is in none."""
    if not isinstance(data, str | os.PathLike):
        return None
    path = Path(data)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise QuantizationError(f"{path}: the folder holds no file that is read, one of {', '.join(SUFFIXES)}")
        return files
    if path.exists():
        if path.suffix.lower() not in SUFFIXES:
            raise QuantizationError(f"{path}: data is read from {', '.join(SUFFIXES)}, a folder or module:function")
        return [path]
    if ":" not in str(data):
        raise QuantizationError(f"{path}: there is no such file or folder, nor is it module:function")
    return None


def _function(text: str) -> Callable[[], Iterable[Any]]:
    """module:function; modules are looked for in the current folder too."""
    module, _, name = text.rpartition(":")
    added = os.getcwd() not in sys.path
    if added:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise QuantizationError(f"{text}: {error}; --data takes a file, a folder or module:function") from error
    finally:
        if added:
            sys.path.remove(os.getcwd())
    if not callable(found):
        raise QuantizationError(f"{text} is no function")
    result: Callable[[], Iterable[Any]] = found
    return result


__all__ = ["Data", "Feed", "Samples"]
