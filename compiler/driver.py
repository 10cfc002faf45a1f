"""From a model to an executable: import, passes, lowering, code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import onnx

from ..ir.dtypes import BOOL
from ..ir.errors import HostNeeded, LimitError, ModelError, OnnxcError, UnsupportedError, ValueNeeded
from ..ir.graph import Graph
from ..ir.loops import Kernel
from ..ir.program import Program
from ..ir.target import Target
from ..ir.text import print_graph
from ..passes import PIPELINES
from ..passes.append import donations, with_donations
from ..passes.fuse import Fuse
from ..passes.lower import lower
from ..passes.pipeline import Pass, parse_pipeline, run_pipeline
from ..passes.precision import Precision
from ..passes.quantization import Quantization
from ..passes.regions import Schedule
from ..passes.unsigned_bytes import UnsignedBytes
from .cache import ModelCache
from .compiled import Compiled, here
from .deferred import Deferred
from .graph_text import specialised
from .importer import import_model
from .interface import Interface
from .limits import check_program, limit_of
from .loading import executable_of, loaded
from .options import Model, Options, resolve_target, target_of
from .pages import MappedFiles, aligned, room_for
from .specialize import SpecializingExecutable, load_proto


def imported(model: Model, options: Options) -> Graph:
    """The graph before any pass, of the sizes that the options give, donated inputs written in place."""
    graph = _imported(model, options)
    if not options.donate:
        return graph
    if resolve_target(options.target).kind == "cuda":
        raise UnsupportedError("inputs can be donated on CPUs only")
    # What only reads the size of a cache is a constant or an expression by then.
    return with_donations(run_pipeline(graph, parse_pipeline("canonicalize,fold,cleanup")), options.donate)


def _imported(model: Model, options: Options) -> Graph:
    if isinstance(model, Graph):
        return specialised(model, options.dims or {}, options.shapes or {})
    return import_model(
        model,
        dims=options.dims,
        shapes=options.shapes,
        folder=options.folder,
        smallest=options.smallest,
        max_memory=limit_of(options.max_memory),
    )


def graph_of(model: Model, options: Options) -> Graph:
    """The graph after all passes of the pipeline."""
    return passed(imported(model, options), options)


def passed(graph: Graph, options: Options) -> Graph:
    """The graph after all passes of the pipeline, each told to the options' callbacks."""
    passes = passes_of(options)
    done = count(1)

    def after(item: Pass, result: Graph, seconds: float) -> None:
        if options.progress is not None:
            options.progress(item.name, next(done), len(passes))
        if options.after is not None:
            options.after(item, result, seconds)

    return run_pipeline(graph, passes, after)


def passes_of(options: Options) -> tuple[Pass, ...]:
    """The passes to run: those asked for, else the target's, and what narrow precision needs behind fusion."""
    target = target_of(options)
    passes = list(parse_pipeline(options.pipeline or PIPELINES[target.kind]))
    if "dot4_u8_i8" not in target.dot_products or "dot4_i8_i8" in target.dot_products:
        passes = [item for item in passes if not isinstance(item, UnsignedBytes)]
    if options.exact:
        passes = [replace(item, exact=True) if isinstance(item, Quantization) else item for item in passes]
    if options.precision in ("f16", "bf16") and not any(isinstance(item, Precision) for item in passes):
        fusions = [position for position, item in enumerate(passes) if isinstance(item, Fuse)]
        # What CPUs read and write of a residual takes little of the time of the products beside it.
        sums = "wide" if target.kind == "cpu" else "narrow"
        passes.insert(fusions[-1] + 1 if fusions else len(passes), Precision(options.precision, sums=sums))
    return tuple(passes)


def program_of(
    graph: Graph,
    target: Target,
    hints: Mapping[str, int] | None = None,
    tell: Callable[[str, Kernel], None] | None = None,
) -> Program:
    """The program of a graph that all passes have seen; `tell` is given its kernels as they come."""
    return lower(graph, schedule_of(target), target, hints, tell)


def schedule_of(target: Target) -> Schedule:
    """What makes the kernels for a kind of target."""
    if target.kind == "cuda":
        from ..backends.cuda.schedules import schedule as for_gpus

        return for_gpus
    from ..backends.cpu.schedules import schedule as for_cpus

    return for_cpus


def constants_of(
    program: Program, large_pages: bool = False, files: MappedFiles | None = None
) -> tuple[Program, dict[str, np.ndarray]]:
    """The program without its constants, and their arrays in the form that the code reads, packed where a schedule
    wants it. Where the caller keeps neither graph nor program, the model's arrays go as their packed forms come, and
    what was read of `files`.
    """
    found: dict[str, np.ndarray] = {}
    sizes = {name: size for name in program.constants if isinstance(size := program.memories[name].bytes, int)}
    pages = room_for([*sizes.values()]) if large_pages and len(sizes) == len(program.constants) else None
    # The largest come first: what packing them takes beside its result is taken while little else is there.
    waiting = dict(sorted(program.constants.items(), key=lambda item: sizes.get(item[0], 0)))
    program = replace(program, constants={})
    while waiting:
        name, make = waiting.popitem()
        array = make() if not large_pages else aligned(make()) if pages is None else pages.put(make())
        found[name] = array.view(np.uint8) if program.memories[name].dtype == BOOL and array.dtype == bool else array
        if files is not None:
            files.used(array.nbytes)
    return program, found


