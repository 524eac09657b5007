"""The optimiser step of a Trainer, for gating dropout."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from moduli.parallel.apply import AttachedGatingDropout


class GatingDropoutCallback(TrainerCallback):
    """Calls `set_step` before every optimiser step, once for all its micro-batches."""

    def __init__(self, attached: AttachedGatingDropout) -> None:
        self.attached = attached

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """`global_step` counts the steps that are done, those before a resume included."""
        self.attached.set_step(state.global_step)
