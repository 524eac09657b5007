"""What training minimises: how the logits of several passes and a batch's labels make one loss.

    total = sum_i CE_i + alpha CR,  divided by the number of labels of the step, counted once

Classes of a whole input or of every position, the next token of a language model, and numbers
(squared errors) are told apart as transformers does in its own losses. Whether position s is to say
what stands there or at s + 1 shows in the loss that the model makes itself, at its first one: names
and types of models do not tell. Letters: B rows, K passes, S sequence, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

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

    def loss(
        self,
        model: nn.Module,
        logits: Sequence[Tensor],
        labels: Tensor,
        predicts_next: bool | None = None,
    ) -> ConsistencyLoss:
        """The loss of passes over one batch, as sums over its labels.

        Args:
            model: which made them; says what the labels are.
            logits: of each pass, [B, V] or [B, S, V].
            labels: as the model's own forward takes them.
            predicts_next: whether position s says what stands at s + 1, see `found_shift`; None:
                what is usual for such a model.

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
            precise = torch.promote_types(numbers[0].dtype, torch.float32)
            return consistent_regression(numbers, labels.to(precise), self.alpha)
        if labels.is_floating_point() or logits[0].shape[:-1] != labels.shape:
            raise ModelError(
                f"{type(model).__name__} makes logits {tuple(logits[0].shape)} and was given "
                f"labels {tuple(labels.shape)} ({str(labels.dtype).removeprefix('torch.')}); THOR "
                "needs the number of a class for every position, or one for every row"
            )
        shifted = usual_shift(model) if predicts_next is None else predicts_next
        return consistency_loss(
            logits,
            _moved(labels) if shifted and labels.dim() > 1 else labels,
            self.alpha,
            label_smoothing=self.label_smoothing,
            ignore_index=IGNORED,
            smoothing_style=self.smoothing_style,
        )


def usual_shift(model: nn.Module) -> bool:
    """Whether a model is one of a kind whose position s usually says what stands at s + 1."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    by_name: Any = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "")
    return by_name is ForCausalLMLoss or (known is not None and isinstance(model, known))


def has_shift(labels: Tensor | None) -> bool:
    """Whether labels are of positions, so that it matters at which of them one stands."""
    return labels is not None and labels.dim() == 2 and not labels.is_floating_point()


@torch.no_grad()
def found_shift(logits: Tensor, labels: Tensor, loss: Tensor | None) -> bool | None:
    """Whether a loss that the model made itself is that of the next tokens; None if it does not
    tell: it may be neither, or be the same either way.

    Args:
        logits: of K passes over a batch, one after the other, [K B, S, V].
        labels: of the batch, [B, S].
        loss: cross-entropy of the passes, mean over their labels.
    """
    if loss is None or logits.dim() != 3 or logits.shape[1] != labels.shape[1]:
        return None
    rows, labels = logits.float().flatten(0, 1), labels.to(logits.device)

    def fits(targets: Tensor) -> bool:
        all_passes = targets.repeat(len(logits) // len(targets), 1).flatten()
        made = cross_entropy(rows, all_passes, ignore_index=IGNORED)
        return bool(torch.isclose(made, loss.to(made), rtol=1e-3, atol=1e-4))

    next_one, same = fits(_moved(labels)), fits(labels)
    return next_one if next_one != same else None


def _moved(labels: Tensor) -> Tensor:
    """At every position the label of the next one."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED)


def without_labels(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward without labels, from which the model would make a loss of its own.

    Models from text to text take the decoder's input from them; it is made here instead. Where
    the model does not say how, or makes a mask of them as well (`EncoderDecoderModel`), the labels
    stay, and its own loss is made in vain.
    """
    rest = {name: value for name, value in arguments.items() if name != "labels"}
    decoder = ("decoder_input_ids", "decoder_inputs_embeds")
    given = any(rest.get(name) is not None for name in decoder)
    if given or not getattr(model.config, "is_encoder_decoder", False):
        return rest
    masks = model.config.model_type == "encoder-decoder"
    if masks or not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return arguments
    made = model.prepare_decoder_input_ids_from_labels(labels=arguments["labels"])
    return {**rest, "decoder_input_ids": made}
