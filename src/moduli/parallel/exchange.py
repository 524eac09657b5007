"""Experts of other ranks: an expert-parallel implementation of transformers that can be dropped.

    1. sort the (token, expert) pairs by expert, which groups them by the rank that has it
    2. tell every rank how many rows it gets for each of its experts, and send them
    3. every rank runs its experts on what came
    4. send the results back; weigh and sum them at the token

It is offered to transformers under the name "gating_dropout", in
`DistributedConfig(ep_implementation="gating_dropout")`, and computes what its "all_to_all" does
until `moduli.parallel.gating_dropout` is applied to the model: then a step that drops runs the
rank's own experts and sends nothing. The exchange is written out here, rather than inherited, so
that a rank which is lost is reported by the layer's name in the backward pass as well.
Letters: T tokens of this rank, D width, K experts per token, E experts, R ranks, L = E / R experts
of a rank, N rows.
Source: Gating Dropout (arXiv 2205.14336); the contract is that of transformers'
`distributed/expert_parallel.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.distributed.expert_parallel import EPImplementation

from moduli.errors import ConfigError
from moduli.parallel.agreement import named_failure


class Gate(Protocol):
    """Who says whether this step sends tokens away."""

    def dropping(self) -> bool:
        """Whether this pass drops."""

    @property
    def computes_nothing(self) -> bool:
        """Whether a pass that drops skips the experts as well."""


class Peers(NamedTuple):
    """With whom a layer exchanges rows."""

    group: Any
    layer: str

    def all_to_all(self, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        """Rows from all ranks, `sent[r]` of mine to rank r."""
        from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

        def act() -> Tensor:
            moving = all_to_all_single(rows.contiguous(), received, sent, self.group)
            done: Tensor = wait_tensor(moving)
            return done

        return named_failure(act, self.layer, self.group)


class _Exchange(torch.autograd.Function):
    """Rows to other ranks, and gradients of the rows back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, received: list[int], sent: list[int], peers: Peers
    ) -> Tensor:
        ctx.received, ctx.sent, ctx.peers = received, sent, peers
        return peers.all_to_all(rows, received, sent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.peers.all_to_all(grads[0], ctx.sent, ctx.received), None, None, None


class GatingDropoutEP(EPImplementation):
    """Tokens to the ranks of their experts, unless the step drops.

    Args:
        experts: on transformers' experts contract, with this rank's experts in it.
        ep_mesh: ranks over which the experts of a layer are spread.
        tp_mesh: ranks that hold the same batch.

    Attributes:
        gate: of `moduli.parallel.gating_dropout`; None always exchanges.
        layer: name of the experts in the model, for messages.
        local: L.

    Raises:
        ConfigError: several ranks hold the same batch.
    """

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        if tp_mesh.size() > 1:
            raise ConfigError(
                f"{tp_mesh.size()} ranks hold the same batch (tp_size); a step that drops the "
                "exchange needs a batch of its own on every rank: set tp_size to 1, and fsdp_size "
                'to the number of ranks, or take ep_implementation="all_to_all"'
            )
        self.gate: Gate | None = None
        self.layer = type(experts).__name__
        here: Any = experts.num_experts  # what is left of them on this rank
        self.local = int(here)
        experts._moduli_exchange = self  # type: ignore[assignment]

    @property
    def ranks(self) -> int:
        """R."""
        return int(self.ep_mesh.size())

    @property
    def rank(self) -> int:
        """Which of the R blocks of experts is here."""
        return int(self.ep_mesh.get_local_rank())

    def __call__(
        self,
        hidden_states: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Sum over slots of weight * expert(token); indices are those of all E experts."""
        if self.gate is None or not self.gate.dropping():
            return self._exchanged(hidden_states, top_k_index, top_k_weights)
        if self.gate.computes_nothing:
            return torch.zeros_like(hidden_states)
        mine = top_k_index - self.rank * self.local
        return self._run(hidden_states, mine, top_k_weights)

    def _exchanged(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        tokens, top_k = index.shape
        local, device = self.local, x.device
        exchange: Any = _Exchange.apply
        peers = Peers(self.ep_mesh.get_group(), self.layer)
        order = index.flatten().argsort(stable=True)
        counts = torch.bincount(index.flatten(), minlength=local * self.ranks)
        ones = [local] * self.ranks
        coming = peers.all_to_all(counts, ones, ones).view(self.ranks, local)
        # The one place where the host waits for the device: sizes of messages are its business.
        per_rank = torch.stack([counts.view(self.ranks, local).sum(1), coming.sum(1)])
        sent, received = per_rank.tolist()
        rows = exchange(x[order // top_k], received, sent, peers)
        experts = torch.arange(local, device=device).repeat(self.ranks)
        experts = experts.repeat_interleave(coming.flatten())[:, None]
        out = self._run(rows, experts, torch.ones_like(experts, dtype=rows.dtype))
        back = exchange(out, sent, received, peers)
        slots = torch.empty_like(back).index_copy(0, order, back).view(tokens, top_k, x.shape[1])
        return (slots * weights[..., None].to(slots.dtype)).sum(1)

    def _run(
        self, x: Float[Tensor, "N D"], index: Int[Tensor, "N J"], weights: Float[Tensor, "N J"]
    ) -> Float[Tensor, "N D"]:
        """This rank's experts on any number of rows."""
        if len(x):
            y: Tensor = self.experts_forward(x, index, weights)
            return y
        # No row came. The graph still leads to the experts and to who would have sent one, since
        # other ranks do this exchange backwards too, and reduce gradients of these parameters.
        slot = index.new_zeros(1, index.shape[1])
        one: Tensor = self.experts_forward(
            x.sum(0, keepdim=True), slot, 1 + weights.sum(0, keepdim=True)
        )
        return one[:0]
