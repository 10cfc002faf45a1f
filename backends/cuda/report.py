"""What compiled kernels take of a GPU: registers, shared memory, spills and occupancy; their machine code as text."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...ir.cuda_devices import Device, Occupancy
from ...ir.errors import OnnxcError, UnsupportedError
from .launch import Launch
from .nvrtc import Resources, packaged_files, toolkit_folders


@dataclass(frozen=True)
class Row:
    """A kernel on an architecture. `shared_bytes` is a block's shared memory, static and dynamic."""

    kernel: str
    threads: int
    shared_bytes: int
    resources: Resources
    occupancy: Occupancy


def rows(resources: Mapping[str, Resources], launches: Mapping[str, Launch], device: Device) -> list[Row]:
    """A row for each kernel that is launched, in the order of `launches`; both by the kernel's name.

    Occupancy is theoretical: of a multiprocessor that has as many blocks as it takes.
    """
    found = []
    for kernel, launch in launches.items():
        used = resources[kernel]
        shared = used.shared_bytes + launch.shared_bytes
        occupancy = device.occupancy(launch.threads, used.registers, shared)
        found.append(Row(kernel, launch.threads, shared, used, occupancy))
    return found


_COLUMNS = ("threads", "registers", "shared", "stack", "spilled", "blocks/SM", "occupancy", "limited by")


def table(found: Sequence[Row], device: Device) -> str:
    """The rows as text for a person. Bytes: shared memory of a block; stack and spill stores and loads of a thread."""
    lines: list[tuple[str, ...]] = [(f"// {device.name}", *_COLUMNS)]
    for row in found:
        used, occupancy = row.resources, row.occupancy
        numbers = (row.threads, used.registers, row.shared_bytes, used.stack_bytes)
        spilled = used.spill_store_bytes + used.spill_load_bytes
        lines.append(
            (row.kernel, *map(str, (*numbers, spilled, occupancy.blocks)), f"{occupancy.share:.0%}", occupancy.limit)
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for name, *cells, limit in lines:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True))
        text.append("  ".join((name.ljust(widths[0]), *aligned, limit)))
    return "\n".join(text) + "\n"


_DISASSEMBLERS = (
    ("nvdisasm", ("--print-code",), "nvidia-cuda-nvdisasm"),
    ("cuobjdump", ("--dump-sass",), "nvidia-cuda-cuobjdump"),
)
"""Program, its arguments, the distribution that brings it."""


def sass(image: bytes) -> str:
    """The machine code of a cubin as text, by NVIDIA's disassembler. Raises UnsupportedError where it is not."""
    command = _disassembler()
    with tempfile.TemporaryDirectory(prefix="onnxc-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(image)
        run = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise OnnxcError(f"{command[0]} failed: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout


def has_disassembler() -> bool:
    """Whether `sass` works here."""
    try:
        _disassembler()
    except UnsupportedError:
        return False
    return True


def _disassembler() -> list[str]:
    toolkits = os.pathsep.join(str(folder / "bin") for folder in toolkit_folders())
    for name, arguments, package in _DISASSEMBLERS:
        found = shutil.which(name) or shutil.which(name, path=toolkits) or next(packaged_files((package,), name), None)
        if found is not None:
            return [found, *arguments]
    raise UnsupportedError(
        "machine code of GPUs (sass) is shown by nvdisasm or cuobjdump of the CUDA toolkit, which are not on PATH: "
        "`pip install nvidia-cuda-nvdisasm` brings the first"
    )
