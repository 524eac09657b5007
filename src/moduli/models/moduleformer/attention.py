"""Attention experts over shared keys and values, with stick-breaking weights.

    q^r = x Wq_r of the K chosen experts;  k, v = x Wk + bk, x Wv + bv, or x itself
    A_ij = sigmoid(z_ij) prod_{j < l <= i} (1 - sigmoid(z_il)),  z = q k / sqrt(D)
    y = sum_r p_r (A^r v) Wo_r

There are no positions; a query walks from its own token into the past, and what is left of the
stick is dropped. Only queries are routed: every token has one key and one value for all experts.
Letters: B batch, T queries, S keys, H heads of an expert, D head size, A = H D, W width of the
model, K experts per token.
Source: ModuleFormer (arXiv 2306.04640), IBM/ModuleFormer `modeling_moduleformer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moduli.experts.kernels.order import order
from moduli.models.moduleformer.configuration import ModuleFormerConfig
from moduli.models.moduleformer.experts import ExpertLinear, outputs, queries
from moduli.models.moduleformer.routers import ModuleFormerRouter
from moduli.models.stick_breaking import stick_breaking_attention, stick_breaking_weights
from moduli.routing import RouteContext, Routing


@dataclass(frozen=True)
class Tokens:
    """What a pass says about its tokens.

    Attributes:
        keys: False for keys that are padding, past ones included; None if none is.
        segments: which of several packed sequences a token belongs to; None if there is one.
        real: `keys` of the tokens of this pass alone, in one row.
    """

    keys: Bool[Tensor, "B S"] | None = None
    segments: Int[Tensor, "B S"] | None = None
    real: Bool[Tensor, " BT"] | None = None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Tokens:
        """The same on another device: by this accelerate moves them where a block is."""
        masks = (self.keys, self.segments, self.real)
        return Tokens(
            *(None if m is None else m.to(device, non_blocking=non_blocking) for m in masks)
        )


class AttentionExperts(nn.Module):
    """Router, query projections and output projections, under their published names.

    Args:
        config: of the model.
        num_experts: E of this layer.
    """

    def __init__(self, config: ModuleFormerConfig, num_experts: int) -> None:
        super().__init__()
        self.gate = ModuleFormerRouter(config, num_experts, config.k_att)
        self.experts = ExpertLinear(num_experts, config.n_embd, config.att_hidden)
        self.output_experts = ExpertLinear(num_experts, config.att_hidden, config.n_embd)


class ModuleFormerAttention(nn.Module):
    """The attention of one block.

    Args:
        config: of the model.
        layer: its place, for the cache.
    """

    def __init__(self, config: ModuleFormerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.head_size = config.n_head, config.head_size
        self.q_proj = AttentionExperts(config, config.att_experts(layer))
        self.k_proj = self.v_proj = None
        if not config.shares_input:
            self.k_proj = nn.Linear(config.n_embd, config.att_hidden)
            self.v_proj = nn.Linear(config.n_embd, config.att_hidden)

    def forward(
        self,
        x: Float[Tensor, "B T W"],
        tokens: Tokens,
        past: Cache | None = None,
        want_weights: bool = False,
    ) -> tuple[Float[Tensor, "B T W"], Float[Tensor, "B K H T S"] | None, Routing]:
        """Output, attention weights if wanted, and the routing.

        Args:
            x: normalised input.
            tokens: masks.
            past: cache to read and extend.
            want_weights: also compute the weights, which takes memory of T x S.
        """
        batch, length, width = x.shape
        flat = x.flatten(0, 1)
        gate: ModuleFormerRouter = self.q_proj.gate
        routing = gate(flat, RouteContext(training=self.training, real=tokens.real))
        todo = order(routing, gate.num_experts)
        top_k = routing.experts.shape[1]

        q = queries(flat, self.q_proj.experts, todo).view(
            batch, length, top_k, self.heads, self.head_size
        )
        # The experts of a token are queries of one head's group: they share its keys and values.
        q = q.permute(0, 3, 2, 1, 4).flatten(1, 2)
        k, v = self._keys_and_values(x, past, q.dtype)
        weights = None
        if want_weights:  # of which the output is made, so that they have gradients
            weights = stick_breaking_weights(q, k, key_mask=tokens.keys, segments=tokens.segments)
            weights = weights.unflatten(1, (self.heads, top_k)).transpose(1, 2)
            o = weights @ v.unsqueeze(1)
        else:
            o = stick_breaking_attention(q, k, v, key_mask=tokens.keys, segments=tokens.segments)
            assert isinstance(o, Tensor)
            o = o.unflatten(1, (self.heads, top_k)).transpose(1, 2)
        rows = o.permute(0, 3, 1, 2, 4).reshape(batch * length, top_k, self.heads * self.head_size)
        y = outputs(rows, routing.weights, self.q_proj.output_experts, todo)
        return y.view(batch, length, width), weights, routing

    def _keys_and_values(
        self, x: Tensor, past: Cache | None, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S D"]]:
        if self.k_proj is None or self.v_proj is None:
            k = x.unsqueeze(1).to(dtype)  # under autocast norms leave float32, projections do not
            if past is not None:  # one tensor is both, and is kept once
                k = _behind(past.update(k.detach(), k.detach()[..., :0], self.layer)[0], k)
            return k, k
        k, v = self._by_head(self.k_proj(x)), self._by_head(self.v_proj(x))
        if past is not None:
            kept = past.update(k.detach(), v.detach(), self.layer)
            k, v = _behind(kept[0], k), _behind(kept[1], v)
        return k, v

    def _by_head(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (self.heads, self.head_size))
        return split.transpose(1, 2)


def _behind(kept: Float[Tensor, "B H S D"], new: Float[Tensor, "B H T D"]) -> Tensor:
    """What the cache holds, where gradients go to the tokens of this pass and not to the past."""
    if not new.requires_grad:
        return kept
    return torch.cat([kept[:, :, : kept.shape[2] - new.shape[2]], new], dim=2)
