"""Experts while new ones are trained beside old ones that stay as they are.

Old and new experts are parameters of their own, so that no optimiser, weight decay or clipping
ever touches an old one; nothing large is joined to compute. In a state dict they are one tensor
under its ordinary name: checkpoints of a model that is growing are ordinary ones.

    GrownExpertLinear   matrices of attention experts
    GrownExperts        feed-forward experts, on transformers' experts contract
    GrownRouter         a router of any type with more rows

Each holds the `old` module, which `settled` gives back with all parts in it. The functions at the
end say in which state a whole model is: growing with new experts open, growing with them closed, or
settled.
Letters: T tokens, D width, E experts, N new ones among them, K experts per token.
Source: ModuleFormer (arXiv 2306.04640); the published code has no code for growing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from moduli.errors import ModelError
from moduli.experts.kernels.order import Order
from moduli.experts.linear import routed_linear
from moduli.models.moduleformer.experts import ExpertLinear, ModuleFormerExperts
from moduli.models.moduleformer.routers import ModuleFormerRouter
from moduli.models.moduleformer.sublayers import put_parameter
from moduli.routing import RouteContext, Router, Routing


class Grown(nn.Module):
    """An old module and the new part of some of its parameters.

    Attributes:
        old: the module as it was.
        joined: by the name of a parameter of `old`, the name here of what follows it.
    """

    old: nn.Module
    joined: dict[str, str]

    def _show_as_one(self) -> None:
        self.register_state_dict_post_hook(_join)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_split)  # type: ignore[no-untyped-call]

    def pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Old and new part of every parameter that has both."""
        for theirs, ours in self.joined.items():
            yield self.old.get_parameter(theirs), self.get_parameter(ours)

    def settled(self) -> nn.Module:
        """`old`, with the new parts in its parameters."""
        with torch.no_grad():
            for name, (old, new) in zip(self.joined, list(self.pairs()), strict=True):
                put_parameter(self.old, name, torch.cat([old, new]), trains=True)
        return self.old


