"""What `onnxc check` tells: tables for people, one JSON object for programs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bisect import Fault
from .compare import Difference, shape_of
from .engine import Case, PerNode, Verdict

LISTED = 20
"""Values that are listed where there are many."""


@dataclass(frozen=True)
class Report:
    """All that was found about a model."""

    model: str
    target: str
    precision: str
    oracle: str
    cases: tuple[Case, ...]
    per_node: PerNode | None = None
    fault: Fault | None = None
    looked: bool = False
    saved: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        return all(case.good for case in self.cases)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Of all cases, worst first."""
        found = [verdict for case in self.cases for verdict in case.verdicts]
        return tuple(sorted(found, key=lambda verdict: verdict.difference.severity))

    def record(self) -> dict[str, Any]:
        """The report as JSON; its keys are described in `onnxc check --help`."""
        return {
            "model": self.model,
            "target": self.target,
            "precision": self.precision,
            "same": self.good,
            "oracle": {"asked": self.oracle, "nodes": self.engines(), "disputes": self.disputes()},
            "cases": [
                {
                    "seed": case.seed,
                    "inputs": {name: _input(array) for name, array in case.inputs.items()},
                    "outputs": [_verdict(verdict) for verdict in case.verdicts],
                }
                for case in self.cases
            ],
            "per_node": None
            if self.per_node is None
            else {"total": self.per_node.total, "values": [_difference(d) for d in self.per_node.values]},
            "fault": None if self.fault is None else _fault(self.fault, self.saved),
        }

    def engines(self) -> dict[str, int]:
        """How many nodes each engine evaluated."""
        return dict(Counter(self.cases[0].judge.reference.engines.values()))

    def disputes(self) -> list[dict[str, Any]]:
        """What the reference and ONNX Runtime did not agree about."""
        return [
            {"node": d.node, "operator": d.operator, "right": d.winner, "alone": d.loser}
            for d in self.cases[0].judge.reference.disputes
        ]


def _input(array: Any) -> dict[str, Any]:
    if isinstance(array, list):
        return {"sequence": [_input(part) for part in array]}
    return {"dtype": str(np.asarray(array).dtype), "shape": list(shape_of(array))}


def _number(value: Any) -> Any:
    """A number that JSON has; infinities and NaN as text."""
    if isinstance(value, complex):
        return str(value)
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _difference(found: Difference) -> dict[str, Any]:
    return {
        "name": found.name, "dtype": found.dtype, "shape": list(found.shape), "same": found.same,
        "max_abs": _number(found.max_abs), "max_rel": _number(found.max_rel), "max_ulp": _number(found.max_ulp),
        "snr_db": _number(found.noise_db), "limit": _number(found.limit), "excess": _number(found.excess),
        "different": found.count, "worst": {"index": list(found.index), "actual": _number(found.actual),
                                            "expected": _number(found.expected)},
        "reason": found.reason,
    }  # fmt: skip


def _verdict(verdict: Verdict) -> dict[str, Any]:
    agreement = {
        name: {"with_compiled": compiled, "with_reference": reference}
        for name, (compiled, reference) in verdict.agreement.items()
    }
    return {**_difference(verdict.difference), "status": verdict.status, "agreement": agreement}


def _fault(fault: Fault, saved: Sequence[str]) -> dict[str, Any]:
    stage = fault.stage
    part = fault.part
    return {
        "kind": fault.kind,
        "culprit": fault.culprit,
        "pass": None if stage is None or not stage.number else {"name": stage.name, "number": stage.number},
        "kernels": list(fault.kernels),
        "value": fault.value,
        "nodes": list(fault.nodes),
        "unseen": list(fault.unseen),
        "part": None if part is None else {"nodes": list(part.nodes), "trials": part.trials, "files": list(saved),
                                           "difference": _difference(part.difference)},
    }  # fmt: skip


# For people.


def lines(report: Report) -> list[Any]:
    """What is printed: texts and tables."""
    from ..terminal import table_of

    found: list[Any] = []
    table = table_of("output", "type", "shape", ">max abs", ">max rel", ">ulp", ">SNR dB", ">allowed", "verdict")
    several = len(report.cases) > 1
    for verdict in report.verdicts[:LISTED]:
        name = f"{verdict.difference.name}{f' (seed {verdict.seed})' if several else ''}"
        table.add_row(name, *_cells(verdict.difference), _words(verdict))
    found += [_evaluated(report), "", table]
    if len(report.verdicts) > LISTED:
        found.append(f"... and {len(report.verdicts) - LISTED} better ones (--json lists all)")
    for verdict in report.verdicts:
        if verdict.agreement:
            found.append(_agreement(verdict))
    if report.per_node is not None:
        found += ["", *_per_node(report.per_node)]
    if report.looked:
        refused = any(not case.actual for case in report.cases)
        found += ["", *(_fault_lines(report.fault, report.saved) if not refused else ["bisect: nothing to compare"])]
    found += ["", _summary(report)]
    return found


