"""Arrays from the command line: read from files, written as numbers, or made up; and back to files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compiler.binding import Port
from ..compiler.limits import format_bytes, memory_of_machine
from ..ir.dims import Dim, evaluate, parse_dim, symbol, symbols
from ..ir.dtypes import BY_NAME
from ..ir.errors import LimitError, OnnxcError, ShapeError

Array = NDArray[Any]
FILLS = ("random", "zeros", "ones")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
USUAL_IMAGE, USUAL_SIZE = 224, 16
"""Sizes of symbols that nobody gave: of the last two axes of four, and of all others but the first axis, which is 1."""
_READERS: Mapping[str, Callable[[str], float | str]] = {
    "int": int,
    "uint": int,
    "float": float,
    "string": str,
    "bool": {"0": False, "1": True, "false": False, "true": True}.__getitem__,
}


class InputError(OnnxcError):
    """What was given for an input cannot be used."""


def dims_of(port: Port) -> tuple[Dim, ...]:
    """The port's shape as dims; what is no expression is a symbol, one that has no name a symbol of its own."""
    found: list[Dim] = []
    for axis, size in enumerate(port.shape):
        try:
            found.append(size if isinstance(size, int) else parse_dim(size))
        except ValueError:
            found.append(symbol(f"{port.name}.{axis}" if size == "?" else str(size)))
    return tuple(found)


def sizes_for(ports: Sequence[Port], given: Mapping[str, Array]) -> dict[str, int]:
    """A size for every symbol in the ports' shapes: as the given arrays have it, else a usual one."""
    sizes: dict[str, int] = {}
    unknown: dict[str, int] = {}
    for port in ports:
        shape, array = dims_of(port), given.get(port.name)
        for axis, dim in enumerate(shape):
            for part in symbols(dim):
                if array is not None and array.ndim == len(shape) and dim == symbol(part.name):
                    sizes.setdefault(part.name, array.shape[axis])
                usual = 1 if axis == 0 else USUAL_IMAGE if len(shape) == 4 and axis >= 2 else USUAL_SIZE
                unknown.setdefault(part.name, usual)
    return unknown | sizes


def made_up(port: Port, sizes: Mapping[str, int], fill: str, random: np.random.Generator) -> Array:
    """An array for a port: normal for floats, 0..255 for bytes of an image, 0..9 for other integers.

    Raises InputError for element types that cannot be made up, LimitError for what does not fit in memory.
    """
    shape = tuple(evaluate(dim, dict(sizes)) for dim in dims_of(port))
    dtype = BY_NAME.get(port.dtype)
    if dtype is None or dtype.kind == "string" or any(size < 0 for size in shape):
        raise InputError(f"input {port} cannot be made up: give it with --input {port.name}=FILE")
    if 8 * math.prod(shape) > memory_of_machine():  # random numbers are doubles at first
        raise LimitError(
            f"input {port} takes {format_bytes(dtype.bytes * math.prod(shape))}; --dim may make it smaller"
        )
    if fill != "random":
        return np.full(shape, float(fill == "ones")).astype(dtype.numpy)
    if dtype.is_integer:
        top = 255 if dtype.name == "u8" and len(shape) > 2 else 9
        return random.integers(0, int(min(top, dtype.limits[1])), shape, endpoint=True).astype(dtype.numpy)
    return (random.random(shape) < 0.5) if dtype.kind == "bool" else random.normal(size=shape).astype(dtype.numpy)


def read_arrays(texts: Sequence[str], ports: Sequence[Port]) -> tuple[dict[str, Array], dict[str, str]]:
    """What `--input` options say: (arrays by input, "random" and the like by input).

    Each is NAME=WHAT, where WHAT is a file, numbers or one of FILLS; or a file alone: an .npz with arrays of the
    inputs' names, or any other for the only input. Raises InputError for an unknown name, or where
    nothing can be made of the text.
    """
    names = {port.name: port for port in ports}
    arrays: dict[str, Array] = {}
    fills: dict[str, str] = {}
    for text in texts:
        name, sign, what = text.partition("=")
        if not sign or (name not in names and Path(text).exists()):
            path = Path(text)
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as archive:
                    _check_names(archive.files, names)
                    arrays |= {key: archive[key] for key in archive.files}
                continue
            if len(ports) != 1:
                raise InputError(f"--input {text}: which of {', '.join(names)}? Say --input NAME={text}")
            name, what = ports[0].name, text
        _check_names([name], names)
        if what in FILLS:
            fills[name] = what
        else:
            array, dtype = read_array(what, names[name]), BY_NAME.get(names[name].dtype)
            # numpy's files do not know bf16 and the like: such an input comes in a type that they know.
            narrow = dtype is not None and dtype.numpy.isbuiltin != 1 and dtype.kind != "string"
            arrays[name] = array.astype(dtype.numpy) if dtype is not None and narrow else array
    return arrays, fills


def _check_names(given: Sequence[str], names: Mapping[str, Port]) -> None:
    unknown = [name for name in given if name not in names]
    if unknown:
        raise InputError(f"the model has no input {', '.join(unknown)}; it takes {', '.join(map(str, names.values()))}")


