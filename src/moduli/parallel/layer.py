"""One mixture layer under gating dropout: what its router and its experts do in a step that drops.

Everything hangs in hooks, so that modules, names and checkpoints stay what they are:

    router   a step that drops routes among experts of the token's rank ("paper", "masked_gate"):
             routers of moduli by their `select`, stock ones by their output
    experts  indices are brought onto the rank ("modulo"), or nothing is computed

On real ranks the experts then find all indices on their own rank and send nothing; on virtual ones
all experts are here, and each group of rows sees a block of them.
Letters: T tokens, D width, K experts per token, E experts, R ranks, L = E / R experts of a rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.parallel.decisions import GatingDropout, decided
from moduli.parallel.expert_parallel import CONTRACT
from moduli.parallel.gates import (
    renormalises,
    require_choice_by_logits,
    require_logits,
    require_no_correction,
)
from moduli.parallel.local import (
    Part,
    best_of,
    joined,
    parts_of,
    softmax_among,
    within,
    without_gradient,
    wrapped,
)
from moduli.routing import ExpertChoiceRouter, RouteContext, Router, Routing
from moduli.surgery.routed import RoutedLayer


class GatedLayer:
    """A mixture layer whose exchange can be dropped.

    Args:
        name: of the experts in the model.
        experts: on transformers' experts contract.
        owner: the module with the router and the experts.
        block: what the owner is a part of, if it is; its input tells rows from tokens where that of
            the owner does not.
        config: see `GatingDropout`.
        num_experts: E.
        ranks: R.
        rank: of this process; None where ranks are virtual.

    Attributes:
        dropped: whether the current step drops; None before `set_step`.
        step: the current one.
        copied: whether this came with a copy of a model, whose steps nobody sets.

    Raises:
        ModelError: the policy needs a router, and there is none that it understands.
    """

    def __init__(
        self,
        name: str,
        experts: nn.Module,
        owner: nn.Module,
        block: nn.Module | None,
        config: GatingDropout,
        num_experts: int,
        ranks: int,
        rank: int | None,
    ) -> None:
        self.name, self.experts, self.owner = name, experts, owner
        self.config, self.ranks, self.rank = config, ranks, rank
        self.num_experts, self.local = num_experts, num_experts // ranks
        self.dropped: bool | None = None
        self.step = 0
        self.copied = False
        self.rows: int | None = None  # of the batch that is passing through; None if unknown
        self._understood = False  # a stock gate, which has to be seen first
        self._renormalised = False  # its weights
        self.tokens = 0
        self.router: nn.Module | None = _router_in(owner)
        self._check()
        self._handles: list[Any] = []
        self._hang(block)

    def dropping(self) -> bool:
        """Whether this pass drops.

        Raises:
            ModelError: training, and nobody has said which step it is.
        """
        return self.experts.training and decided(self.name, self.dropped)

    @property
    def computes_nothing(self) -> bool:
        """Whether a pass that drops skips the experts as well."""
        return self.config.mode == "gate_expert_drop"

    def remove(self) -> None:
        """Take everything off that was hung in and still is."""
        for handle in self._handles:
            handle.remove()
        if self.router is not None and vars(self.router).get("select") == self.select:
            del self.router.select

    def __getstate__(self) -> dict[str, Any]:
        # What sets the step of a model does not know of its copies.
        return {**self.__dict__, "dropped": None, "copied": True}

    def _check(self) -> None:
        policy = self.config.local_policy
        if self.computes_nothing or policy == "modulo":
            return
        scoreless = self.router is None or getattr(self.router, "by_ids", False)
        if scoreless and (policy == "masked_gate" or self.local > 1):
            raise ModelError(
                f"{self.name}: local_policy={policy!r} chooses among the {self.local} experts of a "
                f"rank by their scores, and {type(self.owner).__name__} has no router with scores "
                'beside its experts; use local_policy="modulo"'
            )
        if policy == "masked_gate" and isinstance(self.router, ExpertChoiceRouter):
            raise ModelError(
                f"{self.name}: experts choose their tokens, among which no token can be kept on "
                'its rank by masking; use local_policy="paper" or "modulo"'
            )
        if self.router is not None and not isinstance(self.router, Router):
            require_no_correction(self.name, self.owner, self.experts, self.num_experts)

    def _hang(self, block: nn.Module | None) -> None:
        handles = self._handles
        if self.rank is None:
            if block is not None:
                handles.append(block.register_forward_pre_hook(self._see_rows, with_kwargs=True))
                handles.append(block.register_forward_hook(self._forget_rows))
            handles.append(self.owner.register_forward_pre_hook(self._see_rows, with_kwargs=True))
        if isinstance(self.router, Router):
            self.router.select = self.select  # type: ignore[method-assign]
        elif self.router is not None:
            # First, so that whoever records logits records those without a gradient.
            hook = self.router.register_forward_hook(self._stock_gate, prepend=True)
            handles.append(hook)
        if isinstance(self.owner, RoutedLayer) and not self.config.keeps_gate:
            handles.append(self.owner.register_forward_hook(self._no_auxiliary))
        before = self.experts.register_forward_pre_hook(self._keep_local, with_kwargs=True)
        handles += [before, self.experts.register_forward_hook(self._nothing)]

    def _parts(self, tokens: int) -> list[Part]:
        if self.rank is not None:
            return [(self.rank, slice(0, tokens))] if tokens else []
        if self.rows is None:
            raise ModelError(
                f"{self.name}: virtual ranks divide the rows of a batch, and nothing tells the "
                f"rows of {tokens} tokens: neither {type(self.owner).__name__} nor the module it "
                "is in got an input of three dimensions; call the whole model, or use real ranks"
            )
        return parts_of(tokens, self.rows, self.ranks, self.step)

    # --- routers ----------------------------------------------------------------------------------

    def select(self, scores: Tensor, context: RouteContext) -> Routing:
        """What the router's `select` does meanwhile.

        A rule that looks at the whole batch (capacity, experts that choose) looks at that of a rank
        in training, as it does where ranks are real.
        """
        if not self.experts.training:
            return self._usual(scores, context)
        dropping, parts = self.dropping(), self._parts(len(scores))
        confined = dropping and not self.computes_nothing and self.config.local_policy != "modulo"
        if parts and confined:
            routing = self._confined(self._usual(scores, context), context, parts)
        elif len(parts) > 1 and self._looks_at_batch:
            routing = joined([self._usual(scores[own], within(context, own)) for _, own in parts])
        else:
            routing = self._usual(scores, context)
        return without_gradient(routing) if dropping and not self.config.keeps_gate else routing

    def _usual(self, scores: Tensor, context: RouteContext) -> Routing:
        router: Any = self.router
        # Of the class: the router's own is `select` of this layer.
        routing: Routing = type(router).select(router, scores, context)
        return routing

    def _confined(self, full: Routing, context: RouteContext, parts: list[Part]) -> Routing:
        """The routing with every token on its rank."""
        scores = full.noisy_scores if full.noisy_scores is not None else full.scores
        if self.config.local_policy == "masked_gate":
            assert scores is not None
            found = [self._among(rank, scores[own], within(context, own)) for rank, own in parts]
            routing = joined(found)
            return replace(
                full, experts=routing.experts, weights=routing.weights, active=routing.active
            )
        if scores is None:
            experts = torch.cat([full.experts[own, :1] * 0 + rank for rank, own in parts])
        else:
            chosen = [best_of(scores[own].detach(), rank, self.local) for rank, own in parts]
            experts = torch.cat(chosen)
        weights = torch.ones_like(experts, dtype=full.weights.dtype)
        return replace(full, experts=experts, weights=weights, active=None)

    def _among(self, rank: int, scores: Tensor, context: RouteContext) -> Routing:
        """Usual routing over a rank's experts alone; noise is in the scores already."""
        router: Any = self.router
        rule, first = router.rule, rank * self.local
        router.rule = replace(rule, top_k=min(rule.top_k, self.local), noise=0.0)
        try:
            own = scores[:, first : first + self.local].contiguous()
            found = self._usual(own, replace(context, noise=None))
        finally:
            router.rule = rule
        return replace(found, experts=first + found.experts, scores=None, noisy_scores=None)

    @property
    def _looks_at_batch(self) -> bool:
        """Whether who is taken depends on other tokens."""
        router: Any = self.router
        limit = getattr(router, "capacity", None)
        limited = limit is not None and (
            limit.factor is not None or limit.rounding == "huggingface"
        )
        factor = router.rule.capacity_factor
        return isinstance(router, ExpertChoiceRouter) or bool(factor) or limited

    def _stock_gate(self, gate: nn.Module, args: Any, output: Any) -> Any:
        if not self.experts.training:
            return None
        dropping, policy = self.dropping(), self.config.local_policy
        if policy == "modulo" and not self.computes_nothing:
            return None
        self._understand(gate, output)
        if not dropping:
            return None
        logits, weights, index = output
        if self.computes_nothing:
            return logits.detach(), weights.detach(), index
        parts = self._parts(len(logits))
        if policy == "paper":
            chosen = [best_of(logits[own].detach(), rank, self.local) for rank, own in parts]
            index = torch.cat(chosen) if chosen else index[:, :1]
            return logits.detach(), torch.ones_like(index, dtype=weights.dtype), index
        found = [
            softmax_among(logits[own], index.shape[1], self._renormalised, rank, self.local)
            for rank, own in parts
        ]
        if found:
            weights = torch.cat([kept for kept, _ in found]).to(weights.dtype)
            index = torch.cat([chosen for _, chosen in found])
        return logits.detach(), weights, index

    def _understand(self, gate: nn.Module, output: Any) -> None:
        """Make sure, once, that a stock gate routes by softmax and top-k of its logits.

        Raises:
            ModelError: it does something else.
        """
        if self._understood:
            return
        require_logits(self.name, gate, output, self.num_experts)
        logits, weights, index = (part.detach() for part in output)
        if self.computes_nothing:
            self._understood = True
        elif len(logits):
            require_choice_by_logits(self.name, gate, logits, index)
            # Also where weights do not matter: gates that draw experts show in theirs at once, and
            # in their choice once in a while (Phimoe).
            found = renormalises(self.name, gate, logits, weights)
            self._renormalised, self._understood = found

    # --- experts and owner ------------------------------------------------------------------------

    def _see_rows(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if given and (given[0].dim() > 2 or not given[0].is_floating_point()):
            self.rows = given[0].shape[0]
        # Else its tokens are flat, and rows those of the block around it (OPT).

    def _forget_rows(self, block: nn.Module, args: Any, output: Any) -> None:
        self.rows = None

    def _keep_local(self, experts: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.dropping():
            return None
        given = dict(zip(CONTRACT, args, strict=False)) | kwargs
        x, index, weights = (given[name] for name in CONTRACT)
        self.tokens = len(x)
        if self.computes_nothing:
            if self.rank is not None:
                return None  # the exchange knows
            # One row, which nothing comes of.
            return (x[:1].detach(), index[:1], torch.zeros_like(weights[:1])), {}
        if self.router is None and self.config.local_policy == "paper":
            index, weights = index[:, :1], torch.ones_like(weights[:, :1])
        return (x, wrapped(index, self._parts(len(x)), self.local), weights), {}

    def _nothing(self, experts: nn.Module, args: Any, output: Any) -> Any:
        if self.computes_nothing and self.dropping() and self.rank is None:
            return output.new_zeros(self.tokens, *output.shape[1:])
        return None

    def _no_auxiliary(self, owner: Any, args: Any, output: Any) -> None:
        if self.dropping():
            owner.auxiliary = None


def _router_in(owner: nn.Module) -> nn.Module | None:
    """The router beside the experts: ours by its type, a stock one by its name."""
    children = dict(owner.named_children())
    ours = [child for child in children.values() if isinstance(child, Router)]
    return ours[0] if ours else children.get("gate", children.get("router"))
