"""Live progress of a study on stderr: bars on a terminal, a few plain lines in a pipe."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moduli.study.records import RunRecord
from moduli.study.run import RunEvent
from moduli.study.spec import RunSpec
from moduli.study.wording import value
from moduli.training.kinds.base import get_kind

PIPE_SECONDS = 20.0


class StudyProgress:
    """A context manager whose `show` is an `on_event`.

    Args:
        console: where to draw.
        runs: how many runs there will be.
    """

    def __init__(self, console: Console, runs: int) -> None:
        self.console = console
        self.runs = runs
        self.number = 0
        self.said = 0.0
        self.bars: Progress | None = None
        if console.is_terminal:
            self.bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[now]}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self.bars is not None:
            self.bars.start()
            self.task = self.bars.add_task("", total=1, now="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def show(self, event: RunEvent) -> None:
        """Draw or print what happened."""
        if event.stage in ("known", "started"):
            self.number += 1
        elif event.stage == "failed" and not self.number:
            self.number = 1
        name = f"{self.number}/{self.runs} {self.title(event.spec)}"
        if event.stage in ("known", "finished", "failed"):
            self.console.print(f"{name}: {_outcome(event)}", soft_wrap=True)
        elif event.stage == "step":
            step = event.detail
            now = f"step {step.step}/{step.steps}, loss {step.loss:.3f}"
            self._now(name, now, step.step / step.steps, last=step.step == step.steps)
        elif event.stage == "evaluating":
            self._now(name, f"testing on {event.detail}", 1.0, last=False)
        elif event.stage == "started":
            self._now(name, "loading", 0.0, last=False)

    def say(self, line: str) -> None:
        """A step that belongs to no run."""
        self._now(line, "", 1.0, last=True)

    def title(self, spec: RunSpec) -> str:
        """What a run is called."""
        return f"{spec.method.name}, seed {spec.seed}"

    def _now(self, name: str, now: str, share: float, *, last: bool) -> None:
        if self.bars is not None:
            self.bars.update(self.task, description=name, now=now, completed=share)
        elif last or time.monotonic() - self.said > PIPE_SECONDS:
            self.said = time.monotonic()
            self.console.print(f"{name}: {now}" if now else name, soft_wrap=True)


def _outcome(event: RunEvent) -> str:
    detail: Any = event.detail
    if not isinstance(detail, RunRecord):
        return f"failed, {detail.error}: {detail.message}"
    domain = detail.spec.train_domain
    score = detail.scores.get(domain)
    metric = get_kind(detail.kind).primary
    unit = " %" if metric.share else f" {metric.title}"
    shown = f"{domain} {value(score[metric.name], metric)}{unit}" if score else "done"
    took = sum(detail.seconds.values())
    return f"{shown} ({'finished earlier' if event.stage == 'known' else f'{took:.0f} s'})"
