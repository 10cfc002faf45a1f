"""The table of operators, from the declarations themselves; `make readme` renews it in README.md."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx

from ..backends.cpu.schedules import SCHEDULES
from ..backends.cuda.schedules import SCHEDULES as GPU_SCHEDULES
from ..compiler.composites import COMPOSITES
from ..compiler.composites.microsoft_fused import SEARCHES
from ..compiler.host.kinds import STEPS
from ..compiler.sequences import RULES
from ..ir.dtypes import ALL, BY_ONNX
from ..ir.export import schema_of
from ..ir.ops import REGISTRY, control, special
from ..ir.ops.declare import Operator, Registry
from ..passes.regions import Schedule
from .document import Part

PART = Part("operators", "make readme")
GROUPS = {
    "float": ("f16", "bf16", "f32", "f64"),
    "int": ("i8", "i16", "i32", "i64"),
    "uint": ("u8", "u16", "u32", "u64"),
    "float8": ("f8e4m3fn", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz"),
    "float6": ("f6e2m3", "f6e3m2"),
    "int4/int2": ("i4", "u4", "i2", "u2"),
    "complex": ("c64", "c128"),
}
BY_SCHEMA = "ONNX's schema"


@dataclass(frozen=True)
class Row:
    """An operator: the file that defines it, its element types, what makes its code on CPUs and on GPUs, what it
    means."""

    name: str
    defined: str
    types: tuple[str, ...]
    compiled: str
    on_gpu: str
    meaning: str


def rows() -> list[Row]:
    """Every operator that is compiled: declared ones by family, then those that ONNX defines by others."""
    found = [_row(name, operator, file) for name, (operator, file) in _declared().items() if not _refused(name)]
    for name, schema in _schemas().items():
        if name not in REGISTRY and _expands(schema):
            body = "the operators of its body"
            found.append(Row(name, BY_SCHEMA, _types(name), body, body, ""))
    found += [_composite_row(name, function) for name, function in COMPOSITES.items() if name not in SEARCHES]
    return found + [_host_row(name) for name in STEPS]


def _composite_row(name: str, function: Callable[..., Any]) -> Row:
    """An operator that the importer writes as others."""
    file, document = function.__module__.rpartition(".")[2], inspect.getdoc(function) or ""
    body = "the operators that it stands for"
    return Row(name, f"compiler/composites/{file}.py", (), body, body, document.partition("\n")[0])


def _host_row(name: str) -> Row:
    """An operator that Python runs, between what is compiled, where the importer does not resolve it."""
    resolved = name in RULES
    how = "resolved while the model is read, else host step" if resolved else "host step"
    return Row(name, "compiler/sequences.py" if resolved else "compiler/host", (), how, how, "")


def missing() -> list[str]:
    """ONNX's operators, of the domain ai.onnx, that are refused."""
    known = {row.name for row in rows()} | {"Constant"}
    return sorted(name for name in _schemas() if name not in known)


def _declared() -> dict[str, tuple[Operator, str]]:
    """Each declared operator with its file."""
    found: dict[str, tuple[Operator, str]] = {}
    families = import_module("..ir.ops", __package__)  # mypy 2.4.1 may crash on a module as a value
    for name, module in vars(families).items():
        registry = getattr(module, "declare", None)
        if isinstance(registry, Registry):
            for op, operator in registry.operators.items():
                found[op] = operator, f"ir/ops/{name}.py"
    return {name: found[name] for name in REGISTRY}


def _refused(name: str) -> bool:
    """Whether an operator has neither a definition by elements nor a schedule."""
    return name in special.declare.operators and name not in SCHEDULES


def _row(name: str, operator: Operator, file: str) -> Row:
    document = inspect.getdoc(operator.define) or ""
    compiled, on_gpu = (_made_by(name, operator, schedules) for schedules in (SCHEDULES, GPU_SCHEDULES))
    return Row(name, file, _types(name), compiled, on_gpu, document.partition("\n")[0])


def _made_by(name: str, operator: Operator, schedules: Mapping[str, Sequence[Schedule]]) -> str:
    """What makes the code of an operator on a kind of target: its schedules, or something general."""
    if name in schedules:
        paths = dict.fromkeys(map(_file_of, schedules[name]))
        return ", ".join(paths) + ("" if name in special.declare.operators else ", loop nest")
    if name in control.declare.operators:
        return "branches and loops of the program"
    return "view, loop nest" if operator.movement else "loop nest"


def _file_of(schedule: Schedule) -> str:
    """The file of a schedule, from backends/ on, without the folders' common name: cpu/gemm.py, scan.py."""
    parts = schedule.__module__.partition(".backends.")[2].split(".")
    return "/".join(part for part in parts if part != "kernels") + ".py"


def _schemas() -> dict[str, Any]:
    schemas = [schema for schema in onnx.defs.get_all_schemas() if schema.domain == "" and not schema.deprecated]
    return {schema.name: schema for schema in sorted(schemas, key=lambda schema: schema.name)}


def _expands(schema: Any) -> bool:
    """Whether ONNX's body for an operator holds nothing that is refused."""
    if any(
        "seq" in text or "optional" in text for formal in (*schema.inputs, *schema.outputs) for text in formal.types
    ):
        return False
    if not schema.all_function_opset_versions:
        return False
    if schema.has_context_dependent_function:
        return True
    known = {name for name in REGISTRY if not _refused(name)} | {"Constant"}
    schemas = _schemas()
    nodes = schema.function_body.node
    return all(node.op_type in known or _expands(schemas[node.op_type]) for node in nodes)


def _types(name: str) -> tuple[str, ...]:
    """The element types that are compiled, of the operand that may have the most; groups of them by one word."""
    schema: Any = schema_of(name) or schema_of(name.rpartition(".")[2])
    if schema is None:
        return ()
    widest = max(schema.inputs or schema.outputs, key=lambda formal: len(formal.types)).types
    allowed = {match[1] for text in widest if (match := re.fullmatch(r"tensor\((.*)\)", text))}
    names = {onnx.TensorProto.DataType.Name(number).lower(): dtype for number, dtype in BY_ONNX.items()}
    present = {names[text].name for text in allowed if text in names} - {"string"}
    words = []
    for word, members in GROUPS.items():
        if present >= set(members):
            words.append(word)
            present -= set(members)
    return (*words, *(dtype.name for dtype in ALL if dtype.name in present))


def markdown(table: Sequence[Row]) -> str:
    """The rows as a Markdown table, operators that have all else in common on one line."""
    lines = ["| operators | defined in | types | on CPUs | on GPUs |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for row in table:
        groups.setdefault((row.defined, " ".join(row.types), row.compiled, row.on_gpu), []).append(row.name)
    lines += [f"| {', '.join(names)} | {' | '.join(key)} |" for key, names in groups.items()]
    return "\n".join(lines) + "\n"


def version_line() -> str:
    """What the table depends on besides this project."""
    return f"By the operators of onnx {onnx.__version__} (opset {onnx.defs.onnx_opset_version()}):"


def table() -> str:
    """What stands between the marks."""
    return f"{version_line()}\n\n{markdown(rows())}"


if __name__ == "__main__":
    PART.renew(Path(sys.argv[1]), table)
