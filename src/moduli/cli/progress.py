"""One thing that takes long, on stderr: a bar on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from moduli.study.wording import duration

PIPE_SECONDS = 20.0


class StepProgress:
    """A context manager whose `show` takes what `finetune` says after each step.

    Args:
        console: where to draw.
        what: is being done.
        unit: what is counted.
    """

    def __init__(self, console: Console, what: str, unit: str = "step") -> None:
        self.console, self.what, self.unit = console, what, unit
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(unit + " {task.completed}/{task.total}{task.fields[more]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(what, visible=False, more="")
        self.started, self.said, self.first = 0.0, 0.0, 0

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def note(self, line: str) -> None:
        """A part of the work that has no steps."""
        self.console.print(line, style="dim", soft_wrap=True)

    def show(self, now: Any) -> None:
        """A `moduli.training.callbacks.Progress`."""
        self.count(now.step, now.steps, f", loss {now.loss:.3f}")

    def count(self, done: int, total: int, more: str = "") -> None:
        """So many are done; `more` is said behind that."""
        self.bar.update(self.task, completed=done, total=total, more=more, visible=done < total)
        clock = time.monotonic()
        if not self.started:  # a resumed run begins at a later step
            self.started, self.first = clock, done
        if self.console.is_terminal:
            return
        if done == total or clock - self.said > PIPE_SECONDS:
            self.said = clock
            since = done - self.first
            left = (clock - self.started) / since * (total - done) if since else 0.0
            about = f" (about {duration(left)} left)" if left else ""
            line = f"{self.what}: {self.unit} {done}/{total}{more}{about}"
            self.console.print(line, soft_wrap=True)
