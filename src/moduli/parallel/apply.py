"""Gating dropout on a model: the verb, and what it hands back.

attached = gating_dropout(model, GatingDropout(p=0.3), ranks=4)    # virtual ranks, one process
attached = gating_dropout(model, GatingDropout(p=0.3))             # real ranks

Trainer(..., callbacks=[attached.callback()])                      # or, in an own loop,
attached.set_step(step)                                            # before every optimiser step
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moduli.errors import ConfigError, ModelError
from moduli.parallel.agreement import from_rank_0, is_distributed, require_agreement
from moduli.parallel.decisions import GatingDropout
from moduli.parallel.expert_parallel import expert_modules, no_experts, require_divisible
from moduli.parallel.layer import GatedLayer
from moduli.parallel.stochastic import StochasticLayer, require_whole, stochastic_layers

_MARK = "_moduli_gating_dropout"
Layer = GatedLayer | StochasticLayer


class AttachedGatingDropout:
    """Gating dropout of one model.

    Attributes:
        config: its settings.
        layers: the mixture layers in the order of the model.
        step: the optimiser step, from 0; None before the first `set_step`.
    """

    def __init__(self, config: GatingDropout, layers: list[Layer], device: torch.device) -> None:
        self.config, self.layers = config, layers
        self.step: int | None = None
        self._device = device
        sizes = [(layer.name, layer.num_experts, layer.ranks) for layer in layers]
        self._settings = config.fingerprint(*sizes)
        if is_distributed():
            require_agreement(self._settings, -1, device)

    def set_step(self, step: int) -> None:
        """Say which optimiser step comes next, once for all its micro-batches, on every rank.

        Args:
            step: from 0; a resumed run goes on with the number it would have had.

        Raises:
            ConfigError: no whole number from 0; or, with `debug`, ranks that are at other steps or
                have other settings.
            ModelError: ranks are to use different copies of an FFN (THOR) that is sharded.
        """
        decisions = self.config.decisions(step, len(self.layers))
        if is_distributed():
            if self.config.debug:
                require_agreement(self._settings, step, self._device)
            if self.config.sync == "broadcast":
                decisions = from_rank_0(decisions, self._device)
        self.step = step
        for layer, dropped in zip(self.layers, decisions, strict=True):
            if dropped and isinstance(layer, StochasticLayer):
                require_whole(layer)
            layer.step, layer.dropped = step, dropped

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the experts that drop in the current step."""
        return tuple(layer.name for layer in self.layers if layer.dropped)

    def callback(self) -> Any:
        """For `Trainer(callbacks=[...])`: sets the step from the Trainer's own count, which a
        resumed run continues."""
        from moduli.parallel.callback import GatingDropoutCallback

        return GatingDropoutCallback(self)

    def remove(self) -> None:
        """Let the model route as usual again; a second call does nothing."""
        for layer in self.layers:
            _take_off(layer)


def gating_dropout(
    model: nn.Module, config: GatingDropout, *, ranks: int | None = None
) -> AttachedGatingDropout:
    """Let training steps of a mixture model drop the exchange of tokens, in place.

    Args:
        model: with owned experts, converted or stock. Spread over real ranks by
            "gating_dropout" (`spread_experts`, or `DistributedConfig(ep_implementation=...)`), or
            whole in one process. Stochastic experts (THOR) are whole in every process.
        config: see `GatingDropout`.
        ranks: number of virtual ranks of a model that is whole: its experts are cut into so many
            blocks, and the rows of a batch into as many groups. None: real ranks.

    Raises:
        ConfigError: experts cannot be divided among the ranks, or ranks have other settings.
        ModelError: borrowed experts, no experts, another expert parallelism, gating dropout
            twice, or a router that the policy cannot use.
    """
    if ranks is not None and ranks < 1:
        raise ConfigError(f"ranks is {ranks}; expected 1 or more")
    _leave_copies(model)
    found, copies = expert_modules(model), stochastic_layers(model, config, ranks)
    if not found and not copies:
        raise no_experts(model)
    taken = [name for name, experts in found.items() if hasattr(experts, _MARK)]
    taken += [layer.name for layer in copies if layer.taken]
    if taken:
        raise ModelError(
            f"{taken[0]}: gating dropout is on this model already; call remove() on what "
            "gating_dropout returned"
        )
    sites = []
    for name, experts in found.items():
        exchange = _exchange_of(experts)
        sites.append((name, experts, exchange, *_ranks_of(name, experts, exchange, ranks)))
    gated: list[GatedLayer] = []
    try:
        for name, experts, exchange, count, rank in sites:
            owner = model.get_submodule(name.rpartition(".")[0])
            total: Any = experts.num_experts
            total = total if exchange is None else total * count
            block = _around(model, name.rpartition(".")[0])
            gated.append(GatedLayer(name, experts, owner, block, config, total, count, rank))
        device = next(model.parameters()).device
        attached = AttachedGatingDropout(config, [*gated, *copies], device)
    except Exception:
        for layer in gated:
            layer.remove()
        raise
    for layer, (name, experts, exchange, *_) in zip(gated, sites, strict=True):
        setattr(experts, _MARK, layer)
        if exchange is not None:
            exchange.gate, exchange.layer = layer, name
    for other in copies:
        other.attach()
    return attached


def _take_off(layer: Layer) -> None:
    layer.remove()
    if isinstance(layer, StochasticLayer) or vars(layer.experts).get(_MARK) is not layer:
        return
    delattr(layer.experts, _MARK)
    exchange = _exchange_of(layer.experts)
    if exchange is not None:
        exchange.gate = None


def _leave_copies(model: nn.Module) -> None:
    """Take off what came with a copy of a model under gating dropout: nobody else can."""
    for module in list(model.modules()):
        layer = vars(module).get(_MARK, getattr(module, "limit", None))
        if isinstance(layer, Layer) and layer.copied:
            _take_off(layer)


def _around(model: nn.Module, name: str) -> nn.Module | None:
    """The module that calls another; None if that is the model."""
    while name:
        name = name.rpartition(".")[0]
        found = model.get_submodule(name)
        if not isinstance(found, nn.ModuleList | nn.ModuleDict):
            return found
    return None


def _ranks_of(name: str, experts: Any, exchange: Any, ranks: int | None) -> tuple[int, int | None]:
    """How many ranks, and which is this; None for virtual ones."""
    if exchange is not None:
        if ranks is not None and ranks != exchange.ranks:
            raise ConfigError(
                f"ranks is {ranks}, but {name} is spread over {exchange.ranks} real ranks; leave "
                "ranks out"
            )
        return exchange.ranks, exchange.rank
    if getattr(experts, "_is_expert_parallel", False):
        raise ModelError(
            f"{name} is spread over ranks by another implementation; spread it by "
            'ep_implementation="gating_dropout"'
        )
    if ranks is None:
        raise ConfigError(
            "the experts are all in this process; say among how many virtual ranks to divide them "
            "(ranks=4), or spread them first (moduli.parallel.spread_experts)"
        )
    require_divisible(name, experts.num_experts, ranks)
    return ranks, None


def _exchange_of(experts: nn.Module) -> Any:
    """Our expert-parallel implementation of these experts; None if another or none is used."""
    return getattr(experts, "_moduli_exchange", None)
