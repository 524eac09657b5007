"""What comes out of a model: its logits, their mean over passes, and the loss put beside them.

Letters: R rows of the batch, V classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moduli.errors import ModelError


def logits_of(model: nn.Module, output: Any) -> Tensor:
    """What a model predicts.

    Raises:
        ModelError: its output has no logits.
    """
    if isinstance(output, tuple):
        return next(v for v in output if isinstance(v, Tensor) and v.dim() > 0)
    found = output.get("logits") if isinstance(output, dict) else None
    if not isinstance(found, Tensor):
        raise ModelError(
            f"the output of this {type(model).__name__} has no logits, of which THOR makes its "
            "loss and its ensemble; use the model with its head"
        )
    return found


def loss_of(output: Any) -> Tensor | None:
    """The loss in a model's output, None if there is none."""
    found = output[0] if isinstance(output, tuple) else output.get("loss")
    return found if isinstance(found, Tensor) and found.dim() == 0 else None


def mean_prediction(model: Any, passes: Sequence[Tensor]) -> Tensor:
    """Logits of the mean of the probabilities of all passes; the mean of numbers.

    Raises:
        ModelError: the model gives several labels to one input, or a map of them.
    """
    problem = getattr(model.config, "problem_type", None)
    if problem == "multi_label_classification":
        raise ModelError("ensemble_prob takes one label for an input; use ensemble_layer")
    if passes[0].dim() > 3:
        raise ModelError(
            f"ensemble_prob takes predictions [batch, classes] or [batch, positions, classes], and "
            f"this {type(model).__name__} makes {tuple(passes[0].shape)}; use ensemble_layer"
        )
    stacked = torch.stack([one.float() for one in passes])
    if stacked.shape[-1] == 1 or problem == "regression":
        return stacked.mean(0).to(passes[0].dtype)
    together = stacked.log_softmax(-1).logsumexp(0) - math.log(len(passes))
    return together.to(passes[0].dtype)


def with_loss(output: Any, logits: Tensor, loss: Tensor | None, *, keep_cache: bool) -> Any:
    """The output with these logits and this loss, which comes first.

    Args:
        output: of a model, a `ModelOutput` or a tuple that begins with a loss or the logits.
        logits: instead of those in it.
        loss: None for none.
        keep_cache: leave past keys and values in it.
    """
    if isinstance(output, tuple):
        place = next(i for i, v in enumerate(output) if isinstance(v, Tensor) and v.dim() > 0)
        rest = (logits, *output[place + 1 :])
        return rest if loss is None else (loss, *rest)
    left_out = {"loss", "logits"} | (set() if keep_cache else {"past_key_values"})
    kept = {key: value for key, value in output.items() if key not in left_out}
    return type(output)(**({} if loss is None else {"loss": loss}), logits=logits, **kept)
