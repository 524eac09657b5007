"""A stock `Trainer` does not resume a model into the neuron order of another one.

Loading a checkpoint whose neurons are in another order would mix up experts without any error,
since all shapes agree. `moduli.training.finetune` checks its own checkpoints; for a bare
`transformers.Trainer` the method that loads weights on `resume_from_checkpoint` is wrapped, once,
when the first model is converted, never at import. Models and checkpoints without a layout pass
through unchanged. A checkpoint that holds an adapter only has no layout to compare.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

from moduli.surgery.convert import require_same_layout

_MARK = "_moduli_guards_resume"


def guard_trainer_resume() -> None:
    """From now on `Trainer.train(resume_from_checkpoint=...)` compares the order of neurons.

    Where they differ it raises `CheckpointError` before any weight is loaded. Calling this again
    changes nothing.
    """
    from transformers import Trainer

    original = Trainer._load_from_checkpoint
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def load(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if (checkpoint / "config.json").is_file():
            require_same_layout(self.model, checkpoint)
        original(self, resume_from_checkpoint, model)

    setattr(load, _MARK, True)
    Trainer._load_from_checkpoint = load  # type: ignore[method-assign]
