"""Which schedule makes the kernels of a region on a CPU."""

from __future__ import annotations

from collections.abc import Mapping

from ...ir.errors import UnsupportedError
from ...ir.target import Target
from ...passes.generic import generic
from ...passes.regions import Lowered, Region, Schedule
from ..kernels import append, checks, detection, determinant, fourier, scan, scatter, selection, trees
from .kernels import (
    attention,
    conv,
    depthwise,
    gemm,
    integer_conv,
    integer_depthwise,
    integer_gemm,
    integer_winograd,
    pair_conv,
    pair_depthwise,
    pair_gemm,
    recurrent,
    recurrent_integers,
    upsampling,
    weight_only,
    widened_gemm,
    winograd,
)

PRODUCTS: tuple[Schedule, ...] = (pair_gemm.schedule, widened_gemm.schedule, gemm.schedule)
SCHEDULES: Mapping[str, tuple[Schedule, ...]] = {
    **dict.fromkeys(("MatMul", "Gemm", "com.microsoft.FusedMatMul", "Einsum"), PRODUCTS),
    "onnxc.PackedMatMul": (weight_only.schedule,),
    "onnxc.Attention": (attention.schedule,),
    "onnxc.Append": (append.schedule,),
    "Conv": (
        pair_gemm.schedule,
        winograd.schedule,
        widened_gemm.schedule,
        gemm.schedule,
        pair_depthwise.schedule,
        depthwise.schedule,
        pair_conv.schedule,
        conv.schedule,
    ),
    "ConvInteger": (
        integer_gemm.in_place,
        integer_depthwise.schedule,
        integer_winograd.schedule,
        integer_conv.schedule,
        integer_gemm.schedule,
    ),
    **dict.fromkeys(("MatMulInteger", "QLinearMatMul"), (integer_gemm.schedule,)),
    "ConvTranspose": (pair_conv.transposed, upsampling.schedule, conv.transposed),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (recurrent.schedule,)),
    "com.microsoft.DynamicQuantizeLSTM": (recurrent_integers.schedule, recurrent.schedule),
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
    "onnxc.TreeEnsemble": (trees.schedule,),
    "onnxc.CheckIndex": (checks.check_index,),
    "onnxc.CheckSize": (checks.check_size,),
}
"""For an anchor's operator: the schedules to try in order, before the generic loop nest."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a region by the first schedule that applies."""
    if region.anchor is not None:
        for candidate in SCHEDULES.get(region.anchor.op, ()):
            lowered = candidate(region, target)
            if lowered is not None:
                return lowered
    return generic(region, target)


__all__ = ["SCHEDULES", "UnsupportedError", "schedule"]
