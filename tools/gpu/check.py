"""The whole check: everything that can be is prepared in parallel from the start on, the GPU is used by one process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bench_kernels import RESNET50
from . import models, operators, shapes, speed, whole
from .architectures import ARCHITECTURES, LARGE, Architecture
from .budget import Budget
from .operators import Case
from .peers import warmed, why_not
from .processes import Pool, Process, TaskError
from .report import Report, machine_facts

TUNING = 400.0
"""Seconds after which torch.compile is taken to hang."""
BETWEEN = 5.0
"""Seconds between reports that are written while a part goes on."""


@dataclass(frozen=True)
class Effort:
    """How long is measured: rounds, seconds of each; bytes of a copy, rows of a square product."""

    rounds: int = 15
    seconds: float = 0.01
    copy_bytes: int = 1 << 30
    product_size: int = 8192


def all_operators() -> list[shapes.Operator]:
    """What is measured in part 3, the most telling first."""
    precisions = ("f16", "bf16", "tf32", "f32")
    return [
        *(operator for precision in precisions for operator in shapes.products(precision, shapes.PRODUCTS[:1])),
        *shapes.memory_bound(),
        *shapes.attentions(),
        *shapes.convolutions(RESNET50, 1),
        *(operator for precision in precisions for operator in shapes.products(precision, shapes.PRODUCTS[1:])),
        *shapes.convolutions(RESNET50, 32),
    ]


def networks() -> list[models.Subject]:
    """What is timed in part 4."""
    large = LARGE.values()
    return [models.Subject(a.name, "", a, batch, ("f16",), True) for batch in (1, 32) for a in large]


@dataclass(frozen=True)
class Plan:
    """What is checked. `cases` makes those of part 1; `setup` ("module:function") is called first in every process."""

    folders: Sequence[str] = ()
    cases: Callable[[], Sequence[Case]] = operators.node_cases
    architectures: Sequence[Architecture] = tuple(ARCHITECTURES)
    operators: Callable[[], Sequence[shapes.Operator]] = all_operators
    networks: Callable[[], Sequence[models.Subject]] = networks
    effort: Effort = field(default_factory=Effort)
    jobs: int = 0
    setup: str = ""

    @property
    def processes(self) -> int:
        """How many compile: as many as there are processors but two, which run and tune."""
        return self.jobs or max(1, len(os.sched_getaffinity(0)) - 2)


@dataclass
class Check:
    """One run of all parts, as they see it."""

    plan: Plan
    budget: Budget
    report: Report
    target: Any
    pool: Pool
    gpu: Process
    scratch: Path
    print: Callable[[str], None]
    limits: Mapping[str, float] = field(default_factory=dict)
    written: float = 0.0

    @property
    def effort(self) -> Effort:
        return self.plan.effort

    def path(self, name: str) -> str:
        """Of a file that is deleted in the end."""
        return str(self.scratch / name)

    def say(self, line: str) -> None:
        """Tells how far it is, and writes what is known by now if that was last done long ago."""
        self.print(line)
        if self.budget.seconds > self.written + BETWEEN:
            self.written = self.budget.seconds
            self.report.write(self.written)

    def on_gpu(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        """What the function gives in the process that has the GPU. Raises TaskError where it fails or hangs,
        TimeoutError where it was ended because all time is over."""
        left = self.budget.left
        try:
            return self.gpu.call(function, *arguments, timeout=min(timeout, left))
        except TaskError as error:
            if error.kind == "Timeout" and left < timeout:
                raise TimeoutError("no time was left") from error
            raise

    def shortened(self, part: str, why: str) -> None:
        """Notes that a part has not done all it should."""
        content = self.report.part(part)
        content["state"] = "shortened"
        content["notes"].append(why)

    def part(self, name: str, run: Callable[[], None]) -> None:
        """Runs a part and writes the report; what goes wrong in it ends only this part."""
        self.say(f"{name}:")
        content = self.report.part(name)
        start = self.budget.seconds
        try:
            if not self.budget.part(name).left:
                content["state"] = "skipped"
                content["notes"].append("no time was left")
            else:
                run()
        except Exception as error:
            content["state"] = "failed"
            content["notes"].append(f"{type(error).__name__}: {error}")
        content["seconds"] = round(self.budget.seconds - start, 1)
        self.report.write(self.budget.seconds)


def facts() -> tuple[dict[str, Any], Any, str]:
    """What is told of the machine, its target, and why PyTorch cannot take part, if it cannot."""
    from ...compiler.compiled import here
    from ...compiler.options import resolve_target

    return machine_facts(), here(resolve_target("cuda")), why_not()


def run(plan: Plan, output: Path, minutes: float, say: Callable[[str], None] = lambda line: None) -> Report:
    """All parts. Raises TaskError where there is no GPU that can be used."""
    budget = Budget.of(minutes)
    with (
        tempfile.TemporaryDirectory(prefix="onnxc-gpu-") as scratch,
        Pool(plan.processes, plan.setup) as pool,
        Pool(1, plan.setup) as tuner,
        Process(plan.setup) as gpu,
    ):
        machine, target, no_torch = gpu.call(facts, timeout=120)
        report = Report.begun(output, minutes, machine)
        check = Check(plan, budget, report, target, pool, gpu, Path(scratch), say)
        if no_torch:
            report.content["notes"].append(no_torch)
        report.write(budget.seconds)
        _all_parts(check, tuner, bool(no_torch))
        report.write(budget.seconds, complete=True)
        return report


def _all_parts(check: Check, tuner: Pool, no_torch: bool) -> None:
    plan, pool = check.plan, check.pool
    timed = [(subject, _ready(check, subject, f"timed{n}", 0)) for n, subject in enumerate(plan.networks())]
    tuned: dict[tuple[str, int], Future[dict[str, float]]] = {}
    if not no_torch:
        for subject, _ in timed:
            if subject.architecture is not None and not subject.missing:
                task = tuner.submit(warmed, subject.architecture, subject.batch, timeout=TUNING)
                tuned[subject.name, subject.batch] = task
    subjects = models.subjects_of(plan.folders, plan.architectures)
    compared = {_ready(check, subject, f"model{n}", 3): subject for n, subject in enumerate(subjects)}
    measured = speed.submitted(check, plan.operators(), 2)
    cases = operators.submitted(check, plan.cases(), 1)
    check.part("operators", lambda: operators.check_operators(check, cases))
    check.part("models", lambda: models.check_models(check, compared))
    # From here on the machine is quiet: what is not ready by now is left out.
    prepared: list[Future[Any]] = [*(future for _, future in timed), *(future for _, future in measured)]
    wait([*prepared, *tuned.values()], check.budget.part("models").left)
    tuner.close()
    pool.close()
    check.part("speed", lambda: speed.check_speed(check, measured))
    check.part("whole", lambda: whole.check_whole(check, timed, tuned))


def _ready(check: Check, subject: models.Subject, stem: str, priority: int) -> Future[models.Ready]:
    if subject.missing:
        future: Future[models.Ready] = Future()
        future.set_exception(TaskError(models.NotComparable.__name__, subject.missing))
        return future
    arguments = (subject, check.target, check.path(stem))
    return check.pool.submit(models.ready, *arguments, timeout=models.PREPARING, priority=priority)
