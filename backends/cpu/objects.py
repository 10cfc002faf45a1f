"""LLVM IR text to object code."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import binding

from ...ir.errors import TargetError
from ...ir.target import Target


def target_machine(target: Target) -> binding.TargetMachine:
    """LLVM's code generator for a target: position-independent code that can be loaded here or linked.

    Raises TargetError where this LLVM cannot generate code for it.
    """
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        machine = binding.Target.from_triple(target.triple)
        return machine.create_target_machine(
            cpu=target.cpu, features=target.features, opt=2, reloc="pic", codemodel="small"
        )
    except RuntimeError as error:
        raise TargetError(f"LLVM cannot compile for {target.name}: {error}") from error


def optimized(ir_text: str, machine: binding.TargetMachine) -> binding.ModuleRef:
    """The verified module after LLVM's passes. The kernels' own loops and vectors stay as the schedules made them."""
    module = binding.parse_assembly(ir_text)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = False
    options.slp_vectorization = False
    options.loop_interleaving = False
    options.loop_unrolling = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def compile_objects(modules: Sequence[tuple[str, str]], target: Target) -> list[bytes]:
    """The object file of each (name, LLVM IR text)."""
    machine = target_machine(target)
    return [machine.emit_object(optimized(text, machine)) for _, text in modules]


def assembly(ir_text: str, target: Target) -> str:
    """The assembly that a module becomes."""
    machine = target_machine(target)
    text: str = machine.emit_assembly(optimized(ir_text, machine))
    return text
