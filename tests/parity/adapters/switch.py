"""Cases of Switch Transformer and GShard: the gates of fairseq, the sparse layer of transformers.

In these cases `inputs` and `expected` are lists of the names of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from moduli.experts.bank import ExpertBank
from moduli.experts.ffn import ExpertFFN
from moduli.losses.balance import switch_loss
from moduli.losses.z_loss import z_loss
from moduli.routing import Capacity, RouteContext, Routing, Rule, SwitchRouter, slots
from tests.parity.case import Case, Check


class Named:
    """Compares tensors of a case by name, which is all that its lists give."""

    def __init__(self, case: Case, check: Check) -> None:
        self.case, self.check = case, check
        self.seen: set[str] = set()

    def close(self, name: str, got: Tensor) -> None:
        want = self.case.tensors[name].double()
        have = got.detach().double()
        have = have.reshape(want.shape) if have.numel() == want.numel() == 1 else have
        self.seen.add(name)
        if have.shape != want.shape:
            self.check.true(False, f"{name}: shape {tuple(have.shape)}, not {tuple(want.shape)}")
            return
        error = (have - want).abs()
        self.check.largest = max(self.check.largest, float(error.max()) if error.numel() else 0.0)
        allowed = self.case.atol + self.case.rtol * want.abs()
        self.check.true(bool((error <= allowed).all()), f"{name}: off by {float(error.max()):.3g}")

    def same(self, name: str, got: Tensor) -> None:
        want = self.case.tensors[name]
        self.seen.add(name)
        equal = got.shape == want.shape and torch.equal(got.to(want.dtype), want)
        self.check.true(equal, f"{name}: differs")

    def finish(self) -> None:
        left = sorted(set(self.case.data["expected"]) - self.seen)
        self.check.true(not left, f"not compared: {', '.join(left)}")
        self.check.seen |= self.seen


def dispatch(case: Case, check: Check) -> None:
    """Logits to slots: fairseq's gates, with what only they do to padding."""
    hyper: Mapping[str, Any] = case.data["hyper"]
    logits = case.tensors["logits"].clone().requires_grad_()
    tokens, num_experts = logits.shape
    real = ~case.tensors["padding_mask"] if "padding_mask" in case.tensors else None
    router, context = gate(case.kind, hyper, num_experts), context_of(hyper, real)
    routing = router.select(logits, context)
    top_k = routing.experts.shape[1]
    limit = router.capacity.limit(tokens, num_experts, top_k, context.training)
    check.true(
        "capacity" not in hyper or limit == hyper["capacity"],
        f"capacity {limit}, not {hyper.get('capacity')}",
    )
    wanted = Named(case, check)
    combine, taken = in_slots(routing, router, context, tokens if limit is None else limit)
    if "combine" in case.data["expected"]:
        wanted.close("combine", combine)
    if "dispatch" in case.data["expected"]:
        wanted.same("dispatch", taken)
    aux = switch_loss(logits, routing.experts[:, :1], real)
    if "aux_loss" in case.data["expected"]:
        wanted.close("aux_loss", aux)
    if "grad_logits_aux" in case.data["expected"]:
        wanted.close("grad_logits_aux", torch.autograd.grad(aux, logits)[0])
    wanted.finish()


def gate(kind: str, hyper: Mapping[str, Any], num_experts: int) -> SwitchRouter:
    """The router of a case; what a case does not name is as fairseq has it."""
    top_k = 1 if kind.startswith("top1") else 2
    capacity = Capacity(
        rounding="fairseq",
        factor=hyper.get("capacity_factor", 1.0),
        order="probability" if hyper.get("batch_prioritized_routing") else "position",
        in_evaluation=True,
        share=max(hyper.get("eval_capacity_token_fraction", 0.0), 0.0),
        count_padding=True,
    )
    return SwitchRouter(
        4,
        num_experts,
        Rule(top_k=top_k, combine="probability"),
        capacity=capacity,
        second=hyper.get("second_expert_policy", "all").split()[0],
        renormalise="before" if hyper.get("normalize_before_dropping") else "after",
    )


