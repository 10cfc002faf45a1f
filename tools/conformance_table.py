"""What passes of ONNX's own suite, as recorded by `make conformance`, which renews it in README.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .document import Part

PART = Part("conformance", "make conformance")


def markdown(record: Mapping[str, Any]) -> str:
    """The suites and their counts; the operators of which all cases pass, then the others with the reasons."""
    lines = [
        f"Cases of onnx {record['onnx']} (opset {record['opset']}) that pass compiled, for GPUs run on the emulator:",
        "",
        "| suite | cases | on CPUs | on GPUs |",
        "|---|---|---|---|",
    ]
    for suite, (cpu, gpu, total) in record["suites"].items():
        lines.append(f"| {suite} | {total} | {cpu} | {gpu} |")
    operators = record["operators"]
    whole = [f"{name} {total}" for name, (cpu, gpu, total) in operators.items() if cpu == gpu == total]
    lines += ["", f"Operators of which all cases pass on both, with their number: {', '.join(whole)}.", ""]
    lines += ["| operator | cases | on CPUs | on GPUs | what fails on CPUs |", "|---|---|---|---|---|"]
    for name, (cpu, gpu, total) in operators.items():
        if not cpu == gpu == total:
            lines.append(f"| {name} | {total} | {cpu} | {gpu} | {_reasons(record['failing'], name)} |")
    return "\n".join(lines) + "\n"


def _reasons(failing: Sequence[tuple[str, str, int]], name: str) -> str:
    return "; ".join(f"{count}: {reason}" for operator, reason, count in failing if operator == name)


if __name__ == "__main__":
    recorded = Path(sys.argv[2])
    PART.renew(Path(sys.argv[1]), lambda: markdown(json.loads(recorded.read_text(encoding="utf-8"))))
