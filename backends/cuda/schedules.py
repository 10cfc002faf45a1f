"""Which schedule makes the kernels of a region on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...ir.target import Target
from ...passes.regions import BindSymbol, Call, Lowered, Region, Schedule
from ...passes.threads import distribute
from ..kernels import detection, determinant, fourier, scan, scatter, selection
from .kernels import pointwise
from .launch import is_launchable

SCHEDULES: Mapping[str, tuple[Schedule, ...]] = {
    **dict.fromkeys(("CumSum", "CumProd"), (scan.schedule,)),
    "ScatterElements": (scatter.scatter_elements,),
    "ScatterND": (scatter.scatter_nd,),
    "MaxUnpool": (scatter.max_unpool,),
    "TopK": (selection.top_k,),
    "NonZero": (selection.non_zero,),
    "Compress": (selection.compress,),
    "Unique": (selection.unique,),
    "NonMaxSuppression": (detection.non_max_suppression,),
    "DFT": (fourier.dft,),
    "STFT": (fourier.stft,),
    "Det": (determinant.schedule,),
}
"""For an anchor's operator: the schedules to try in order, before those for any region."""
GENERAL: tuple[Schedule, ...] = (pointwise.schedule,)
"""Tried in order for every region that no schedule of its operator takes."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a region by the first schedule that applies, each in the form that GPUs run."""
    own = SCHEDULES.get(region.anchor.op, ()) if region.anchor is not None else ()
    for candidate in (*own, *GENERAL):
        lowered = candidate(region, target)
        if lowered is not None:
            calls = tuple(
                part for call in lowered.calls for part in (_launches(call) if isinstance(call, Call) else [call])
            )
            return replace(lowered, calls=calls)
    return None


def _launches(call: Call) -> list[Call | BindSymbol]:
    """A kernel that names no threads as launches of kernels that do."""
    kernel = call.kernel
    if is_launchable(kernel):
        return [call]
    arguments = dict(zip((p.name for p in kernel.parameters), call.arguments, strict=True))
    sizes = dict(zip(kernel.sizes, call.sizes, strict=True))
    return [
        Call(part, tuple(arguments[p.name] for p in part.parameters), tuple(sizes[name] for name in part.sizes))
        for part in distribute(kernel)
    ]
