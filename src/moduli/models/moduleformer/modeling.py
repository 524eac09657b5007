"""ModuleFormer: a decoder whose attention heads and feed-forward experts are chosen per token.

Real models of transformers: Auto classes, `from_pretrained` and `save_pretrained` in the published
tensor names, generation, gradient checkpointing. There is no position embedding.
Letters: B batch, T tokens of a pass, D width.
Source: ModuleFormer (arXiv 2306.04640), IBM/ModuleFormer `modeling_moduleformer.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from moduli.errors import ConfigError
from moduli.models.moduleformer.auxiliary import expert_load, router_losses, share_of_step
from moduli.models.moduleformer.block import NORM_EPS, ModuleFormerBlock
from moduli.models.moduleformer.configuration import ModuleFormerConfig
from moduli.models.moduleformer.experts import ExpertLinear, ModuleFormerExperts
from moduli.models.moduleformer.files import check_weights, no_safetensors
from moduli.models.moduleformer.inputs import tokens_of
from moduli.models.moduleformer.naming import DEAD_BUFFERS, dead_buffers, take_published_names
from moduli.models.moduleformer.outputs import ModuleFormerCausalLMOutput, ModuleFormerOutput
from moduli.models.moduleformer.routers import ModuleFormerRouter
from moduli.routing import Router

PACKED = (
    "position_ids start anew within a row, so it holds several sequences, and a cache would mix "
    "them up when it is gone on from; leave out past_key_values, or give every sequence a row of "
    "its own with an attention_mask"
)


class ModuleFormerPreTrainedModel(PreTrainedModel):
    """What the models of this family share."""

    config: ModuleFormerConfig
    config_class = ModuleFormerConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ModuleFormerBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = list(DEAD_BUFFERS)  # noqa: RUF012
    _can_record_outputs = {"hidden_states": ModuleFormerBlock}  # noqa: RUF012
    _input_embed_layer = "wte"

    def __init__(self, config: ModuleFormerConfig) -> None:
        super().__init__(config)
        config.check()  # which may have changed since it was made
        self.register_load_state_dict_pre_hook(take_published_names)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (ModuleFormerExperts, ExpertLinear)):
            for tensor in module.parameters(recurse=False):
                bound = 1 / tensor.shape[1]
                init.uniform_(tensor, -bound, bound)
        elif isinstance(module, ModuleFormerRouter) and hasattr(module, "expert_centroids"):
            init.normal_(module.expert_centroids)
            init.zeros_(module.temperature)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for experts in the source of this file only

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Our kernels, unless others are asked for."""
        found: str = super().get_correct_experts_implementation(requested_experts or "moduli")
        return found

    def freeze_routers(self, frozen: bool = True) -> None:
        """Leave all routers as they are in training, or let them learn again."""
        inner: set[int] = set()  # a router that grows holds the one it was
        for module in self.modules():
            if isinstance(module, Router) and id(module) not in inner:
                inner |= {id(part) for part in module.modules()}
                freeze: Any = module.freeze
                freeze(frozen)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As of transformers, from safetensors only.

        Raises:
            CheckpointError: the weights are pickled, or a file is damaged.
        """
        source = pretrained_model_name_or_path
        if source is not None:
            check_weights(Path(source, kwargs.get("subfolder") or ""))
        kwargs["use_safetensors"] = True
        try:
            return super().from_pretrained(source, *model_args, **kwargs)
        except OSError as error:
            if "use_safetensors" in str(error) and not Path(str(source)).is_dir():
                raise no_safetensors(str(source)) from error
            raise

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As of transformers, with the tensors of the published format."""
        if self.config.legacy_buffers:
            state_dict = dict(self.state_dict() if state_dict is None else state_dict)
            prefix = "" if isinstance(self, ModuleFormerModel) else f"{self.base_model_prefix}."
            state_dict |= dead_buffers(self.config, prefix, self.dtype)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)


