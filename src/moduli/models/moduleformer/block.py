"""One block of a ModuleFormer.

    h <- h + attention experts(ln_1(h));  h <- h + feed-forward experts(ln_2(h))

Letters: B batch, T tokens of a pass, D width.
Source: ModuleFormer (arXiv 2306.04640), IBM/ModuleFormer `modeling_moduleformer.py`.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from moduli.models.moduleformer.attention import ModuleFormerAttention, Tokens
from moduli.models.moduleformer.configuration import ModuleFormerConfig
from moduli.models.moduleformer.experts import ModuleFormerExperts
from moduli.models.moduleformer.routers import ModuleFormerRouter
from moduli.routing import RouteContext, Routing

NORM_EPS = 1e-5  # always: the reference does not read `layer_norm_epsilon`


class FeedForward(nn.Module):
    """Router and feed-forward experts of one block."""

    def __init__(self, config: ModuleFormerConfig, layer: int) -> None:
        super().__init__()
        num_experts = config.mlp_experts(layer)
        self.gate = ModuleFormerRouter(config, num_experts, config.k_mlp)
        self.experts = ModuleFormerExperts(config, num_experts)

    def forward(self, x: Float[Tensor, "B T D"], tokens: Tokens) -> tuple[Tensor, Routing]:
        flat = x.flatten(0, 1)
        routing = self.gate(flat, RouteContext(training=self.training, real=tokens.real))
        y = self.experts(flat, routing.experts, routing.weights.to(flat.dtype))
        return y.view_as(x), routing


class ModuleFormerBlock(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """One block. Everything later needed comes as one flat tuple, which checkpointing can handle:
    output, attention weights or None, and logits and experts of both routers."""

    def __init__(self, config: ModuleFormerConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=NORM_EPS)
        self.attn = ModuleFormerAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=NORM_EPS)
        self.mlpf = FeedForward(config, layer)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        tokens: Tokens,
        past_key_values: Cache | None = None,
        want_weights: bool = False,
    ) -> tuple[Tensor | None, ...]:
        h = hidden_states
        y, weights, attending = self.attn(self.ln_1(h), tokens, past_key_values, want_weights)
        h = h + self.resid_dropout(y)
        y, computing = self.mlpf(self.ln_2(h), tokens)
        h = h + self.resid_dropout(y)
        return h, weights, attending.scores, attending.experts, computing.scores, computing.experts