def _join(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The state of a `Grown` module as that of an ordinary one."""
    for theirs, ours in module.joined.items():
        old, new = state.pop(f"{prefix}old.{theirs}"), state.pop(prefix + ours)
        state[prefix + theirs] = torch.cat([old, new])
    for name in [name for name in state if name.startswith(f"{prefix}old.")]:
        state[prefix + name.removeprefix(f"{prefix}old.")] = state.pop(name)


def _split(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The reverse. What does not fit is left to PyTorch, which says so by its ordinary name."""
    for name in [name for name in state if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        if own in module.joined:
            old = module.old.get_parameter(own)
            whole = state.pop(name)
            state[f"{prefix}old.{own}"] = whole[: len(old)]
            state[prefix + module.joined[own]] = whole[len(old) :]
        else:
            state[f"{prefix}old.{own}"] = state.pop(name)


class GrownExpertLinear(Grown):
    """One matrix per expert, some frozen.

    Args:
        old: matrices that stay.
        new: matrices that follow.
    """

    old: ExpertLinear

    def __init__(self, old: ExpertLinear, new: ExpertLinear) -> None:
        super().__init__()
        self.old, self.new = old, new
        self.joined = {"weight": "new.weight"}
        self._show_as_one()

    def forward(self, rows: Float[Tensor, "S I"], order: Order) -> Float[Tensor, "S O"]:
        return routed_linear(rows, [self.old.weight, self.new.weight], order)


class GrownExperts(Grown):
    """Feed-forward experts, some frozen. Each part leaves out the slots of the other, as experts
    do that are spread over processes.

    Args:
        old: experts that stay.
        new: experts that follow.
    """

    old: ModuleFormerExperts
    new: ModuleFormerExperts

    def __init__(self, old: ModuleFormerExperts, new: ModuleFormerExperts) -> None:
        super().__init__()
        self.old, self.new = old, new
        _share_slots(old, new)
        self.joined = {"up_proj": "new.up_proj", "down_proj": "new.down_proj"}
        self._show_as_one()

    @property
    def num_experts(self) -> int:
        """E, of both."""
        return int(self.old.num_experts + self.new.num_experts)

    def forward(
        self,
        hidden_states: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Sum over slots of weight * expert(token)."""
        before, nowhere = self.old.num_experts, self.new.num_experts
        later = (top_k_index - before).where(top_k_index >= before, nowhere)
        y: Tensor = self.old(hidden_states, top_k_index, top_k_weights)
        more: Tensor = self.new(hidden_states, later, top_k_weights)
        return y + more

    def settled(self) -> nn.Module:
        self.old.num_experts = self.num_experts
        _share_slots(self.old, shared=False)
        return super().settled()


def _share_slots(*parts: Any, shared: bool = True) -> None:
    """Let experts leave out the slots of others, as transformers has it."""
    for part in parts:
        part._is_expert_parallel = shared


class GrownRouter(Router, Grown):
    """A router with more rows.

    Args:
        old: the router as it was; of it nothing is trained.
        rows: name of its parameter with one row per expert.
        new: rows that follow.

    Attributes:
        closed: the new experts have logits of minus infinity, and everything is as before.
    """

    old: ModuleFormerRouter

    def __init__(self, old: ModuleFormerRouter, rows: str, new: Float[nn.Parameter, "N G"]) -> None:
        super().__init__(old.num_experts + len(new), old.rule)
        self.old = old
        self.rows = new
        self.joined = {rows: "rows"}
        self.closed = False
        self._show_as_one()

    def forward(self, x: Float[Tensor, "T D"], context: RouteContext) -> Routing:
        if self.closed:
            routing: Routing = self.old(x, context)
            assert routing.scores is not None
            shut = x.new_full((len(x), len(self.rows)), -torch.inf, dtype=routing.scores.dtype)
            scores = torch.cat([routing.scores, shut], dim=1)
            return replace(routing, scores=scores, noisy_scores=scores)
        ((name, (old, new)),) = zip(self.joined, self.pairs(), strict=True)
        # The rows are small: joined, they give what the settled router will give, bit for bit.
        rows = torch.cat([old, new])
        return functional_call(self.old, {name: rows}, (x, context))  # type: ignore[no-any-return]

    def freeze(self, frozen: bool) -> None:
        """Leave the new rows as they are in training, or let them learn; old ones stay."""
        self.rows.requires_grad_(not frozen)

    def settled(self) -> nn.Module:
        self.old.num_experts = self.num_experts
        return super().settled()


def new_parameters(model: Any) -> list[nn.Parameter]:
    """The new experts and rows of a model that is growing."""
    return [new for module in _grown(model) for _, new in module.pairs()]


def new_rows(model: Any) -> list[nn.Parameter]:
    """The new rows of the routers of a model that is growing."""
    return [module.rows for module in _grown(model) if isinstance(module, GrownRouter)]


def train_only_new(model: Any) -> None:
    """Freeze all parameters but those of new experts and their rows; `extend` does it too.

    Raises:
        ModelError: the model is not growing.
    """
    new = set(new_parameters(model))
    if not new:
        raise ModelError(_NOT_GROWING)
    for module in model.modules():
        own = list(module.named_parameters(recurse=False))
        vars(module).setdefault(_TRAINED, {name: p.requires_grad for name, p in own})
        for _, parameter in own:
            parameter.requires_grad_(parameter in new)
            if parameter not in new:
                parameter.grad = None  # an optimiser that was made before would act on it


_TRAINED = "_trained_before_growing"
"""Attribute of modules: by the name of a parameter, whether it was trained before."""


def settle(model: Any) -> None:
    """Make ordinary modules of a model that is growing, in place; what was trained before it grew
    trains again.

    Parameters and routing are the same bit for bit. Experts give the same up to the order in
    which the outputs of a token's experts are summed. A model that is not growing is left alone.
    """
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, Grown)]
    for path, module in found:
        model.set_submodule(path, module.settled())
    for module in model.modules():
        for name, trained in vars(module).pop(_TRAINED, {}).items():
            module.get_parameter(name).requires_grad_(trained)


@contextmanager
def closed(model: Any) -> Iterator[None]:
    """While inside, new experts have logits of minus infinity: the function is the old one.

    Raises:
        ModelError: the model is not growing.
    """
    routers = [module for module in _grown(model) if isinstance(module, GrownRouter)]
    if not routers:
        raise ModelError(_NOT_GROWING)
    before = [router.closed for router in routers]
    try:
        for router in routers:
            router.closed = True
        yield
    finally:
        for router, was in zip(routers, before, strict=True):
            router.closed = was


_NOT_GROWING = (
    "no experts are being added to this model: extend(model, ...) does, and settle(model) or "
    "saving and loading ends it, after which new and old experts are the same"
)


def _grown(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, Grown))
