"""What a ModuleFormer returns: the outputs of transformers' MoE models, with what routers chose.

They may be made of one mapping instead of fields, as autocast and processes do: hence no check of
types.

Letters: B batch, T tokens of a pass, S tokens with those of the cache, H heads, E experts, K
experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

from torch import Tensor
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)


@no_type_check
@dataclass
class ModuleFormerOutput(MoeModelOutputWithPast):
    """Output of the decoder.

    Two routers per block, attention before feed-forward, in every tuple:

    Attributes:
        attentions: weights [B, K, H, T, S] of every block.
        router_logits: [B T, E].
        router_experts: experts that were chosen [B T, K].
        router_load: tokens per expert [E], without padding.
    """

    router_logits: tuple[Tensor, ...] | None = None  # type: ignore[assignment]
    router_experts: tuple[Tensor, ...] | None = None
    router_load: tuple[Tensor, ...] | None = None


@no_type_check
@dataclass
class ModuleFormerCausalLMOutput(MoeCausalLMOutputWithPast):
    """Output of the language model; see `ModuleFormerOutput`.

    Attributes:
        aux_loss: sum of the balance losses of all routers, without its weight.
        concentration_loss: sum of their concentration losses, likewise.
    """

    concentration_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None  # type: ignore[assignment]
    router_experts: tuple[Tensor, ...] | None = None
    router_load: tuple[Tensor, ...] | None = None


@no_type_check
@dataclass
class ModuleFormerClassifierOutput(SequenceClassifierOutputWithPast):
    """Output of the classifier; see `ModuleFormerOutput`."""

    concentration_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    router_experts: tuple[Tensor, ...] | None = None
    router_load: tuple[Tensor, ...] | None = None
