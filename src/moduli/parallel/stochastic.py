"""Gating dropout of stochastic experts: copies of an FFN that a plan names for a whole pass (THOR).

They have no gate and no exchange; what a dropped step keeps of the method is that rows see experts
of their own rank alone. The expert e that the plan has drawn for a pass becomes expert e mod L of
the rank's block. As the plan draws uniformly among all E and L divides E, this draws uniformly in
the block, and costs no random number: the same on every rank, after a resume, and when activations
are computed again.

Virtual ranks divide the rows of every pass in R groups. A real rank holds all copies, as data
parallelism does, and uses its block.
Letters: K passes in a batch, B rows of one, T tokens of one, E experts, R ranks, L = E / R experts
of a rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moduli.errors import ConfigError, ModelError
from moduli.parallel.agreement import is_distributed
from moduli.parallel.decisions import GatingDropout, decided
from moduli.parallel.expert_parallel import require_divisible
from moduli.parallel.local import parts_of
from moduli.surgery.projection import is_sharded
from moduli.surgery.stochastic import Choice, StochasticProjection, stochastic_projections


class StochasticLayer:
    """An FFN with several copies, whose rows can be confined to copies of their rank.

    Args:
        projections: of the FFN, by name.
        config: see `GatingDropout`.
        ranks: R.
        rank: of this process; None where ranks are virtual.

    Attributes:
        name: of the last projection in the model.
        num_experts: E.
        dropped: whether the current step drops; None before `set_step`.
        step: the current one.
        copied: whether this came with a copy of a model, whose steps nobody sets.

    Raises:
        ConfigError: experts cannot be divided among the ranks.
    """

    def __init__(
        self,
        projections: dict[str, StochasticProjection],
        config: GatingDropout,
        ranks: int,
        rank: int | None,
    ) -> None:
        self.name = next(name for name, module in projections.items() if module.last)
        self.projections = list(projections.values())
        self.num_experts = len(self.projections[0].experts)
        require_divisible(self.name, self.num_experts, ranks)
        self.config, self.ranks, self.rank = config, ranks, rank
        self.dropped: bool | None = None
        self.step = 0
        self.copied = False

    @property
    def taken(self) -> bool:
        """Whether something confines the rows of these projections already."""
        return any(projection.limit is not None for projection in self.projections)

    def attach(self) -> None:
        """Confine rows from now on in steps that drop."""
        for projection in self.projections:
            projection.limit = self

    def remove(self) -> None:
        """Leave rows to the plan again."""
        for projection in self.projections:
            if projection.limit is self:
                projection.limit = None

    def __getstate__(self) -> dict[str, Any]:
        # What sets the step of a model does not know of its copies.
        return {**self.__dict__, "dropped": None, "copied": True}

    def __call__(self, choice: Choice, lead: torch.Size) -> Choice:
        """The experts of a training pass; see `moduli.surgery.stochastic.Limit`.

        Raises:
            ModelError: nobody has said which step it is, or rows cannot be told apart.
        """
        if not decided(self.name, self.dropped):
            return choice
        if self.config.mode == "gate_expert_drop":
            return "none"
        if isinstance(choice, str | torch.Tensor):  # no plan: a part of the model is called alone
            return choice
        drawn = choice if isinstance(choice, tuple) else (choice,)
        local = self.num_experts // self.ranks
        if self.rank is not None:
            mine = tuple(self.rank * local + expert % local for expert in drawn)
            return mine if len(mine) > 1 else mine[0]
        if len(lead) == 1:
            raise ModelError(
                f"{self.name}: virtual ranks divide the rows of a batch, but this model flattens "
                f"them before its FFNs ({lead[0]} tokens); use real ranks, or "
                'mode="gate_expert_drop"'
            )
        tokens, rows = lead.numel() // len(drawn), lead[0] // len(drawn)
        offsets = torch.tensor(drawn)[:, None] % local
        experts = torch.empty(len(drawn), tokens, dtype=torch.long)
        for rank, own in parts_of(tokens, rows, self.ranks, self.step):
            experts[:, own] = rank * local + offsets
        return experts.flatten()


def stochastic_layers(
    model: nn.Module, config: GatingDropout, ranks: int | None
) -> list[StochasticLayer]:
    """The FFNs of a model that have several copies, in its order; nothing is changed yet.

    Args:
        model: any.
        config: see `GatingDropout`.
        ranks: number of virtual ranks; None takes all processes for ranks.

    Raises:
        ConfigError: experts cannot be divided among the ranks, or there is one process.
        ModelError: the policy needs a gate.
    """
    layers: dict[int, dict[str, StochasticProjection]] = {}
    for name, projection in stochastic_projections(model).items():
        layers.setdefault(projection.layer, {})[name] = projection
    if not layers:
        return []
    if config.mode == "gate_drop" and config.local_policy == "masked_gate":
        raise ModelError(
            f"local_policy='masked_gate' masks a gate, and the experts of this "
            f'{type(model).__name__} are drawn without one (THOR); use local_policy="paper"'
        )
    rank = None
    if ranks is None:
        if not is_distributed():
            raise ConfigError(
                "there is one process; say among how many virtual ranks to divide the experts "
                "(ranks=2), or start several processes (torchrun)"
            )
        ranks, rank = dist.get_world_size(), dist.get_rank()
    return [StochasticLayer(parts, config, ranks, rank) for parts in layers.values()]


def require_whole(layer: StochasticLayer) -> None:
    """Raise if ranks are to use different experts of an FFN that they shard.

    Raises:
        ModelError: it is sharded, and a rank would wait for ever for the gradients of others.
    """
    differ = layer.rank is not None and layer.config.mode == "gate_drop"
    if differ and any(is_sharded(p) for part in layer.projections for p in part.parameters()):
        raise ModelError(
            f"{layer.name}: its copies are sharded over processes (FSDP), which then all have to "
            "use the same; train with DistributedDataParallel, take virtual ranks (ranks=R), or "
            'mode="gate_expert_drop"'
        )