class ModuleFormerModel(ModuleFormerPreTrainedModel):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: ModuleFormerConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(ModuleFormerBlock(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=NORM_EPS)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "_ T"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        token_type_ids: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> ModuleFormerOutput:
        """One pass.

        Args:
            input_ids: tokens, or `inputs_embeds` instead.
            attention_mask: 0 for padding, anywhere in the row, over past and present tokens.
            position_ids: of packed sequences, which start anew at 0: there the model forgets.
                Without a mask and a cache only; otherwise positions mean nothing here. What was
                packed cannot be gone on from: no cache is returned.
            past_key_values: cache of what came before. Not looked at if `use_cache` is false, as
                in the reference.
            inputs_embeds: embeddings to start from.
            token_type_ids: more tokens, whose embeddings are added.
            use_cache: extend and return the cache.
            output_attentions: also return the weights, which takes memory of T x S.
            output_router_logits: also return what the routers said.

        Raises:
            ConfigError: neither or both of tokens and embeddings; a mask or a cache of other size;
                a cache to be filled with packed sequences.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give exactly one of input_ids and inputs_embeds")
        h = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is not None:
            h = h + self.wte(token_type_ids)
        past = None
        if use_cache:
            past = DynamicCache(config=self.config) if past_key_values is None else past_key_values
        tokens = tokens_of(h, attention_mask, position_ids, past)
        if tokens.segments is not None and not torch.compiler.is_compiling():
            if past is not None and past is past_key_values:
                raise ConfigError(PACKED)
            past = None  # which only the default of `use_cache` asked for
        h = self.drop(h)
        wants = self.config.output_attentions if output_attentions is None else output_attentions
        attentions, logits, experts = [], [], []
        for block in self.h:
            h, weights, *seen = block(h, tokens, past_key_values=past, want_weights=bool(wants))
            attentions.append(weights)
            logits += seen[::2]
            experts += seen[1::2]
        h = self.ln_f(h)
        told = output_router_logits
        told = self.config.output_router_logits if told is None else told
        return ModuleFormerOutput(
            last_hidden_state=h,
            past_key_values=past,
            attentions=tuple(attentions) if wants else None,
            router_logits=tuple(logits) if told else None,
            router_experts=tuple(experts) if told else None,
            router_load=tuple(
                expert_load(chosen, scores.shape[1], tokens.real)
                for chosen, scores in zip(experts, logits, strict=True)
            )
            if told
            else None,
        )


class ModuleFormerForCausalLM(ModuleFormerPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: ModuleFormerConfig) -> None:
        super().__init__(config)
        self.transformer = ModuleFormerModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.vocab_size = config.vocab_size
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "_ T"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        token_type_ids: Int[Tensor, "B T"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ModuleFormerCausalLMOutput:
        """One pass; see `ModuleFormerModel.forward`.

        Args:
            labels: the tokens themselves (they are shifted here), -100 where there is no loss.
                With them the loss includes the auxiliary losses, each by its weight.
            logits_to_keep: logits of so many last tokens, or of these places; 0: all, which
                `labels` need.

        Raises:
            ConfigError: labels, and not the logits of all tokens.
        """
        told = output_router_logits
        told = self.config.output_router_logits if told is None else told
        weighted = labels is not None and bool(
            self.config.aux_loss_weight or self.config.concentration_weight
        )
        found: ModuleFormerOutput = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            use_cache=use_cache,
            output_router_logits=told or weighted,
            **kwargs,
        )
        h = found.last_hidden_state
        assert h is not None
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, keep, :]).float()
        loss = aux_loss = gathered = None
        if labels is not None:
            if logits.shape[:2] != h.shape[:2]:
                raise ConfigError(
                    f"labels are of {h.shape[1]} tokens, and logits_to_keep leaves logits of "
                    f"{logits.shape[1]}; leave out one of the two"
                )
            loss = self.loss_function(logits, labels, vocab_size=self.vocab_size, **kwargs)
        if told or weighted:
            aux_loss, gathered = router_losses(self.config, found, attention_mask)
            if loss is not None and labels is not None:
                total = self.config.aux_loss_weight * aux_loss
                total = total + self.config.concentration_weight * gathered
                items, shifted = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
                loss = loss + (share_of_step(labels, items, shifted) * total).to(loss.device)
        return ModuleFormerCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            concentration_loss=gathered,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            router_logits=found.router_logits if told else None,
            router_experts=found.router_experts if told else None,
            router_load=found.router_load if told else None,
        )
