"""What finetuning hangs into the stock Trainer: progress, a guard against NaN, a soft Ctrl-C.

They are ordinary `TrainerCallback`s and work in anybody's `Trainer(callbacks=[...])`.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from moduli.allocator import release_growth
from moduli.errors import TrainingError


@dataclass(frozen=True)
class Progress:
    """One optimiser step done: `step` of `steps`, and the loss of that step."""

    step: int
    steps: int
    epoch: float
    loss: float
    learning_rate: float


class ReportProgress(TrainerCallback):
    """Calls `on_progress(Progress)` after every step (needs `logging_steps=1`)."""

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        self.on_progress = on_progress

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Turn the Trainer's log line of a step into a `Progress`."""
        if logs is not None and "loss" in logs:
            self.on_progress(
                Progress(
                    step=state.global_step,
                    steps=state.max_steps,
                    epoch=float(state.epoch or 0.0),
                    loss=logs["loss"],
                    learning_rate=logs["learning_rate"],
                )
            )


class ReleaseGrowth(TrainerCallback):
    """Keeps the process from growing with every step; see `moduli.allocator`."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Between two steps nothing large is in use."""
        release_growth()


class KeepLayout(TrainerCallback):
    """Puts the config of the model beside an adapter, whose checkpoint has none by itself.

    The order of neurons is in it, by which a checkpoint of another model is told apart.
    """

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """A checkpoint of the whole model has its config already."""
        if hasattr(model, "peft_config"):
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "config.json"
            # By one rename: the checkpoint counts as complete already, so half a file would be
            # read as its config by the run that goes on.
            partial = path.with_name(f".{path.name}")
            model.config.to_json_file(partial)
            os.replace(partial, path)


class StopOnNonFinite(TrainerCallback):
    """Raises `TrainingError` when the gradient or the loss is no longer finite.

    The gradient is checked before the optimiser acts on it, so the weights in memory are those of
    the last good step. The loss is checked when it is logged, which needs `logging_steps=1` and
    `logging_nan_inf_filter=False`: by default the Trainer replaces a NaN in its log by the running
    mean, and nobody sees it.
    """

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """One norm over all gradients: a few milliseconds beside the backward pass."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients:
            return
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            rate = kwargs["lr_scheduler"].get_last_lr()[0]
            raise TrainingError(_where(f"The gradient norm became {norm}", state, rate, offset=1))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """A loss can be infinite while its gradient is finite (clamped or saturated)."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            assert logs is not None
            raise TrainingError(_where(f"The loss became {loss}", state, logs["learning_rate"]))


def _where(what: str, state: Any, rate: float, offset: int = 0) -> str:
    return (
        f"{what} at step {state.global_step + offset} of {state.max_steps} "
        f"(epoch {float(state.epoch or 0.0):.2f}, learning rate {rate:.3g})"
    )


class StopWhenAsked(TrainerCallback):
    """Once `event` is set, the step in flight ends, a checkpoint is written, training stops."""

    def __init__(self, event: threading.Event, *, save: bool) -> None:
        self.event = event
        self.save = save

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Between two steps, where weights, optimiser and random state belong together."""
        if self.event.is_set():
            control.should_training_stop = True
            control.should_save = self.save


@contextmanager
def soft_interrupt() -> Iterator[threading.Event]:
    """While inside, the first Ctrl-C sets the event and the second interrupts as usual.

    Does nothing outside the main thread and where somebody else handles SIGINT already.
    """
    event = threading.Event()
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )

    def handle(signum: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    if ours:
        signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
