"""One thing that takes long, on stderr: a bar on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PIPE_SECONDS = 20.0


class StepProgress:
    """A context manager whose `show` takes what `finetune` says after each step.

    Args:
        console: where to draw.
        what: is being done.
    """

    def __init__(self, console: Console, what: str) -> None:
        self.console, self.what = console, what
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}, loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(what, visible=False, loss=0.0)
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
        self.bar.update(self.task, completed=now.step, total=now.steps, loss=now.loss, visible=True)
        clock = time.monotonic()
        if not self.started:  # a resumed run begins at a later step
            self.started, self.first = clock, now.step
        if self.console.is_terminal:
            return
        if now.step == now.steps or clock - self.said > PIPE_SECONDS:
            self.said = clock
            done = now.step - self.first
            left = (clock - self.started) / done * (now.steps - now.step) if done else 0.0
            about = f" (about {left:.0f} s left)" if left else ""
            line = f"{self.what}: step {now.step}/{now.steps}, loss {now.loss:.3f}{about}"
            self.console.print(line, soft_wrap=True)
