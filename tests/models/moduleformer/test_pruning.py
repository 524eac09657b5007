"""Pruning: what is never used goes without a trace, what goes is what is used least."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import moduli
from moduli.errors import ConfigError, DataError, ModelError, UnknownNameError
from moduli.models.moduleformer import ModuleFormerForSequenceClassification
from moduli.models.moduleformer.growing import extend
from moduli.models.moduleformer.grown import settle
from moduli.models.moduleformer.pruning import prune
from moduli.models.moduleformer.sublayers import sublayers
from moduli.models.moduleformer.usage import ExpertUse, expert_use
from tests import tiny
from tests.models.moduleformer import small

GATES = ("mlp", "linear", "gmm")
BATCHES = [
    {
        "input_ids": small.tokens(3, 16, seed),
        "attention_mask": (torch.arange(16) < torch.tensor([[16], [11], [4]])).long(),
    }
    for seed in range(3)
]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(small.tokens()).logits
    return found


def starve(model: Any, experts: dict[str, list[int]]) -> None:
    """Make some experts improbable, for "mlp" gates: their logits are those of the farthest
    corner, which hidden vectors with a positive sum are far from."""
    for part in sublayers(model):
        gate = part.owner.gate
        with torch.no_grad():
            gate.w_gate[0].bias.fill_(3.0)  # all hidden vectors point to one side
            gate.w_gate[3].weight[experts[part.kind]] = -20.0


def test_use_is_counted_over_real_tokens() -> None:
    model = small.build(k_mlp=3)
    use = expert_use(model, BATCHES)
    assert use.tokens == 3 * (16 + 11 + 4)
    counts = torch.zeros(4, 5)
    mass = torch.zeros(4, 5)
    probability = torch.zeros(4, 5)
    for batch in BATCHES:
        for row in range(3):  # each text alone, without its padding
            ids = batch["input_ids"][row : row + 1, : int(batch["attention_mask"][row].sum())]
            with torch.no_grad():
                found = model(ids, output_router_logits=True)
            for i, (said, chosen) in enumerate(
                zip(found.router_logits, found.router_experts, strict=True)
            ):
                p, n = said.softmax(-1), said.shape[1]
                picked = torch.zeros_like(p).scatter(1, chosen, 1.0)
                counts[i, :n] += picked.sum(0)
                mass[i, :n] += (picked * p).sum(0)
                probability[i, :n] += p.sum(0)
    for i, router in enumerate(use.routers):
        n = len(router.frequency)
        assert (router.kind, router.layer) == (["attention", "feed_forward"][i % 2], i // 2)
        assert sum(router.frequency) == pytest.approx(2 if i % 2 == 0 else 3)
        assert sum(router.probability) == pytest.approx(1)
        torch.testing.assert_close(torch.tensor(router.frequency), counts[i, :n] / use.tokens)
        torch.testing.assert_close(torch.tensor(router.mass), mass[i, :n] / use.tokens)
        torch.testing.assert_close(
            torch.tensor(router.probability), probability[i, :n] / use.tokens
        )


def test_experts_that_are_never_used_go_without_a_trace() -> None:
    model = small.build(gating_size=32, n_mlp_experts=6)
    starve(model, {"attention": [1], "feed_forward": [0, 4]})
    use = expert_use(model, BATCHES)
    for router, gone in zip(use.routers, [(1,), (0, 4)] * 2, strict=True):
        assert all(router.probability[e] < 1e-7 and router.frequency[e] == 0 for e in gone)
    before = logits(model)
    report = prune(model, use, keep=0.7)  # 3 of 4, 5 of 6: one of the starved ones stays
    assert [router.kept[:2] for router in report.routers if router.kind == "attention"] == [
        (0, 2)
    ] * 2
    assert report.dropped_mass < 1e-7
    assert (model.config.n_att_experts, model.config.n_mlp_experts) == (3, 5)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("by", ["frequency", "mass"])
@pytest.mark.parametrize("gate", GATES)
def test_a_pruned_model_is_one_whose_other_experts_are_shut(gate: str, by: Any) -> None:
    """Its gates are those of a softmax over the kept experts alone, and so is everything else."""
    model = small.build(gate_type=gate)
    use = expert_use(model, BATCHES)
    pruned = copy.deepcopy(model)
    report = moduli.prune(pruned, use, keep=3, by=by)
    for router, seen, part in zip(report.routers, use.routers, sublayers(model), strict=True):
        scores = getattr(seen, by)
        assert min(scores[e] for e in router.kept) >= max(
            scores[e] for e in range(router.experts) if e not in router.kept
        )
        assert router.dropped_mass == pytest.approx(
            1 - sum(seen.probability[e] for e in router.kept)
        )
        shut = [e for e in range(router.experts) if e not in router.kept]
        part.owner.gate.register_forward_pre_hook(lambda *_: None)
        part.owner.gate.scores = _without(part.owner.gate.scores, shut)
    torch.testing.assert_close(logits(pruned), logits(model), rtol=0, atol=2e-6)


def _without(scores: Any, shut: list[int]) -> Any:
    return lambda x: scores(x).index_fill(1, torch.tensor(shut), -torch.inf)


def test_uniform_pruning_loads_in_the_published_format(tmp_path: Path) -> None:
    model = small.build()
    report = prune(model, expert_use(model, BATCHES), keep=0.5)
    assert report.uniform
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.n_att_experts, config.n_mlp_experts) == (2, 3)
    assert config.att_experts_per_layer is None
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert report.parameters[1] == sum(p.numel() for p in again.parameters())
    made = again.generate(small.tokens(1, 4), max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 7)


def test_layers_may_keep_different_numbers(tmp_path: Path) -> None:
    model = small.build(n_mlp_experts=6)
    use = skewed(model)
    report = prune(model, use, keep=0.6, per_layer=True)
    kept = [len(router.kept) for router in report.routers]
    assert not report.uniform
    assert "the published code cannot" in str(report)
    assert kept[0] + kept[2] == 2 * 3  # 0.6 of 4 is 3, in all layers together
    assert kept[1] + kept[3] == 2 * 4
    assert kept[1] < kept[3]
    assert min(kept) >= 2
    assert model.config.mlp_experts_per_layer == [kept[1], kept[3]]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def skewed(model: Any) -> ExpertUse:
    """In the first layer one feed-forward expert does nearly everything."""
    use = expert_use(model, BATCHES)
    flat = (0.95, 0.75, 0.1, 0.1, 0.05, 0.05)
    first = use.routers[1]
    routers = list(use.routers)
    routers[1] = type(first)(first.kind, first.layer, flat, flat, tuple(x / 2 for x in flat))
    return ExpertUse(use.tokens, tuple(routers))


def test_a_threshold_keeps_what_is_used_and_never_fewer_than_k() -> None:
    model = small.build(n_mlp_experts=6)
    use = skewed(model)
    report = prune(copy.deepcopy(model), use, threshold=0.09)
    assert report.routers[1].kept == (0, 1, 2, 3)
    for router, seen in zip(report.routers, use.routers, strict=True):
        assert router.kept == tuple(e for e, f in enumerate(seen.frequency) if f >= 0.09)
    report = prune(model, use, threshold=1.0)
    assert all(len(router.kept) == 2 for router in report.routers)
    assert report.uniform  # all layers have the same number after all


def test_keeping_everything_changes_nothing() -> None:
    model = small.build()
    before = logits(model)
    report = prune(model, expert_use(model, BATCHES), keep=1.0)
    assert torch.equal(logits(model), before)
    assert report.dropped_mass == 0
    assert report.parameters[0] == report.parameters[1]


def test_pruned_models_grow_and_grown_ones_are_pruned() -> None:
    model = small.build()
    prune(model, expert_use(model, BATCHES), keep=3)
    extend(model, attention=2)
    prune(model, expert_use(model, BATCHES), keep=2)
    assert (model.config.n_att_experts, model.config.n_mlp_experts) == (2, 2)
    settle(model)
    assert len(logits(model)) == 2


def test_a_classifier_is_pruned_too() -> None:
    model = small.build(auto=ModuleFormerForSequenceClassification, pad_token_id=0)
    report = prune(model, expert_use(model, BATCHES), keep=0.5)
    assert [len(router.kept) for router in report.routers] == [2, 3] * 2


@pytest.mark.parametrize(
    ("error", "settings", "says"),
    [
        (
            ConfigError,
            {"keep": 0.2},
            r"leaves 1 of 4 attention.*keep at least 2, or a share of 0.5",
        ),
        (ConfigError, {"keep": 1}, "keep at least 2"),
        (ConfigError, {"keep": 0}, "keep at least 2"),
        (ConfigError, {"keep": 5}, "a layer has 4 attention experts"),
        (ConfigError, {"keep": 1.5}, "a share above 0 and up to 1"),
        (ConfigError, {"keep": -0.5}, "a share above 0"),
        (ConfigError, {}, "exactly one of keep and threshold"),
        (ConfigError, {"keep": 0.5, "threshold": 0.1}, "exactly one"),
        (ConfigError, {"threshold": 5.0}, "threshold is 5; it is a share of the tokens"),
        (ConfigError, {"threshold": float("nan")}, "threshold is nan"),
        (UnknownNameError, {"keep": 0.5, "by": "frequencies"}, "'frequency'"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_what_cannot_be_kept_is_said_and_nothing_is_changed(
    error: type[Exception], settings: dict[str, Any], says: str
) -> None:
    model = small.build()
    use, before = expert_use(model, BATCHES), logits(model)
    with pytest.raises(error, match=says):
        prune(model, use, **settings)
    assert torch.equal(logits(model), before)
    assert model.config.n_att_experts == 4


def test_other_models_and_other_use_are_refused() -> None:
    with pytest.raises(ModelError, match="moduli compare --pruned"):
        moduli.prune(tiny.build("llama"), None, keep=0.5)
    use = expert_use(small.build(n_mlp_experts=4), BATCHES)
    with pytest.raises(ConfigError, match="measure it on this model"):
        prune(small.build(), use, keep=0.5)
    with pytest.raises(DataError, match="no tokens"):
        expert_use(small.build(), [])
