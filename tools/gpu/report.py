"""The report: one JSON object, written anew after each part, and what of it decides the exit code."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

SCHEMA = 1
PACKAGES = (
    "onnxc", "numpy", "onnx", "pycuda", "nvidia-cuda-nvrtc", "onnxruntime", "torch", "torchvision", "transformers",
)  # fmt: skip
STAND_IN = "stand-in"
"""In the name of a GPU that is none: figures measured on it mean nothing."""


@dataclass
class Report:
    """What has been found so far. `path` is where it is written."""

    path: Path
    content: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def begun(path: Path, minutes: float, machine: Mapping[str, Any]) -> Report:
        """A report without parts."""
        return Report(
            path,
            {
                "schema": SCHEMA,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "stand_in": STAND_IN in machine["gpu"],
                "complete": False,
                "differs": False,
                "minutes": minutes,
                "seconds": 0.0,
                "machine": dict(machine),
                "versions": versions(),
                "notes": [],
                "parts": {},
            },
        )

    def part(self, name: str) -> dict[str, Any]:
        """A part, empty at first: what is put in it is in the report."""
        found: dict[str, Any] = self.content["parts"].setdefault(name, {"state": "done", "notes": []})
        return found

    def write(self, seconds: float, complete: bool = False) -> None:
        """Replaces the file."""
        self.content |= {"seconds": round(seconds, 1), "complete": complete, "differs": any(failures(self.content))}
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(
            json.dumps(self.content, indent=1, allow_nan=False, default=float) + "\n", encoding="utf-8"
        )
        os.replace(temporary, self.path)


def failures(content: Mapping[str, Any]) -> Iterator[str]:
    """What is not as it must be: failed cases, models that disagree, parts that broke off. Speed is no failure."""
    parts = content["parts"]
    for failure in parts.get("operators", {}).get("failures", ()):
        yield f"{failure['case']} ({failure['family']}): {failure['message']}"
    for name in ("models", "speed", "whole"):
        for row in parts.get(name, {}).get("rows", ()):
            if row.get("message"):
                yield f"{row['name']}, {row['precision']}: {row['message']}"
    for name, part in parts.items():
        if part["state"] == "failed":
            yield f"part {name}: {part['notes'][-1]}"


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that matter here; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if found["onnxc"] is None:
        from ... import __version__

        found["onnxc"] = __version__
    return found


def machine_facts() -> dict[str, Any]:
    """The GPU of this process and the machine around it. TargetError where there is none."""
    from ...backends.cuda.runtime.driver import open_device

    facts = open_device().facts
    return {
        "gpu": facts.name,
        "architecture": facts.architecture,
        "multiprocessors": facts.multiprocessors,
        "memory_bytes": facts.memory_bytes,
        "driver": _driver(),
        "cuda_of_driver": f"{facts.driver_version // 1000}.{facts.driver_version % 1000 // 10}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver, by its kernel module or by nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
