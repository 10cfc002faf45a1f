"""`quantize`: from a model in floats to one with integers."""

from __future__ import annotations

import os
from collections.abc import Iterator

from onnx import GraphProto, ModelProto, NodeProto

from ...compiler.nodes import graphs_in
from ..check.inputs import ports_of
from .calibrate import calibrate
from .data import Data, Samples
from .dynamic import Dynamic
from .folding import fold_batch_norms, fold_biases, fold_factors
from .graph import GraphDraft
from .model import Draft
from .places import Places, find_places, grids_of, refused_by_data
from .settings import QuantizationError, Settings, Summary
from .smoothing import smooth
from .static import Rewriter
from .transposed import split_transposed
from .weights_only import WeightsOnly

OPSETS = {"static": 13, "dynamic": 13, "int8": 13, "int4": 21}
"""The first opset that has what is written: DequantizeLinear per channel, or in blocks and of 4 bits."""
HALF_SCALES = 21
"""The first opset in which all of these have scales of 16 bits."""
STORED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")


def quantize(
    model: str | os.PathLike[str] | bytes | ModelProto,
    data: Data | None = None,
    output: str | os.PathLike[str] | None = None,
    **settings: object,
) -> ModelProto:
    """Quantises a model after training; the result is standard ONNX, and written to `output` if that is given.

    `data` is what the model is calibrated on: a file (.npz with arrays by the inputs' names, .npy), a folder of such
    files, "module:function", or a dict of arrays or an iterable of such dicts; a first axis that an input does not have
    is one of samples. It is needed unless `dynamic=True` or `weights_only="int4"` or "int8" is among the settings; the
    others are those of `tools.quantize.settings.Settings`. With data and `dynamic=True` all is calibrated but LSTM,
    whose ranges are only known at run time.
    Raises QuantizationError, an OnnxcError, for data that does not suit the model, and a model in which there is
    nothing to quantise; ModelError where it cannot be read.
    """
    draft, _ = quantised_draft(model, data, Settings(**settings))  # type: ignore[arg-type]
    if output is not None:
        draft.save(output)
    return draft.embedded()


def quantised_draft(
    model: str | os.PathLike[str] | bytes | ModelProto, data: Data | None, settings: Settings
) -> tuple[Draft, Summary]:
    """The quantised model, open still, and what became of its nodes."""
    if settings.kind == "static" and data is None:
        raise QuantizationError(
            "static quantization needs calibration data (--data); without any there are --dynamic and --weights-only"
        )
    settings.progress("reading", 0, None)
    halves = HALF_SCALES if settings.weights_only else None
    draft, summary = Draft(model, OPSETS[settings.kind], settings.folder, halves), Summary(settings.kind)
    summary.widened, summary.bytes_before = draft.widened, draft.original_size
    stored = next((node for node in _nodes(draft.graph) if node.op_type in STORED), None)
    if stored is not None:
        raise QuantizationError(
            f'the model is quantised already: node "{stored.name}" is a {stored.op_type}; give the float model'
        )
    draft.fold_constants()
    if data is not None and not settings.weights_only:
        summary.kind = "static"
        _static(draft, data, settings, summary)
        if settings.dynamic:
            Dynamic(draft, settings, summary, ("LSTM",)).run()
    else:
        settings.progress("quantising", 0, None)
        (Dynamic if settings.dynamic else WeightsOnly)(draft, settings, summary).run()
    _check(summary)
    draft.clean()
    summary.bytes_after = draft.size()
    return draft, summary


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph and of those inside it."""
    for node in graph.node:
        yield node
        for inner in graphs_in(node):
            yield from _nodes(inner)


def _static(draft: Draft, data: Data, settings: Settings, summary: Summary) -> None:
    draft.open_inner()
    graphs = list(draft.graphs())
    for graph in graphs:
        fold_biases(graph)
        fold_batch_norms(graph)
        fold_factors(graph)
        split_transposed(graph, settings)
        graph.clean()
    refused: dict[GraphDraft, dict[str, str]] = {}

    def found() -> dict[GraphDraft, Places]:
        summary.left.clear()
        return {graph: find_places(graph, settings, summary, refused.get(graph)) for graph in graphs}

    places = found()
    if not any(part.anchors for part in places.values()):
        return
    samples = Samples(
        data, ports_of(draft.graph, draft.constants), settings.samples, settings.seed, settings.batch or 1
    )
    known = calibrate(draft, {graph: part.channels for graph, part in places.items()}, samples, settings)
    summary.samples = samples.taken
    refused.update((graph, refused_by_data(graph, part, known[graph], settings)) for graph, part in places.items())
    if any(refused.values()):
        places = found()
    if settings.smooth and samples.again:
        smoothed = {graph: smooth(graph, part, known[graph], settings) for graph, part in places.items()}
        summary.smoothed = sum(map(len, smoothed.values()))
    if summary.smoothed:
        places = found()
        for graph, more in calibrate(draft, smoothed, samples, settings).items():
            known[graph] |= more
    settings.progress("quantising", samples.taken, samples.total)
    for graph, part in places.items():
        Rewriter(graph, part, grids_of(graph, part, known[graph], settings), known[graph], settings, summary).run()
    draft.attach()


def _check(summary: Summary) -> None:
    """QuantizationError where nothing was quantised."""
    if summary.quantised:
        return
    why = "; ".join(f'"{name}" ({operator}): {reason}' for name, operator, reason in summary.left[:3])
    what = {
        "static": "Conv, Gemm or MatMul",
        "dynamic": "Conv, MatMul, Gemm or LSTM",
        "int8": "MatMul, Gemm, Conv, LSTM, GRU or RNN",
    }
    raise QuantizationError(
        f"there is nothing to quantise: the model has no {what.get(summary.kind, 'MatMul or Gemm')} that can be"
        + (f": {why}" if why else "")
    )


__all__ = ["quantised_draft", "quantize"]
