"""The report as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..terminal import table_of
from .report import failures

FAILURES, KERNELS = 20, 10
"""Lines that are shown of what differs, and of a network's kernels, the slowest first."""


def print_summary(content: Mapping[str, Any], console: Console) -> None:
    """All parts, then what is wrong, then the verdict."""
    machine, parts = content["machine"], content["parts"]
    driver = f"driver {machine['driver']}, " if machine["driver"] else ""
    console.print(f"{machine['gpu']}, {driver}CUDA {machine['cuda_of_driver']}, {content['date']}")
    for name, show in (("operators", _operators), ("models", _models), ("speed", _speed), ("whole", _whole)):
        part = parts.get(name)
        if part is None:
            continue
        console.print(f"\n{name}: {part['state']} in {part.get('seconds', 0):.0f} s", style="bold")
        for note in part["notes"]:
            console.print(f"  {note}")
        for what, why in part.get("missing", {}).items():
            console.print(f"  {what}: {why}")
        for table in show(part):
            console.print(table)
    wrong = list(failures(content))
    if wrong:
        console.print(f"\n{len(wrong)} differ:", style="bold")
        for line in wrong[:FAILURES]:
            console.print(f"  {line}")
    verdict = "differences were found" if wrong else "everything that was checked agrees"
    notes = "".join(f"; {note}" for note in content["notes"])
    console.print(f"\n{verdict}, {content['seconds']:.0f} s of {60 * content['minutes']:.0f}{notes}")


def _operators(part: Mapping[str, Any]) -> Sequence[Table]:
    table = table_of("family", ">cases", ">agree", ">fail", ">not on the CPU either")
    for family, counts in part.get("families", {}).items():
        table.add_row(family, *(str(counts[key]) for key in ("cases", "agree", "fail", "refused")))
    return [table]


def _models(part: Mapping[str, Any]) -> Sequence[Table]:
    rows = part.get("rows", ())
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        good = f"{row['difference']:.1e}" if row["difference"] is not None else ""
        found.setdefault(row["name"], {})[row["precision"]] = f"{good} wrong".strip() if row["message"] else good
    table = table_of("model", *(f">{precision}" for precision in precisions))
    for name, cells in found.items():
        table.add_row(name, *(cells.get(precision, "") for precision in precisions))
    return [table]


def _speed(part: Mapping[str, Any]) -> Sequence[Table]:
    limits = part.get("limits", {})
    table = table_of("operator", "type", ">us", ">GB/s", ">TFLOP/s", ">of limit", ">of torch", "mark")
    for row in part.get("rows", ()):
        table.add_row(f"{row['kind']} {row['name']}", row["precision"], *_figures(row), mark_of(row))
    reached = ", ".join(
        f"copy {value / 1e9:.0f} GB/s" if name == "copy" else f"{name} {value / 1e12:.1f} TFLOP/s"
        for name, value in limits.items()
    )
    return [table_of(f"limits, as measured: {reached}"), table] if limits else [table]


def _figures(row: Mapping[str, Any]) -> list[str]:
    formats = {"us": ".1f", "gb_per_s": ".0f", "tflop_per_s": ".1f", "share_of_limit": ".2f", "of_torch": ".2f"}
    return [format(row[key], form) if row.get(key) is not None else "" for key, form in formats.items()]


def mark_of(row: Mapping[str, Any]) -> str:
    """Whether the row reaches its mark, or what is wrong with it."""
    mark = row.get("mark")
    if row.get("message"):
        return str(row["message"])[:60]
    if mark is None:
        return ""
    return f"{mark['reached']:.2f} of {mark['of']}: {'met' if mark['met'] else 'missed'} ({mark['share']})"


def _whole(part: Mapping[str, Any]) -> Sequence[Table]:
    tables = []
    table = table_of("network", ">batch", "run by", ">us", ">least", ">most", ">latency", ">times onnxc", "")
    for row in part.get("rows", ()):
        own = row.get("peers", {}).get("onnxc", {}).get("median_us")
        for peer, figures in row.get("peers", {}).items():
            numbers = [f"{figures[key]:.1f}" for key in ("median_us", "least_us", "most_us", "latency_us")]
            cells = (row["name"], str(row["batch"]), peer, *numbers, f"{figures['median_us'] / own:.2f}")
            table.add_row(*cells, row["message"] if peer == "onnxc" else "")
        for peer, why in row.get("absent", {}).items():
            table.add_row(row["name"], str(row["batch"]), peer, "", "", "", "", "", why)
        if row["message"] and not row.get("peers"):
            table.add_row(row["name"], str(row["batch"]), "onnxc", "", "", "", "", "", row["message"])
        kernels = sorted(row.get("kernels", ()), key=lambda kernel: -kernel["us"])
        listed = table_of(
            f"kernels of {row['name']}, batch {row['batch']}", ">us", ">GB/s", ">TFLOP/s", ">of limit", "from"
        )
        for kernel in kernels[:KERNELS]:
            listed.add_row(kernel["kernel"], *_figures(kernel)[:4], ", ".join(kernel["from"])[:80])
        if kernels:
            total = sum(kernel["us"] for kernel in kernels)
            listed.add_row(f"all {len(kernels)}", f"{total:.1f}")
            tables.append(listed)
    return [table, *tables]
