"""LLVM IR text to object code by LLVM alone; run as a script, it does so for another process.

Protocol, all lengths 4 bytes little-endian: the parent sends the triple, the CPU and the features once, then modules;
each is answered by a byte (0: an object file follows, 1: an error message follows), a length and the content. The
script imports nothing of the package, so that it starts fast.
"""

from __future__ import annotations

import struct
import sys
from typing import IO

from llvmlite import binding


def create_machine(triple: str, cpu: str, features: str) -> binding.TargetMachine:
    """A generator of position-independent code, to be loaded here or linked. RuntimeError where LLVM has none."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple(triple)
    return target.create_target_machine(cpu=cpu, features=features, opt=2, reloc="pic", codemodel="small")


def optimize(ir_text: str, machine: binding.TargetMachine) -> binding.ModuleRef:
    """The verified module after LLVM's passes; loops and vectors stay as the schedules made them.

    Raises RuntimeError where the text is not valid.
    """
    module = binding.parse_assembly(ir_text)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False
    options.loop_interleaving = options.loop_unrolling = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def emit(ir_text: str, machine: binding.TargetMachine) -> bytes:
    """The object file of a module."""
    content: bytes = machine.emit_object(optimize(ir_text, machine))
    return content


def write_block(stream: IO[bytes], content: bytes, prefix: bytes = b"") -> None:
    stream.write(prefix + struct.pack("<I", len(content)) + content)
    stream.flush()


def read_block(stream: IO[bytes]) -> bytes:
    """The next block. EOFError where the other side is gone."""
    (length,) = struct.unpack("<I", read_exactly(stream, 4))
    return read_exactly(stream, length)


def read_exactly(stream: IO[bytes], length: int) -> bytes:
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return content


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Compiles what is asked for until the parent closes its end."""
    try:
        machine = create_machine(*(read_block(requests).decode() for _ in range(3)))
        while True:
            text = read_block(requests).decode()
            try:
                write_block(answers, emit(text, machine), b"\0")
            except RuntimeError as error:
                write_block(answers, str(error).encode(), b"\1")
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