def context_of(hyper: Mapping[str, Any], real: Tensor | None) -> RouteContext:
    """Training unless the case says evaluation; chance starts at its seed."""
    generator = torch.Generator().manual_seed(hyper.get("seed", 0))
    return RouteContext(training=not hyper.get("eval_mode"), real=real, generator=generator)


def in_slots(
    routing: Routing, router: SwitchRouter, context: RouteContext, limit: int
) -> tuple[Tensor, Tensor]:
    """Weight [S, E, C] of every token in every slot, and whether there is one."""
    assert routing.scores is not None
    active = routing.active
    if active is None:
        active = torch.ones_like(routing.experts, dtype=torch.bool)
    scores = routing.scores.detach()
    by_probability = router.capacity.order == "probability"
    priority = scores.softmax(-1).amax(-1) if by_probability else None
    # Who was dropped stands behind those who were not: leaving them out changes no place.
    places = slots(routing.experts, scores.shape[1], priority, active)
    combine = scores.new_zeros(*scores.shape, limit)
    taken = torch.zeros_like(combine, dtype=torch.bool)
    for token, rank in active.nonzero().tolist():
        where = (token, int(routing.experts[token, rank]), int(places[token, rank]))
        combine[where] = routing.weights[token, rank].detach()
        # The reference dispatches where the weight is not 0.
        taken[where] = bool(combine[where] != 0)
    return combine, taken


def sparse_mlp(case: Case, check: Check) -> None:
    """The layer of transformers: its router, its experts, its two losses and their gradients."""
    hyper: Mapping[str, Any] = case.data["hyper"]
    tensors = case.tensors
    x = tensors["x"].clone().requires_grad_()
    batch, length, hidden = x.shape
    num_experts = hyper["num_experts"]
    router = SwitchRouter(
        hidden,
        num_experts,
        Rule(top_k=1, combine="probability"),
        capacity=Capacity("huggingface", per_sequence=hyper["expert_capacity"], in_evaluation=True),
        init=tensors["router_weight"],
    ).eval()
    experts = range(num_experts)
    bank = ExpertBank(
        ExpertFFN(
            keys=[tensors[f"expert{e}.wi"] for e in experts],
            values=[tensors[f"expert{e}.wo"].T for e in experts],
        ),
        ACT2FN[hyper["activation"]],
    )
    flat = x.reshape(-1, hidden)
    routing = router(flat, RouteContext(shape=(batch, length)))
    assert routing.scores is not None
    assert routing.active is not None
    logits = routing.scores.reshape(batch, length, num_experts)
    first = routing.experts.reshape(batch, length, 1)
    output = bank(flat, routing.experts, routing.weights * routing.active).reshape(x.shape)
    # The balance loss of this reference is the mean of those of its sequences.
    aux = torch.stack([switch_loss(*row) for row in zip(logits, first, strict=True)]).mean()
    z = z_loss(routing.scores)
    total = (output * tensors["upstream"]).sum()
    total = total + hyper["aux_coef_in_grad"] * aux + hyper["z_coef_in_grad"] * z
    grad_x, grad_router = torch.autograd.grad(total, [x, router.gate.weight])
    found = {
        "logits": logits,
        "router_prob": routing.weights.reshape(batch, length, 1),
        "combine": routing.gates(num_experts).reshape(logits.shape),
        "output": output,
        "aux_loss": aux,
        "z_loss": z,
        "grad_x": grad_x,
        "grad_router": grad_router,
    }
    wanted = Named(case, check)
    for name in set(found) & set(case.data["expected"]):
        wanted.close(name, found[name])
    if "dispatch" in case.data["expected"]:
        kept = torch.zeros_like(routing.scores).scatter(1, routing.experts, routing.active.float())
        wanted.same("dispatch", kept.reshape(logits.shape))
    dropped = int((~routing.active).sum())
    check.true(
        hyper.get("dropped_tokens", case.data.get("dropped_tokens", dropped)) == dropped,
        f"{dropped} tokens were dropped",
    )
    wanted.finish()


KINDS: dict[str, Callable[[Case, Check], None]] = {
    "switch_sparse_mlp": sparse_mlp,
    "top1_dispatch": dispatch,
    "top2_dispatch": dispatch,
}
