"""Artifacts: a compiled model as one file (`*.onnxc`) that is loaded without compiling.

The file begins with a header, little-endian: magic, version of the format, bytes of the manifest, bytes of the file,
where the weights begin, and three checksums (of the header's other fields with the manifest, of what lies between it
and the weights, of the weights). The manifest is JSON: the ports, the symbols (dims are texts over them), the arena's
layout, the target, the kernels with the ONNX nodes they were made of, and the places of everything else. Object code
and texts follow, then, on a page of their own, the weights, each aligned to 64 bytes in the form that the code reads:
they are mapped, not copied.

Reading checks every length, offset and checksum, so a truncated or damaged file is refused. That is no protection
against one that is made to do harm: an artifact is code, to be trusted like a shared library.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..ir.dims import Dim, parse_dim, symbol, symbols
from ..ir.dtypes import BY_NAME
from ..ir.errors import ModelError, UnsupportedError
from ..ir.graph import TensorType, Value
from ..ir.program import ALIGNMENT, MARK, ArenaPlan, ArenaSlot, dim_text
from ..ir.target import Target
from .compiled import Compiled

if TYPE_CHECKING:
    from ..backends.cuda.runtime.code import DeviceCode
    from .deferred import Deferred
    from .executable import Executable

MAGIC = b"\x89onnxc\r\n"
VERSION = 2
"""Of the format and of what it holds: the functions in the code, what they are passed, the runtime that they call."""
PAGE = 4096
_HEADER = struct.Struct("<8sQQQQ16s16s16s")
_CHECKSUMS = 40
"""Where the checksums stand in the header."""
_BLOCK = 512
"""Words of 8 bytes that are summed into one for the checksum of the weights: it costs 0.03 s per GB, hashing 4 s."""


def save(compiled: Compiled, path: str | os.PathLike[str]) -> Path:
    """Writes the artifact; a file of that name is replaced when the new one is complete. OSError where it cannot be."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with open(temporary, "x+b") as file:
            _write(compiled, file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def read(path: str | os.PathLike[str], verify: bool = True) -> Compiled:
    """What `save` wrote. `verify=False` trusts the weights, which are then only read when a run needs them.

    Raises ModelError for a file that is no artifact, truncated or damaged, UnsupportedError for one of another version.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error
    if content[: len(MAGIC)] != MAGIC:
        raise ModelError(
            f"{path}: this is no artifact of onnxc; `onnxc compile model.onnx -o {path.stem}.onnxc` writes one"
        )
    if len(content) < _HEADER.size:
        raise ModelError(f"{path}: the artifact is truncated: {len(content)} bytes")
    _, version, manifest_bytes, total, weights_start, *checksums = _HEADER.unpack_from(content)
    if version != VERSION:
        raise UnsupportedError(
            f"{path}: an artifact of format {version}, but this onnxc reads {VERSION}: compile it anew"
        )
    if len(content) != total:
        raise ModelError(f"{path}: the artifact is truncated or damaged: {len(content)} bytes of {total}")
    manifest_end = _HEADER.size + manifest_bytes
    if not manifest_end <= weights_start <= total or weights_start % PAGE or total % ALIGNMENT:
        raise ModelError(f"{path}: the artifact is damaged: its parts do not fit in it")
    actual = [
        _digest(content[:_CHECKSUMS], content[_HEADER.size : manifest_end]),
        _digest(content[manifest_end:weights_start]),
        _sum_digest([content[weights_start:]]) if verify else checksums[2],
    ]
    for name, checksum, found in zip(("description", "code", "weights"), checksums, actual, strict=True):
        if checksum != found:
            raise ModelError(f"{path}: the artifact is damaged: the checksum of its {name} is wrong")
    try:
        return _decode(json.loads(bytes(content[_HEADER.size : manifest_end])), content)
    except (KeyError, TypeError, ValueError, RecursionError, zlib.error) as error:
        raise ModelError(f"{path}: the artifact is damaged: {type(error).__name__} {error}") from error


def write(
    model: Executable | Deferred | Compiled, path: str | os.PathLike[str], threaded: bool = True
) -> tuple[Path, ...]:
    """Writes what the path's suffix tells: an artifact (.onnxc), or native code (.o, .so) with its C header.

    Native code that is not `threaded` needs no library. Returns the files. Raises UnsupportedError for another suffix,
    or for a model that is compiled by values of inputs.
    """
    from .native import write_native

    path, compiled = Path(path), model if isinstance(model, Compiled) else model.compiled
    if path.suffix == ".onnxc":
        return (save(compiled, path),)
    return write_native(compiled, path, threaded)


def _digest(*parts: bytes | memoryview) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.digest()


def _sum_digest(pieces: Iterable[bytes | memoryview]) -> bytes:
    """A hash of the sums of blocks: no word can change, nor a block move, unnoticed. Pieces, but the last, are whole
    blocks, so that a file need not be in memory at once."""
    parts: list[bytes] = []
    for piece in pieces:
        words = np.frombuffer(piece, np.uint64)
        whole = len(words) // _BLOCK * _BLOCK
        parts += [words[:whole].reshape(-1, _BLOCK).sum(axis=1).tobytes(), words[whole:].tobytes()]
    return _digest(*parts)


# Writing


class _Places:
    """Gives places behind `end`, and remembers what goes there."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.content: list[tuple[int, memoryview]] = []

    def add(self, content: memoryview) -> list[int]:
        """[offset, bytes] for more content, aligned for use in place."""
        offset = -(-self.end // ALIGNMENT) * ALIGNMENT
        self.content.append((offset, content))
        self.end = offset + len(content)
        return [offset, len(content)]


def _write(compiled: Compiled, file: IO[bytes]) -> None:
    from .. import __version__

    # Places count from the end of the manifest, whose length depends on them.
    code, weights = _Places(0), _Places(0)
    manifest = {
        "onnxc": __version__,
        "name": compiled.name,
        "target": asdict(compiled.target) | {"enabled": sorted(compiled.target.enabled)},
        "inputs": [_encode_port(value) for value in compiled.inputs],
        "outputs": [_encode_port(value) for value in compiled.outputs],
        "symbols": [name.removeprefix(MARK) for name in compiled.symbols],
        "assumptions": [[dim_text(a), dim_text(b)] for a, b in compiled.assumptions],
        "segments": compiled.segments,
        "ready": compiled.ready,
        "checks": compiled.checks,
        "donated": compiled.donated,
        "arena": {
            "slots": [[[s.memory, dim_text(s.bytes), s.below] for s in slots] for slots in compiled.arena.slots],
            "size": compiled.arena.size,
            "lower_bound": compiled.arena.lower_bound,
            "hints": {name.removeprefix(MARK): size for name, size in compiled.arena.hints.items()},
            "lifetimes": compiled.arena.lifetimes,
        },
        "kernels": compiled.kernels,
        "texts": {stage: code.add(memoryview(zlib.compress(text.encode()))) for stage, text in compiled.texts.items()},
        "objects": [code.add(memoryview(content)) for content in compiled.objects],
        **_encode_device(compiled, code),
        "constants": {name: weights.add(content) for name, content in compiled.weights.items()},
    }
    encoded = json.dumps(manifest, ensure_ascii=False, separators=(",", ":")).encode()
    manifest_end = _HEADER.size + len(encoded)
    weights_start = -(-(manifest_end + code.end) // PAGE) * PAGE
    total = weights_start + -(-weights.end // ALIGNMENT) * ALIGNMENT
    file.truncate(total)
    file.seek(_HEADER.size)
    file.write(encoded)
    for start, places in ((manifest_end, code), (weights_start, weights)):
        for offset, content in places.content:
            file.seek(start + offset)
            file.write(content)
    file.flush()
    file.seek(manifest_end)
    between = file.read(weights_start - manifest_end)
    head = MAGIC, VERSION, len(encoded), total, weights_start
    checksums = (
        _digest(_HEADER.pack(*head, b"", b"", b"")[:_CHECKSUMS], encoded),
        _digest(between),
        _sum_digest(iter(partial(file.read, 1 << 24), b"")),
    )
    file.seek(0)
    file.write(_HEADER.pack(*head, *checksums))


def _encode_device(compiled: Compiled, code: _Places) -> dict[str, Any]:
    """What a GPU runs, for the manifest; nothing where the model is compiled for a CPU."""
    if compiled.device is None:
        return {}
    from ..backends.cuda.runtime.code import encode

    images = {
        architecture: {name: code.add(memoryview(image)) for name, image in kernels.items()}
        for architecture, kernels in compiled.device.images.items()
    }
    return {"device": encode(compiled.device), "images": images}


def _encode_port(value: Value) -> dict[str, Any]:
    return {"name": value.name, "dtype": value.dtype.name, "shape": [dim_text(dim) for dim in value.shape]}


# Reading


def _decode(manifest: Mapping[str, Any], content: memoryview) -> Compiled:
    _, _, manifest_bytes, total, weights_start, *_ = _HEADER.unpack_from(content)
    known = {name: symbol(MARK + name, None) for name in manifest["symbols"]}

    def part(place: Sequence[int], start: int, end: int) -> memoryview:
        offset, length = place
        if not (type(offset) is type(length) is int and 0 <= offset <= offset + length <= end - start):
            raise ValueError(f"{place} is outside of the file")
        if offset % ALIGNMENT:
            raise ValueError(f"{place} is not aligned")
        return content[start + offset : start + offset + length]

    def code(place: Sequence[int]) -> bytes:
        return bytes(part(place, _HEADER.size + manifest_bytes, weights_start))

    def dim(text: str | int) -> Dim:
        if isinstance(text, int):
            return text
        found = parse_dim(text, known)
        if not {s.name.removeprefix(MARK) for s in symbols(found)} <= known.keys():
            raise ValueError(f"{text} has unknown symbols")
        return found

    def port(value: Mapping[str, Any]) -> Value:
        return Value(str(value["name"]), TensorType(BY_NAME[value["dtype"]], tuple(map(dim, value["shape"]))))

    def integers(values: Iterable[Any], least: int = 0, most: float = math.inf) -> tuple[int, ...]:
        found = tuple(values)
        if not all(type(value) is int and least <= value <= most for value in found):
            raise ValueError(f"{found} is not what was expected")
        return found

    segments, arena, outputs = manifest["segments"], manifest["arena"], tuple(map(port, manifest["outputs"]))
    integers([segments], 1)
    ready = integers(manifest["ready"], 0, segments)
    if len(ready) != len(outputs) or len(arena["slots"]) != segments:
        raise ValueError("the numbers of outputs or of segments differ")
    layout = ArenaPlan(
        tuple(
            tuple(ArenaSlot(name, dim(size), integers(below, 0, len(slots) - 1)) for name, size, below in slots)
            for slots in arena["slots"]
        ),
        int(arena["size"]),
        int(arena["lower_bound"]),
        hints={MARK + name: size for name, size in arena["hints"].items()},
        lifetimes={name: integers([first, last]) for name, (first, last) in arena["lifetimes"].items()},  # type: ignore[misc]
    )
    target = Target(**manifest["target"])
    return Compiled(
        name=manifest["name"],
        target=replace(target, enabled=frozenset(target.enabled)),
        inputs=tuple(map(port, manifest["inputs"])),
        outputs=outputs,
        symbols=tuple(MARK + name for name in known),
        assumptions=tuple((dim(a), dim(b)) for a, b in manifest["assumptions"]),
        segments=segments,
        ready=ready,
        arena=layout,
        objects=tuple(map(code, manifest["objects"])),
        constants={
            name: np.frombuffer(part(place, weights_start, total), np.uint8)
            for name, place in manifest["constants"].items()
        },
        kernels={name: tuple(origin) for name, origin in manifest["kernels"].items()},
        texts={stage: zlib.decompress(code(place)).decode() for stage, place in manifest["texts"].items()},
        device=_decode_device(manifest, code) if "device" in manifest else None,
        checks=tuple(map(str, manifest["checks"])),
        donated=_pairs(manifest["donated"], [port["name"] for port in manifest["inputs"]], outputs),
    )


def _pairs(pairs: Any, inputs: Sequence[str], outputs: Sequence[Value]) -> tuple[tuple[str, str], ...]:
    """Pairs (output, input) of one memory. Raises ValueError for what is none."""
    found = tuple((str(output), str(source)) for output, source in pairs)
    names = {value.name for value in outputs}
    if not all(output in names and source in inputs for output, source in found):
        raise ValueError("what is donated is no port")
    return found


def _decode_device(manifest: Mapping[str, Any], code: Callable[[Sequence[int]], bytes]) -> DeviceCode:
    from ..backends.cuda.runtime.code import decode

    images = {
        architecture: {name: code(place) for name, place in kernels.items()}
        for architecture, kernels in manifest["images"].items()
    }
    return decode(manifest["device"], images)