def _cells(found: Difference) -> tuple[str, ...]:
    shape = f"[{', '.join(map(str, found.shape))}]"
    if found.max_abs is None:
        return found.dtype, shape, "", "", "", "", ""
    noise = "exact" if found.noise_db == math.inf else f"{found.noise_db:.1f}"
    exact = found.dtype in ("bool", "string") or found.dtype[0] in "iu"
    return (
        found.dtype, shape, f"{found.max_abs:.3g}", f"{found.max_rel:.2g}", "" if exact else f"{found.max_ulp:.3g}",
        noise, f"{found.limit:.3g}",
    )  # fmt: skip


def _words(verdict: Verdict) -> str:
    found, status = verdict.difference, verdict.status
    if status == "same":
        return "same"
    if status in ("rounding", "tie", "random"):
        return f"same: {found.reason}"
    where = f"at {list(found.index)} {_short(found.actual)} instead of {_short(found.expected)}" if found.index else ""
    what = f"{found.excess:.3g} x what is allowed" if math.isfinite(found.excess) else found.reason
    text = ", ".join(filter(None, (what, where)))
    return f"{'the reference is alone' if status == 'reference alone' else 'DIFFERS'}: {text or 'not equal'}"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _agreement(verdict: Verdict) -> str:
    names = {"onnxruntime": "ONNX Runtime", "f64": "the evaluation in f64"}
    parts = []
    for oracle, (compiled, reference) in verdict.agreement.items():
        sides = {(True, True): "both", (True, False): "the compiled model", (False, True): "the reference"}
        parts.append(f"{names[oracle]} agrees with {sides.get((compiled, reference), 'neither')}")
    return f"{verdict.difference.name}: {'; '.join(parts)}"


def _evaluated(report: Report) -> str:
    names = {"reference": "onnx.reference", "onnxruntime": "ONNX Runtime", "onnxc": "onnxc's own code without passes"}
    who = ", ".join(f"{count} by {names[name]}" for name, count in report.engines().items())
    text = f"{sum(report.engines().values())} nodes evaluated one by one: {who}"
    alone: Counter[tuple[str, str]] = Counter()
    for dispute in report.cases[0].judge.reference.disputes:
        alone[dispute.operator, dispute.loser] += 1
    for (operator, loser), count in alone.items():
        text += f"\n{names[loser]} stands alone about {operator} ({count} nodes): the other two engines agree"
    return text


def _per_node(found: PerNode) -> list[Any]:
    from ..terminal import table_of

    table = table_of("value", "type", "shape", ">max abs", ">max rel", ">ulp", ">SNR dB", ">allowed", "")
    for difference in found.values[:LISTED]:
        table.add_row(difference.name, *_cells(difference), difference.reason if difference.same else "DIFFERS")
    head = f"{len(found.values)} of the model's {found.total} values exist in the optimised program under their names"
    rest = len(found.values) - LISTED
    return [f"{head}{', worst first:' if found.values else ''}", *([table] if found.values else []),
            *([f"... and {rest} better ones (--json lists all)"] if rest > 0 else [])]  # fmt: skip


def _fault_lines(fault: Fault | None, saved: Sequence[str]) -> list[str]:
    if fault is None:
        return ["bisect: nothing differs, there is no fault to look for"]
    found = [f"at fault: {fault.culprit}"]
    if fault.value:
        found.append(f"first value that differs: {fault.value}")
    if fault.nodes:
        more = f" and {len(fault.nodes) - 8} more" if len(fault.nodes) > 8 else ""
        found.append(f"ONNX nodes that it is about: {', '.join(fault.nodes[:8])}{more}")
    if fault.unseen:
        found.append(f"passes whose result could not be evaluated: {', '.join(fault.unseen)}")
    if fault.part is None:
        found.append("no smaller part of the model shows it")
    else:
        nodes = ", ".join(fault.part.nodes)
        found.append(f"smallest part that shows it: {len(fault.part.nodes)} nodes ({nodes})")
    found += [f"saved: {', '.join(saved)}"] if saved else []
    return found


def _summary(report: Report) -> str:
    count = len(report.verdicts)
    bad = sum(not verdict.good for verdict in report.verdicts)
    outputs = f"{count} output{'s' * (count != 1)}"
    return f"{bad} of {outputs} differ" if bad else f"same: {outputs} within what rounding explains"
