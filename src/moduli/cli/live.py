"""A study while it runs, on stderr: a live table on a terminal, a few plain lines in a pipe."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moduli.cli.output import table
from moduli.study.compare import Study
from moduli.study.evidence import run_label
from moduli.study.records import RunRecord
from moduli.study.run import RunEvent
from moduli.study.wording import duration, value
from moduli.training.kinds.base import get_kind

PIPE_SECONDS = 20.0


class StudyProgress:
    """A context manager whose `show` is an `on_event`.

    Args:
        console: where to draw.
        study: its plan, with what is finished already.
    """

    def __init__(self, console: Console, study: Study) -> None:
        self.console = console
        self.study = study
        self.arm_of = {run.spec.key: run.arm for run in study.runs}
        self.known = set(study.records)
        self.records = dict(study.records)
        self.ended = set(study.records)  # finished here or before, or failed
        self.said = 0.0
        self.line, self.now, self.share = "", "", 0.0
        self.live: Live | None = None
        if console.is_terminal:
            self.live = Live(
                get_renderable=self.render, console=console, refresh_per_second=4, transient=True
            )

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, event: RunEvent) -> None:
        """Draw or print what happened."""
        key = event.spec.key
        if event.stage in ("known", "finished", "failed"):
            self.ended.add(key)
            if isinstance(event.detail, RunRecord):
                self.records[key] = event.detail
        name = run_label(self.study, event.spec)
        if event.stage in ("finished", "failed") or (event.stage == "known" and self._alone()):
            count = f"{len(self.ended)}/{len(self.arm_of)}"
            self.console.print(f"{count} {name}: {_outcome(event)}", soft_wrap=True)
        elif event.stage == "step":
            step = event.detail
            now = f"step {step.step}/{step.steps}, loss {step.loss:.3f}"
            self._now(name, now, step.step / step.steps, last=step.step == step.steps)
        elif event.stage == "evaluating":
            self._now(name, f"testing on {event.detail}", 1.0, last=False)
        elif event.stage == "started":
            self._now(name, "loading", 0.0, last=False)
        elif event.stage == "elsewhere":
            self._now(name, "in the hands of another process", 0.0, last=False)

    def say(self, line: str) -> None:
        """A step that belongs to no run."""
        self._now(line, "", 1.0, last=True)

    def remaining(self) -> float | None:
        """Seconds that are left, by the runs of each method that are finished; None if unknown."""
        left = [arm for key, arm in self.arm_of.items() if key not in self.ended]
        took = {arm: self._seconds(arm) for arm in set(self.arm_of.values())}
        measured = [seconds for seconds in took.values() if seconds is not None]
        if not measured:
            return None
        usual = math.fsum(measured) / len(measured)
        return math.fsum(usual if took[arm] is None else float(took[arm] or 0) for arm in left)

    def render(self) -> RenderableType:
        """The table of methods, the run in flight, and what is left."""
        left = self.remaining()
        now = Table.grid(padding=(0, 1))
        now.add_row(
            Text(self.line, style="bold"),
            ProgressBar(total=1.0, completed=self.share, width=24),
            Text(self.now),
        )
        total = f"{len(self.ended)} of {len(self.arm_of)} runs"
        about = "" if left is None else f", about {duration(left)} left"
        parts: list[RenderableType] = [now, Text(total + about, style="dim")]
        if not self._alone():
            parts.insert(0, self._table())
        return Group(*parts)

    def _table(self) -> Table:
        rows = []
        metric = self.study.kind.primary
        for arm, label in enumerate(self.study.plan.labels):
            keys = [key for key, owner in self.arm_of.items() if owner == arm]
            records = [self.records[key] for key in keys if key in self.records]
            inside, outside = _means(records, metric.name)
            seconds = self._seconds(arm)
            rows.append(
                (
                    label,
                    f"{len(records)}/{len(keys)}",
                    *("" if one is None else value(one, metric) for one in (inside, outside)),
                    "" if seconds is None else duration(seconds),
                )
            )
        return table((metric.title, "runs", "in-domain", "out-of-dom.", "a run"), rows)

    def _seconds(self, arm: int) -> float | None:
        """Mean seconds of the finished runs of a method; rather those of this process."""
        keys = [key for key, owner in self.arm_of.items() if owner == arm and key in self.records]
        own = [key for key in keys if key not in self.known] or keys
        if not own:
            return None
        return math.fsum(sum(self.records[key].seconds.values()) for key in own) / len(own)

    def _alone(self) -> bool:
        return len(self.arm_of) == 1

    def _now(self, name: str, now: str, share: float, *, last: bool) -> None:
        self.line, self.now, self.share = name, now, share
        if self.live is None and (last or time.monotonic() - self.said > PIPE_SECONDS):
            self.said = time.monotonic()
            left = self.remaining()
            about = "" if left is None or not now else f" (about {duration(left)} left)"
            self.console.print(f"{name}: {now}{about}" if now else name, soft_wrap=True)


def _means(records: list[RunRecord], metric: str) -> tuple[float | None, float | None]:
    """Mean score of runs on the domains they were trained on, and on the others."""
    inside: list[float] = []
    outside: list[float] = []
    for record in records:
        for domain, score in record.scores.items():
            (inside if domain in record.spec.train_domains else outside).append(score[metric])
    return _mean(inside), _mean(outside)


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _outcome(event: RunEvent) -> str:
    detail: Any = event.detail
    if not isinstance(detail, RunRecord):
        return f"failed, {detail.error}: {detail.message}"
    metric = get_kind(detail.kind).primary
    unit = " %" if metric.share else f" {metric.title}"
    named = ("in-domain", "out of domain")
    shown = [
        f"{value(one, metric)}{unit} {where}"
        for one, where in zip(_means([detail], metric.name), named, strict=True)
        if one is not None
    ]
    took = duration(sum(detail.seconds.values()))
    when = "finished earlier" if event.stage == "known" else took
    return f"{', '.join(shown) or 'done'} ({when})"
