"""Which schedule makes the kernels of a region on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...ir.target import Target
from ...passes.regions import BindSymbol, Call, Lowered, Region, Repeated, Schedule
from ...passes.threads import distribute
from ..kernels import checks, detection, determinant, fourier, selection, trees
from .kernels import (
    attention,
    conv,
    depthwise,
    gemm,
    general,
    listing,
    packed_gemv,
    recurrent,
    recurrent_integers,
    scan,
    scatter,
    top_k,
)
from .launch import is_launchable

SCHEDULES: Mapping[str, tuple[Schedule, ...]] = {
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (recurrent.schedule,)),
    "com.microsoft.DynamicQuantizeLSTM": (recurrent_integers.schedule, recurrent.schedule),
    **dict.fromkeys(("MatMul", "Gemm", "com.microsoft.FusedMatMul", "Einsum"), (gemm.schedule,)),
    **dict.fromkeys(("MatMulInteger", "QLinearMatMul"), (gemm.schedule,)),
    "onnxc.PackedMatMul": (packed_gemv.schedule, gemm.schedule),
    **dict.fromkeys(("CumSum", "CumProd"), (scan.schedule,)),
    "onnxc.Attention": (attention.schedule,),
    **dict.fromkeys(("Conv", "ConvInteger"), (depthwise.schedule, conv.schedule)),
    "ConvTranspose": (conv.transposed,),
    "ScatterElements": (scatter.scatter_elements,),
    "ScatterND": (scatter.scatter_nd,),
    "MaxUnpool": (scatter.max_unpool,),
    "TopK": (top_k.schedule, selection.top_k),
    "NonZero": (listing.non_zero,),
    "Compress": (listing.compress,),
    "Unique": (selection.unique,),
    "NonMaxSuppression": (detection.non_max_suppression,),
    "DFT": (fourier.dft,),
    "STFT": (fourier.stft,),
    "Det": (determinant.schedule,),
    "onnxc.TreeEnsemble": (trees.schedule,),
    "onnxc.CheckIndex": (checks.check_index,),
    "onnxc.CheckSize": (checks.check_size,),
}
"""For an anchor's operator: the schedules to try in order, before those for any region."""
GENERAL: tuple[Schedule, ...] = (general.schedule,)
"""Tried in order for every region that no schedule of its operator takes."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a region by the first schedule that applies, each in the form that GPUs run."""
    own = SCHEDULES.get(region.anchor.op, ()) if region.anchor is not None else ()
    for candidate in (*own, *GENERAL):
        lowered = candidate(region, target)
        if lowered is not None:
            return replace(lowered, calls=tuple(part for item in lowered.calls for part in _launchable(item)))
    return None


def _launchable(item: Call | BindSymbol | Repeated) -> Sequence[Call | BindSymbol | Repeated]:
    """Kernels that name no threads as launches of kernels that do."""
    if isinstance(item, BindSymbol):
        return [item]
    if isinstance(item, Repeated):
        return [replace(item, calls=tuple(part for call in item.calls for part in _launches(call)))]
    return _launches(item)


def _launches(call: Call) -> list[Call]:
    kernel = call.kernel
    if is_launchable(kernel):
        return [call]
    arguments = dict(zip((p.name for p in kernel.parameters), call.arguments, strict=True))
    sizes = dict(zip(kernel.sizes, call.sizes, strict=True))
    return [
        Call(part, tuple(arguments[p.name] for p in part.parameters), tuple(sizes[name] for name in part.sizes))
        for part in distribute(kernel)
    ]
