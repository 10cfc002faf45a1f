"""What `onnxc check --baseline` tells: a table for people, one JSON object for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .measured import Power
from .sensitivity import Layer, Sensitivities

LISTED = 20
"""Tensors that are listed where there are many."""
NAMED, WIDTH = 8, 36


@dataclass(frozen=True)
class SensitivityReport:
    """What was measured of a model beside its baseline. `least` is the ratio in dB that every output must have;
    `made_up` tells that nobody gave inputs."""

    model: str
    baseline: str
    found: Sensitivities
    least: float | None = None
    made_up: bool = False

    @property
    def good(self) -> bool:
        return self.least is None or all(power.plain >= self.least for power in self.found.outputs.values())

    def record(self) -> dict[str, Any]:
        """The report as JSON; its keys are described in `onnxc check --help`."""
        return {
            "model": self.model,
            "baseline": self.baseline,
            "samples": self.found.samples,
            "same": self.good,
            "outputs": [{"name": name, **_ratios(power)} for name, power in self.found.outputs.items()],
            "tensors": [_tensor(layer) for layer in self.found.layers],
            "unmatched": list(self.found.unknown),
        }


def _tensor(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.value,
        "in_model": layer.quantised or layer.computed,
        "nodes": list(layer.nodes),
        "operator": layer.operator,
        "weights": list(layer.weights),
        "shape": list(layer.shape),
        "alone": _ratios(layer.alone),
        "of_values": None if layer.rounding is None else _ratios(layer.rounding),
        "of_weights": None if layer.weighing is None else _ratios(layer.weighing),
        "accumulated": _ratios(layer.accumulated),
        "clipped": layer.extent.outside / layer.extent.count if layer.grid and layer.extent.count else None,
        "remark": layer.remark,
    }


def _ratios(power: Power) -> dict[str, Any]:
    channel, worst = power.worst
    return {
        "snr_db": _number(power.plain),
        "by_channel_db": _number(power.balanced),
        "worst_channel": {"index": channel, "snr_db": _number(worst)},
    }


def _number(value: float) -> Any:
    """A number that JSON has; infinities and NaN as text."""
    return round(value, 3) if math.isfinite(value) else str(value)


def lines(report: SensitivityReport) -> Iterator[Any]:
    """What is printed: texts and a table."""
    from ..terminal import table_of

    found = report.found
    yield (
        f"{report.model} beside {report.baseline}: {len(found.layers)} tensors, {found.samples} sample"
        f"{'s' * (found.samples != 1)}; signal to noise in dB, worst first"
    )
    yield ""
    table = table_of(
        "tensor", "computed by", ">its weights", ">its values", ">alone", ">by channel", ">accumulated", "what is wrong"
    )
    changed = [layer for layer in found.layers if layer.alone.lowest < math.inf]
    for layer in changed[:LISTED]:
        table.add_row(
            _short(layer.value), _nodes(layer), _cell(layer.weighing), _cell(layer.rounding), _cell(layer.alone),
            _decibels(layer.alone.balanced), _cell(layer.accumulated), layer.remark,
        )  # fmt: skip
    yield table
    if len(changed) > LISTED:
        yield f"... and {len(changed) - LISTED} better ones (--json lists all)"
    if len(changed) < len(found.layers):
        yield f"{len(found.layers) - len(changed)} more lose nothing by themselves"
    if found.unknown:
        more = f" and {len(found.unknown) - NAMED} more" if len(found.unknown) > NAMED else ""
        yield f"not found in the float model: {', '.join(found.unknown[:NAMED])}{more}"
    if report.made_up:
        yield "inputs were made up, and may lie outside the ranges of real ones: --data takes samples"
    yield ""
    for name, power in found.outputs.items():
        enough = report.least is None or power.plain >= report.least
        ratio = "exact" if power.plain == math.inf else f"{_decibels(power.plain)} dB"
        yield f"output {name}: {ratio}{'' if enough else f', less than {report.least:g}'}"


def _nodes(layer: Layer) -> str:
    if not layer.nodes:
        return ""
    more = f" and {len(layer.nodes) - 1} more" if len(layer.nodes) > 1 else ""
    return f"{layer.operator} {_short(layer.nodes[0])}{more}"


def _short(name: str) -> str:
    """The end of a long name, which tells more than its beginning."""
    return name if len(name) <= WIDTH else f"…{name[1 - WIDTH :]}"


def _cell(power: Power | None) -> str:
    return "" if power is None else _decibels(power.plain)


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"