def read_array(text: str, port: Port) -> Any:
    """An array from a file (.npy, .npz with one array or as FILE:KEY, .pb, a picture) or from numbers; for a sequence a
    list of them, from .pb."""
    path = Path(text)
    archive, _, key = text.rpartition(":")
    try:
        if path.suffix == ".npy" and path.exists():
            return np.asarray(np.load(path, allow_pickle=False))
        if path.suffix == ".npz" and path.exists():
            return _from_archive(path, None, port)
        if archive.endswith(".npz") and Path(archive).exists():
            return _from_archive(Path(archive), key, port)
        if path.suffix == ".pb" and path.exists():
            from onnx import SequenceProto, TensorProto, numpy_helper

            if port.dtype.startswith("seq("):
                return numpy_helper.to_list(SequenceProto.FromString(path.read_bytes()))
            return np.asarray(numpy_helper.to_array(TensorProto.FromString(path.read_bytes())))
        if path.suffix.lower() in IMAGES and path.exists():
            return _picture(path, port)
    except InputError:
        raise
    except Exception as error:  # each reader raises its own kinds
        raise InputError(f"input {port.name!r}: {text} cannot be read: {' '.join(str(error).split())}") from error
    return _numbers(text, port)


def _from_archive(path: Path, key: str | None, port: Port) -> Array:
    with np.load(path, allow_pickle=False) as archive:
        names = archive.files
        wanted = key or (port.name if port.name in names else names[0] if len(names) == 1 else None)
        if wanted not in names:
            raise InputError(f"input {port.name!r}: {path} holds {', '.join(names)}; say which: {path}:NAME")
        return np.asarray(archive[wanted])


def _numbers(text: str, port: Port) -> Array:
    """ "1,2,3" as an array of the port's type, shaped as the port where the sizes allow it."""
    dtype = BY_NAME.get(port.dtype)
    read, path = _READERS.get(dtype.kind if dtype is not None else ""), Path(text)
    if dtype is None or read is None:
        raise InputError(f"input {port} cannot be given as numbers, only as a file (.pb)")
    try:
        values = [read(part if read is str else part.strip().lower()) for part in text.split(",")]
    except (ValueError, KeyError):
        is_file = path.suffix.lower() in (".npy", ".npz", ".pb", *IMAGES)
        what = "no such file" if is_file else f"neither numbers of {dtype}, nor a file, nor one of {', '.join(FILLS)}"
        raise InputError(f"input {port}: {text!r} is {what}") from None
    if dtype.is_integer and not all(dtype.limits[0] <= int(value) <= dtype.limits[1] for value in values):
        raise InputError(f"input {port}: not all of {text} are from {dtype.limits[0]} to {dtype.limits[1]}")
    sizes = [size if isinstance(size, int) else -1 for size in port.shape]
    if sizes.count(-1) > 1:
        sizes = [1] * (len(sizes) - 1) + [-1]
    try:
        return np.array(values).astype(dtype.numpy).reshape(sizes)
    except ValueError:
        raise ShapeError(f"input {port}: {len(values)} numbers do not fill this shape") from None


def _picture(path: Path, port: Port) -> Array:
    """A picture as the port wants it: [1, C, H, W] or [1, H, W, C]; bytes as they are, floats scaled to 0..1."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError(f"{path}: reading pictures needs the package pillow; or convert it to .npy") from None
    if len(port.shape) == 1 and port.dtype == "u8":  # for ImageDecoder: the file as it is
        return np.fromfile(path, np.uint8)
    if len(port.shape) not in (3, 4):
        raise InputError(f"input {port} does not look like a picture")
    *_, a, b, c = port.shape
    last = c in (1, 3) and a not in (1, 3)
    channels, height, width = (c, a, b) if last else (a, b, c)
    picture = Image.open(path).convert("L" if channels == 1 else "RGB")
    wanted = (
        width if isinstance(width, int) else picture.width,
        height if isinstance(height, int) else picture.height,
    )
    if wanted != picture.size:
        picture = picture.resize(wanted)
    pixels = np.asarray(picture).reshape(picture.height, picture.width, -1)
    array = pixels if last else pixels.transpose(2, 0, 1)
    dtype = BY_NAME[port.dtype]
    scaled = array / 255 if dtype.is_float else array
    return np.ascontiguousarray(scaled[None] if len(port.shape) == 4 else scaled).astype(dtype.numpy)


def write_array(path: Path, array: Array) -> None:
    """Writes .npy, or .pb as a TensorProto. Types that numpy does not know itself are written as f32."""
    if path.suffix == ".pb":
        from onnx import numpy_helper

        path.write_bytes(numpy_helper.from_array(array).SerializeToString())
        return
    if path.suffix != ".npy":
        raise InputError(f"{path}: arrays are written as .npy or .pb")
    if array.dtype.kind == "O":
        array = array.astype(np.str_)
    plain = array.dtype.kind in "US" or (array.dtype.kind != "V" and array.dtype.isbuiltin == 1)
    np.save(path, array if plain else array.astype(np.float32), allow_pickle=False)


def leaves(results: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays among results: those of a sequence with their places behind its name, a map as its text; what is
    absent is left out."""
    found: dict[str, Array] = {}
    for name, value in results.items():
        if isinstance(value, list):
            found |= leaves({f"{name}[{place}]": item for place, item in enumerate(value)})
        elif value is not None:
            found[name] = np.array(str(value), object) if isinstance(value, dict) else value
    return found


def file_name(name: str) -> str:
    """A value's name as a file's: what file systems dislike becomes an underscore."""
    return re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "output"
