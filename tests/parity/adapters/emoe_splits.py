"""Cases of EMoE's relatives: LLaMA-MoE's gradient splits and MoEfication's selection rules."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from moduli.experts import gather_experts, members_of, run_experts
from moduli.routing import (
    GroundTruthRouter,
    MLPRouter,
    RouteContext,
    Router,
    Rule,
    SimilarityRouter,
)
from moduli.routing.moefication import key_centers
from moduli.surgery.partition import greedy_labels, inner_sharing_members, inter_sharing
from moduli.training.router_fit import selection_loss
from tests.parity.case import Case, Check


def importance_split(case: Case, check: Check) -> None:
    """Every expected output says by its name how it was made: construction.max or .min."""
    scores, config = case.given("importance"), case.config
    for name in case.data["expected"]:
        construction, criterion, _ = name.split(".")
        largest = criterion == "max"
        if construction == "independent":
            check.same(name, greedy_labels(scores, largest=largest))
        elif construction == "sharing_inner":
            size = config["expert_size_inner_sharing"]
            check.same(name, torch.stack(inner_sharing_members(scores, size, largest=largest)))
        else:
            shape = config["residual"]
            split = inter_sharing(
                scores[: shape["n_moe"]],
                shape["expert_size"],
                shape["n_residual"],
                share=construction == "residual_sharing",
                largest=largest,
            )
            check.same(name, torch.stack([*split.residual, *split.routed]))


def moefication(case: Case, check: Check) -> None:
    config, x = case.config, case.given("x")
    conv = str(config.get("layout", "")).startswith("Conv1D")
    w1, w2 = case.given("w1"), case.given("w2")
    all_keys, values = (w1.T if conv else w1), (w2 if conv else w2.T)
    experts = config["num_experts"]
    members = members_of(case.given("labels").long(), experts)
    sizes = tuple(len(m) for m in members)
    order = torch.cat(members)
    keys, b1 = all_keys[order], case.given("b1")[order]
    act: Callable[[Tensor], Tensor] = ACT2FN[config["activation"]]
    rule = Rule(config["top_k"])
    parts = gather_experts(all_keys, values, members, key_bias=case.given("b1"))

    def compare(name: str, router: Router) -> None:
        routing = router(x, RouteContext())
        check.close(f"{name}.scores", routing.scores)
        check.same(f"{name}.ids", routing.experts)
        check.close(f"{name}.y", run_experts(x, routing, parts, act) + case.given("b2"))

    truth = GroundTruthRouter(lambda: keys, sizes, rule, bias=lambda: b1, activation=act)
    compare("ground_truth", truth)
    pre = truth.from_preactivations(F.linear(x, keys, b1), b1)
    check.close("ground_truth.scores", pre, "ground truth from pre-activations")
    centers = key_centers(keys, sizes)
    check.close("similarity.centers", centers)
    compare("similarity", SimilarityRouter(lambda: keys, sizes, rule))

    target = truth.scores(x)
    check.close("mlp_router.target", target / target.max())
    logits = MLPRouter(x.shape[1], experts, rule, init=centers).scores(x)
    check.close("mlp_router.initial_logits", logits)
    check.close("mlp_router.initial_bce", selection_loss(logits, target))


KINDS: dict[str, Callable[[Case, Check], None]] = {
    "importance_split": importance_split,
    "moefication": moefication,
}