def compile_model(model: Model, options: Options) -> Interface | Deferred:
    """Compiles a model for this process; one in which values of inputs decide axes is compiled when they are known, and
    of one that has text or sequences of unknown length the parts between the steps that Python runs."""
    options = replace(options, target=here(resolve_target(options.target)))

    def executable(model: Model, options: Options) -> Interface:
        def make() -> Compiled:
            return _compiled_model(model, options)

        compiled = ModelCache.default().compiled(model, options, make)
        return executable_of(compiled, model, options)

    try:
        return executable(model, options)
    except ValueNeeded as error:
        if isinstance(model, Graph):
            raise
        proto, folder = load_proto(model)
        within = replace(options, folder=folder)

        def compile_values(
            known: onnx.ModelProto, shapes: Mapping[str, Sequence[int | None]], smallest: int
        ) -> Interface:
            return executable(known, replace(within, shapes={**(within.shapes or {}), **shapes}, smallest=smallest))

        return SpecializingExecutable(proto, compile_values, str(error), partial(_for_host, model, options))
    except HostNeeded as error:
        return _for_host(model, options, error)


def _for_host(model: Model, options: Options, reason: HostNeeded | ValueNeeded) -> Deferred:
    """The model divided between Python and compiled code, or into parts behind values that decide the code.

    Raises `reason` where there is nothing to divide.
    """
    if isinstance(model, Graph):
        raise reason
    from .host.executable import HostExecutable  # it needs ONNX's reference, which takes long to import

    proto, folder = load_proto(model)
    within = replace(options, folder=options.folder or folder)
    try:
        return HostExecutable(proto, within, compile_model, imported, reason)
    except (OnnxcError, MemoryError):
        raise
    except RecursionError as error:
        raise ModelError("graphs are nested too deeply") from error
    except Exception as error:  # a malformed model reached code that trusts its input
        raise ModelError(f"the model is malformed ({type(error).__name__}: {error})") from error


def compiled_model(model: Model, options: Options) -> Compiled:
    """Code and weights of a model for the target of the options, which need not be this machine.

    Raises ValueNeeded for a model in which values of inputs decide axes, UnsupportedError naming the nodes for one that
    Python has to run in part.
    """
    try:
        return _compiled_model(model, options)
    except HostNeeded as error:
        return _for_host(model, options, error).compiled


def _compiled_model(model: Model, options: Options) -> Compiled:
    target = target_of(options)
    try:
        graphs = [imported(model, options)]
        texts = {"import": print_graph(graphs[0])}
        donated = donations(graphs[0])
        graphs.append(passed(graphs.pop(), options))
        return replace(compiled_graph(graphs.pop(), target, options, texts), donated=donated)
    except RecursionError as error:
        raise LimitError("the model's expressions are nested too deeply to be compiled") from error
    except MemoryError as error:
        raise LimitError("compiling the model takes more memory than there is") from error


def compile_graph(graph: Graph, target: Target, options: Options) -> Interface:
    """Compiles a graph that all passes have seen, for this process."""
    return loaded(compiled_graph(graph, target, options, {}), options.threads, options.max_memory)


def compiled_graph(graph: Graph, target: Target, options: Options, texts: Mapping[str, str]) -> Compiled:
    """Code and weights of a graph that all passes have seen; `texts` are the stages before it that are kept."""
    texts = {**texts, "graph": print_graph(graph)}
    files = MappedFiles(handle.array for handle in graph.constants.values())
    graphs, most = [graph], limit_of(options.max_memory)
    del graph
    report = options.progress
    progress = None if report is None else partial(report, "kernels")
    if target.kind == "cuda":
        from ..backends.cuda.build import build as build_for_gpu

        programs = [program_of(graphs.pop(), target)]
        check_program(programs[0], most)
        bare = replace(programs[0], constants={})
        _, constants = constants_of(programs.pop(), files=files)
        return Compiled.of_gpu(build_for_gpu(bare, target, progress=progress), constants, texts)
    from ..backends.cpu.build import Building

    # Packing is numpy's work and the memory's, building the interpreter's and that of other processes.
    with Building(target, progress=progress) as building, ThreadPoolExecutor(1) as pool:
        programs = [program_of(graphs.pop(), target, tell=building.add)]
        check_program(programs[0], most)
        built = pool.submit(building.finish, replace(programs[0], constants={}))
        _, constants = constants_of(programs.pop(), True, files)
        return Compiled.of(built.result(), constants, texts)
