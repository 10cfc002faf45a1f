"""The figures of GPUs in README.md, from the last report that is kept: `python -m onnxc.tools.gpu.table README.md`.

Nothing is written that was not measured: without a report the document says so, and reports are refused that were made
on no GPU or broke off.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...ir.errors import OnnxcError
from ..document import Part
from .report import SCHEMA

PART = Part("GPU figures", "make readme")
REPORT = Path(__file__).parents[1] / "gpu_report.json"
"""The last report of a real GPU."""
UNMEASURED = "GPU figures are not measured yet."
_PEERS = ("onnxc", "torch eager", "torch graph", "torch.compile")


def kept_report(path: Path = REPORT) -> dict[str, Any] | None:
    """The report that is kept; None where there is none. OnnxcError for one that tells nothing of a GPU."""
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("schema") != SCHEMA:
        raise OnnxcError(f"{path.name} is of schema {content.get('schema')}, not {SCHEMA}: make it anew")
    if content["stand_in"]:
        raise OnnxcError(f"{path.name} was made on {content['machine']['gpu']}: its figures are of no GPU")
    if not content["complete"]:
        raise OnnxcError(f"{path.name} is not complete: the check broke off")
    return content


def figures(content: Mapping[str, Any] | None) -> str:
    """What is told of GPUs, in Markdown."""
    if content is None:
        return UNMEASURED
    machine, versions, parts = content["machine"], content["versions"], content["parts"]
    torch = f", PyTorch {versions['torch']}" if versions["torch"] else ""
    driver = f"driver {machine['driver']}" if machine["driver"] else f"CUDA {machine['cuda_of_driver']}"
    lines = [f"{machine['gpu']}, {driver}{torch}, {content['date'][:10]}. {_agreement(parts)}"]
    for table in (_networks(parts), _operators(parts)):
        if len(table) > 2:
            lines += ["", *table]
    notes = [f"{name}: {note}" for name, part in parts.items() for note in part["notes"]]
    return "\n".join([*lines, *(["", f"Left out: {'; '.join(notes)}."] if notes else [])])


def _agreement(parts: Mapping[str, Any]) -> str:
    families = parts.get("operators", {}).get("families", {}).values()
    cases, agree = (sum(family[key] for family in families) for key in ("cases", "agree"))
    rows = parts.get("models", {}).get("rows", [])
    good = sum(not row["message"] for row in rows)
    return (
        f"Of ONNX's {cases} node cases that the CPU passes {agree} agree; of {len(rows)} comparisons of models with a "
        f"reference, in {len({row['precision'] for row in rows})} precisions, {good}."
    )


def _networks(parts: Mapping[str, Any]) -> list[str]:
    """Times of networks, by who runs them."""
    lines = [f"| network, f16 | batch | {' | '.join(f'{peer}, us' for peer in _PEERS)} |", "|---|---|" + "---|" * 4]
    for row in parts.get("whole", {}).get("rows", []):
        if row.get("peers"):
            cells = [_microseconds(row["peers"].get(peer)) for peer in _PEERS]
            lines.append(f"| {row['name']} | {row['batch']} | {' | '.join(cells)} |")
    return lines


def _microseconds(figures: Mapping[str, float] | None) -> str:
    return "" if figures is None or "median_us" not in figures else f"{figures['median_us']:.0f}"


def _operators(parts: Mapping[str, Any]) -> list[str]:
    """Medians over the shapes of each kind of operator."""
    lines = [
        "| operators | type | shapes | of the measured limit | of PyTorch's speed | first mark |",
        "|---|---|---|---|---|---|",
    ]
    rows = [row for row in parts.get("speed", {}).get("rows", []) if "us" in row]
    for kind, precision in dict.fromkeys((row["kind"], row["precision"]) for row in rows):
        own = [row for row in rows if (row["kind"], row["precision"]) == (kind, precision)]
        marks = [row["mark"]["met"] for row in own if "mark" in row]
        reached = f"{sum(marks)} of {len(marks)}" if marks else ""
        cells = [_median(row.get(key) for row in own) for key in ("share_of_limit", "of_torch")]
        lines.append(f"| {kind} | {precision} | {len(own)} | {' | '.join(cells)} | {reached} |")
    return lines


def _median(values: Iterator[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.2f}" if known else ""


if __name__ == "__main__":
    PART.renew(Path(sys.argv[1]), lambda: figures(kept_report()))
