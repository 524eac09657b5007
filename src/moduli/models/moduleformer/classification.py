"""A ModuleFormer that puts a label on a text, read off its last token.

Letters: B batch, T tokens, D width.
Source: IBM/ModuleFormer `modeling_moduleformer.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from moduli.models.moduleformer.auxiliary import router_losses
from moduli.models.moduleformer.configuration import ModuleFormerConfig
from moduli.models.moduleformer.inputs import last_tokens
from moduli.models.moduleformer.modeling import ModuleFormerModel, ModuleFormerPreTrainedModel
from moduli.models.moduleformer.outputs import ModuleFormerClassifierOutput, ModuleFormerOutput


class ModuleFormerForSequenceClassification(ModuleFormerPreTrainedModel):
    """A label for a text, read off its last token."""

    accepts_loss_kwargs = False  # its loss is a mean, which Trainer has to divide by the passes

    def __init__(self, config: ModuleFormerConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.transformer = ModuleFormerModel(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> ModuleFormerClassifierOutput:
        """One pass; see `ModuleFormerModel.forward`.

        Args:
            labels: [B] classes or numbers, or [B, labels] of zeros and ones. The loss has no
                auxiliary part, as in the reference, except for a concentration weight.

        Raises:
            ConfigError: several texts, and nothing says where each ends.
        """
        told = output_router_logits
        told = self.config.output_router_logits if told is None else told
        weighted = labels is not None and bool(self.config.concentration_weight)
        found: ModuleFormerOutput = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_router_logits=told or weighted,
            **kwargs,
        )
        each = self.score(found.last_hidden_state)
        where = last_tokens(each, input_ids, attention_mask, self.config.pad_token_id)
        logits = each[torch.arange(len(each), device=each.device), where]
        loss = gathered = None
        if told or weighted:
            _, gathered = router_losses(self.config, found, attention_mask)
        if labels is not None:
            loss = self.loss_function(
                logits=each, labels=labels, pooled_logits=logits, config=self.config
            )
            if weighted and gathered is not None:
                loss = loss + (self.config.concentration_weight * gathered).to(loss.device)
        return ModuleFormerClassifierOutput(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            concentration_loss=gathered,
            router_logits=found.router_logits if told else None,
            router_experts=found.router_experts if told else None,
            router_load=found.router_load if told else None,
        )
