"""What training minimises: how the logits of several passes and a batch's labels make one loss.

    total = sum_i CE_i + alpha CR,  divided by the number of labels of the step, counted once

Classes of a whole input or of every position, the next token of a language model, and numbers
(squared errors) are told apart as transformers does in its own losses. Letters: B rows, S
sequence, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from moduli.errors import ModelError
from moduli.losses.consistency import (
    ConsistencyLoss,
    Smoothing,
    consistency_loss,
    consistent_regression,
)

IGNORED = -100


@dataclass(frozen=True)
class Objective:
    """Settings of the loss; see `consistency_loss`."""

    alpha: float = 0.0
    label_smoothing: float = 0.0
    smoothing_style: Smoothing = "fairseq"

    def loss(self, model: nn.Module, logits: Sequence[Tensor], labels: Tensor) -> ConsistencyLoss:
        """The loss of passes over one batch, as sums over its labels.

        Args:
            model: which made them; says what the labels are.
            logits: of each pass, [B, V] or [B, S, V].
            labels: as the model's own forward takes them.

        Raises:
            ModelError: several labels for one input, or labels that do not fit the logits.
        """
        config: Any = getattr(model, "config", None)
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            raise ModelError(
                "THOR has no consistency loss for several labels of one input "
                "(problem_type='multi_label_classification'); it trains classifiers with one "
                "label, regression, taggers, language models and models from text to text"
            )
        labels = labels.to(logits[0].device)
        classes = logits[0].shape[-1]
        if logits[0].dim() == 2 and (problem == "regression" or classes == 1):
            numbers = [one.reshape(labels.shape) for one in logits]
            return consistent_regression(numbers, labels.to(numbers[0].dtype), self.alpha)
        if labels.is_floating_point() or logits[0].shape[:-1] != labels.shape:
            raise ModelError(
                f"{type(model).__name__} makes logits {tuple(logits[0].shape)} and was given "
                f"labels {tuple(labels.shape)} ({str(labels.dtype).removeprefix('torch.')}); THOR "
                "needs the number of a class for every position, or one for every row"
            )
        return consistency_loss(
            logits,
            pad(labels[:, 1:], (0, 1), value=IGNORED) if predicts_next(model) else labels,
            self.alpha,
            label_smoothing=self.label_smoothing,
            ignore_index=IGNORED,
            smoothing_style=self.smoothing_style,
        )


def predicts_next(model: nn.Module) -> bool:
    """Whether the model is a decoder whose position s says what stands at s + 1."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return known is not None and isinstance(model, known)


def without_labels(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward without labels, from which the model would make a loss of its own.

    Models from text to text take the decoder's input from them; it is made here instead. Where
    the model does not say how, the labels stay, and its own loss is made in vain.
    """
    rest = {name: value for name, value in arguments.items() if name != "labels"}
    decoder = ("decoder_input_ids", "decoder_inputs_embeds")
    given = any(rest.get(name) is not None for name in decoder)
    if given or not getattr(model.config, "is_encoder_decoder", False):
        return rest
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return arguments
    made = model.prepare_decoder_input_ids_from_labels(labels=arguments["labels"])
    return {**rest, "decoder_input_ids": made}
