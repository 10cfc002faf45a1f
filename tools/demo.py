"""The demo: a residual CNN for handwritten digits, compiled and run on images that it was not trained on.

`train_digits.py` made digits.onnx and digits.npz beside this file.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from ..compiler.driver import compile_graph, graph_of, program_of
from ..compiler.options import Options, resolve_target
from ..ir.program import Run, walk
from .plan_view import bytes_text

FILES = Path(__file__).parent
SHADES = " .:-=+*#%@"
INK = 16
"""The darkest pixel."""
LEAST_SECONDS = 0.2
"""A time is measured over at least so many seconds of calls."""


@dataclass(frozen=True)
class Facts:
    """What the demo measures. Seconds are per image; `kernels` pairs each kernel that runs with its ONNX nodes."""

    images: int
    correct: int
    shown: int
    label: int
    prediction: int
    confidence: float
    compile_seconds: float
    single_seconds: float
    batch_seconds: float
    kernels: tuple[tuple[str, tuple[str, ...]], ...]
    arena_bytes: int
    lower_bound_bytes: int
    arena_batch: int


def digits() -> dict[str, NDArray[np.float32]]:
    """The held-out images by the name of the model's input, [359, 1, 8, 8]: also what to calibrate on."""
    with np.load(FILES / "digits.npz") as held_out:
        return {"image": held_out["images"][:, None].astype(np.float32)}


def picture(image: NDArray[np.uint8]) -> list[str]:
    """An image [height, width] of 0..INK as lines of characters, two for a pixel."""
    return ["".join(2 * SHADES[int(pixel) * (len(SHADES) - 1) // INK] for pixel in row) for row in image]


def seconds_of(call: Callable[[], object]) -> float:
    """The median time of a call."""
    times: list[float] = []
    while sum(times) < LEAST_SECONDS:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def measure(shown: int = 0) -> tuple[Facts, NDArray[np.uint8]]:
    """Compiles the model and runs it on all held-out images; the facts, and the image of the given number."""
    held_out = np.load(FILES / "digits.npz")
    images, labels = held_out["images"], held_out["labels"]
    at = shown % len(images)
    start = time.perf_counter()
    target, options = resolve_target(None), Options()
    graph = graph_of(FILES / "digits.onnx", options)
    model = compile_graph(graph, target, options)
    compile_seconds = time.perf_counter() - start
    program = program_of(graph, target)
    plan = model.plan

    inputs = images[:, None].astype(np.float32)
    one = inputs[at : at + 1]
    probabilities, single = model(inputs), model(one)
    steps = walk(step for segment in program.segments for step in segment)
    facts = Facts(
        images=len(images),
        correct=int((probabilities.argmax(1) == labels).sum()),
        shown=at,
        label=int(labels[at]),
        prediction=int(single[0].argmax()),
        confidence=float(single[0].max()),
        compile_seconds=compile_seconds,
        single_seconds=seconds_of(lambda: model(one)),
        batch_seconds=seconds_of(lambda: model(inputs)) / len(images),
        kernels=tuple((step.kernel, step.origin) for step in steps if isinstance(step, Run)),
        arena_bytes=plan.arena_bytes,
        lower_bound_bytes=plan.lower_bound,
        arena_batch=plan.sizes["batch"],
    )
    return facts, images[at]


def show(shown: int, as_json: bool) -> None:
    """Runs the demo and prints it."""
    facts, image = measure(shown)
    if as_json:
        click.echo(json.dumps(asdict(facts), indent=2))
        return
    print_facts(facts, image)


def print_facts(facts: Facts, image: NDArray[np.uint8]) -> None:
    """The demo as a person sees it."""
    echo = click.echo
    echo(f"Compiled digits.onnx, a residual CNN, in {facts.compile_seconds:.2f} s.\n")
    for line in picture(image):
        echo(f"    {line}")
    verdict = "right" if facts.prediction == facts.label else f"wrong: it is {facts.label}"
    answer = f"the model says {facts.prediction}, {facts.confidence:.1%} sure"
    echo(f"\nHeld-out image {facts.shown}: {answer}, which is {verdict}.")
    share = facts.correct / facts.images
    echo(f"All {facts.images} held-out images: {facts.correct} right ({share:.1%}).")
    single, batch = 1e6 * facts.single_seconds, 1e6 * facts.batch_seconds
    echo(f"Time per image: {single:.1f} us one at a time, {batch:.1f} us in one batch of all.\n")
    nodes = sum(len(origin) for _, origin in facts.kernels)
    echo(f"{nodes} ONNX nodes became {len(facts.kernels)} kernels:")
    width = max(len(name) for name, _ in facts.kernels)
    for name, origin in facts.kernels:
        echo(f"    {name:{width}}  {' + '.join(origin)}")
    echo(
        f"\nArena for a batch of {facts.arena_batch}: {bytes_text(facts.arena_bytes)}, "
        f"lower bound {bytes_text(facts.lower_bound_bytes)}.\n"
        "Next: onnxc dump, onnxc plan and onnxc run on a model of yours; onnxc --help lists all."
    )
