"""Cases of Gating Dropout: the layer of NLLB on several ranks, with its exchange and without.

The ranks are virtual: the rows of rank r are the r-th group of the batch. Evaluation has no virtual
ranks, so that there each rank's tokens pass by themselves, as its capacity is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moduli.experts.bank import ExpertBank
from moduli.experts.ffn import ExpertFFN
from moduli.losses.balance import switch_loss
from moduli.parallel import GatingDropout, gating_dropout
from moduli.routing import Capacity, RouteContext, Rule, SwitchRouter
from tests.parity.adapters.switch import Named
from tests.parity.case import Case, Check


class Layer(nn.Module):
    """Router and experts of a case.

    Attributes:
        aux: balance loss of every rank's tokens in the last pass.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        hyper: Mapping[str, Any] = case.data["hyper"]
        tensors, count, top_k = case.tensors, hyper["num_experts"], hyper["top_k"]
        capacity = Capacity(
            rounding="fairseq",
            factor=hyper.get("capacity_factor") or 1.0,
            in_evaluation=True,
            share=hyper.get("eval_capacity_token_fraction", 0.25),
            count_padding=True,
        )
        self.router = SwitchRouter(
            hyper["d_model"],
            count,
            Rule(top_k=top_k, combine="probability"),
            capacity=capacity,
            renormalise="before" if hyper.get("normalize_before_dropping") else "after",
            init=tensors["router_weight"],
        )
        names = [f"expert{e}" for e in range(count)]
        self.experts = ExpertBank(
            ExpertFFN(
                keys=[tensors[f"{name}.fc1.weight"] for name in names],
                values=[tensors[f"{name}.fc2.weight"].T for name in names],
                key_bias=[tensors[f"{name}.fc1.bias"] for name in names],
                out_bias=torch.stack([tensors[f"{name}.fc2.bias"] for name in names]),
            ),
            ACT2FN[hyper["activation"]],
        )
        self.ranks = hyper["ranks"]
        self.aux: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        routing = self.router(flat, RouteContext(training=self.training))
        assert routing.scores is not None
        scores, first = routing.scores, routing.experts[:, :1]
        parts = zip(scores.chunk(self.ranks), first.chunk(self.ranks), strict=True)
        self.aux = [switch_loss(*part) for part in parts]
        weights = routing.weights
        weights = weights if routing.active is None else weights * routing.active
        y: Tensor = self.experts(flat, routing.experts, weights)
        return y.view_as(x)

    def expert_gradients(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By the names of a case."""
        found = {}
        for e in range(self.experts.num_experts):
            found[f"expert{e}.fc1.weight"] = grads["up_proj"][e]
            found[f"expert{e}.fc1.bias"] = grads["up_proj_bias"][e]
            found[f"expert{e}.fc2.weight"] = grads["down_proj"][e]
            found[f"expert{e}.fc2.bias"] = grads["down_proj_bias"][e]
        return found


def layer(case: Case, check: Check) -> None:
    """Outputs, balance losses and gradients, with the exchange and without, and evaluation."""
    wanted, stored = Expected(case, check), Layer(case)
    ranks = range(stored.ranks)
    inputs = [case.tensors[f"rank{r}.x"] for r in ranks]
    check.true(len({len(x) for x in inputs}) == 1, "ranks have different numbers of rows")
    configs = {
        "exchange": GatingDropout(p=0.0),
        "dropped": GatingDropout(p=1.0, local_policy="modulo"),
        "paper_gate_drop": GatingDropout(p=1.0),
    }
    for name, config in configs.items():
        x = torch.cat(inputs).requires_grad_()
        attached = gating_dropout(stored.train(), config, ranks=stored.ranks)
        attached.set_step(0)
        y = stored(x)
        attached.remove()
        for r, (own, aux) in enumerate(zip(y.chunk(stored.ranks), stored.aux, strict=True)):
            wanted.close(f"rank{r}.{name}.y", own)
            wanted.close(f"rank{r}.{name}.aux", aux)
        gradients(case, wanted, stored, name, x, y)
    stored.eval()
    for r in ranks:
        stored.ranks = 1
        with torch.no_grad():
            wanted.close(f"rank{r}.eval.y", stored(inputs[r]))
    wanted.finish()


def gradients(case: Case, wanted: Expected, stored: Layer, name: str, x: Tensor, y: Tensor) -> None:
    """Of the sum over ranks; of the router by rank."""
    parameters = dict(stored.experts.named_parameters())
    losses = [
        (own * case.tensors[f"rank{r}.upstream"]).sum()
        for r, own in enumerate(y.chunk(stored.ranks))
    ]
    found = torch.autograd.grad(
        torch.stack(losses).sum(), [x, *parameters.values()], retain_graph=True
    )
    experts = stored.expert_gradients(dict(zip(parameters, found[1:], strict=True)))
    for path, grad in experts.items():
        wanted.close(f"{name}.grad_{path}", grad)
    for r, own in enumerate(found[0].chunk(stored.ranks)):
        wanted.close(f"rank{r}.{name}.grad_x", own)
        gate = stored.router.gate.weight
        (grad,) = torch.autograd.grad(
            losses[r], gate, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        wanted.close(f"rank{r}.{name}.grad_router", grad)


class Expected(Named):
    """What a case stores; its list of what is expected names ranks and experts by a letter."""

    def close(self, name: str, got: Tensor) -> None:
        if name in self.case.tensors:
            super().close(name, got)

    def finish(self) -> None:
        """Every stored tensor is an input or was compared."""
        inputs = ("router_weight", "expert")
        left = [
            name
            for name in self.case.tensors
            if name not in self.seen
            and not name.startswith(inputs)
            and name.rpartition(".")[2] not in ("x", "upstream")
        ]
        self.check.true(not left, f"not compared: {', '.join(sorted(left))}")
        self.check.true(bool(self.seen), "nothing is stored")
        self.check.seen |= set(self.case.data["expected"])


KINDS: dict[str, Callable[[Case, Check], None]] = {"expert_parallel_layer": layer}
