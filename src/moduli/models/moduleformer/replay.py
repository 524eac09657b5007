"""Training the new experts of a ModuleFormer so that the old function stays: a Trainer callback.

Before every step the gradient of

    leakage_weight * leakage(tokens of the old domain) + row_weight * row norm

is put into the new parameters, to which the step adds that of the task. The loss that is logged
remains the task's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from moduli.errors import ConfigError
from moduli.models.moduleformer.leaking import leakage, row_norm
from moduli.models.moduleformer.sublayers import decoder_of
from moduli.models.moduleformer.usage import Batch


class KeepOld(TrainerCallback):
    """Holds new experts back where old ones are at home.

    The batch of a step depends on its number alone, so that a resumed run is the same. For one
    process: gradients are not averaged over several.

    Args:
        batches: keyword arguments of the forward, of the old domain; used in turn.
        leakage_weight: of the leakage, which is between 0 and 1.
        row_weight: of the sum of squares of the new rows.

    Raises:
        ConfigError: a negative weight, or leakage without tokens to measure it on.
    """

    def __init__(
        self, batches: Sequence[Batch] = (), *, leakage_weight: float = 0.0, row_weight: float = 0.0
    ) -> None:
        for name, weight in (("leakage", leakage_weight), ("row", row_weight)):
            if weight < 0:
                raise ConfigError(f"{name}_weight is {weight}; it is 0 or more")
        if leakage_weight and not batches:
            raise ConfigError("leakage is measured on tokens of the old domain; give batches of it")
        self.batches = batches
        self.leakage_weight, self.row_weight = leakage_weight, row_weight

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse float16, whose scaled gradients these would be lost among.

        Raises:
            ConfigError: training is in float16.
        """
        if args.fp16:
            raise ConfigError("the penalties of KeepOld are not scaled as fp16 needs; choose bf16")

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Gradients are empty here, whatever the number of batches of the step."""
        model.train()  # which Trainer says later; the first step is not to be another than the rest
        if self.leakage_weight:
            batch = self.batches[state.global_step % len(self.batches)]
            inputs = {
                name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
                if name != "labels"
            }
            found = decoder_of(model)(**inputs, output_router_logits=True, use_cache=False)
            share = leakage(model, found.router_logits, inputs.get("attention_mask"))
            (self.leakage_weight * share).backward()
        if self.row_weight:
            (self.row_weight * row_norm(model)).backward()
