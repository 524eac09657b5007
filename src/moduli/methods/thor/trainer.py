"""What a `Trainer` has to know of THOR: at which step it is, and that the model makes its loss.

`Trainer.train` is wrapped for that, once, when the first model is converted, never at import; other
models pass through unchanged. The step is taken from the Trainer's own state at the beginning of
each, so that a resumed run draws the experts it would have drawn.
"""

from __future__ import annotations

import functools
from typing import Any

from moduli.errors import ConfigError
from moduli.methods.thor.passes import BeforeModel, passes_of
from moduli.training.auxiliary import loss_maker

_MARK = "_moduli_follows_steps"


def follow_trainer() -> None:
    """From now on every `Trainer` tells a THOR model its steps. Calling this again changes nothing.

    `Trainer.train` of such a model raises `ConfigError` where the Trainer would make the loss
    itself, by its label smoother or a `compute_loss_func`, and the consistency loss would be lost.
    """
    from transformers import Trainer

    original = Trainer.train
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook = loss_maker(self.model)
        if not isinstance(hook, BeforeModel):
            return original(self, *args, **kwargs)
        before = _prepare(self)
        try:
            return original(self, *args, **kwargs)
        finally:  # the model may be merged before it trains again
            _undo(self, before)

    setattr(train, _MARK, True)
    Trainer.train = train  # type: ignore[method-assign]


def _prepare(trainer: Any) -> bool:
    """Make a Trainer fit, and return what it said before of who divides the loss."""
    if trainer.label_smoother is not None:
        raise ConfigError(
            f"label_smoothing_factor is {trainer.args.label_smoothing_factor}, but the Trainer's "
            "own label smoothing would replace THOR's loss; set it to 0 and use "
            "moduli.THOR(label_smoothing=...)"
        )
    if trainer.compute_loss_func is not None:
        raise ConfigError(
            "compute_loss_func would replace THOR's loss, which the model makes itself from its "
            "passes and the labels; leave it out"
        )
    # The model divides by the labels of the whole step, whatever its own forward would do.
    before: bool = trainer.model_accepts_loss_kwargs
    trainer.model_accepts_loss_kwargs = True
    # Before those that report what is logged.
    trainer.callback_handler.callbacks.insert(0, _callback())
    return before


def _undo(trainer: Any, before: bool) -> None:
    trainer.model_accepts_loss_kwargs = before
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [c for c in callbacks if type(c).__name__ != "FollowSteps"]


def _callback() -> Any:
    from transformers import TrainerCallback

    class FollowSteps(TrainerCallback):
        """Tells the model its step, and the log how far its passes are apart.

        The model is the one that trains: `model_init` makes another than was there before.
        """

        apart, labels = 0.0, 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            """The first forward of a step is to come."""
            passes_of(known["model"]).start_step(state.global_step)

        def on_substep_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            """One of several forwards of a step is done."""
            last = passes_of(known["model"]).last
            if last is not None:
                self.apart += float(last.disagreement)
                self.labels += last.count

        def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            """The last one is."""
            self.on_substep_end(args, state, control, **known)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            """Add the disagreement per label since the last log, in the unit of the loss."""
            if logs is not None and "loss" in logs and self.labels:
                logs["consistency"] = self.apart / self.labels
                state.log_history[-1]["consistency"] = logs["consistency"]
                self.apart, self.labels = 0.0, 0

    return FollowSteps()
