"""Static pruning is the routed model whose routers always choose the most used experts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import moduli
from moduli.errors import ConfigError, ModelError
from moduli.routing import Router
from moduli.surgery.modular import routed_layers
from moduli.surgery.static import prune_statically
from tests import tiny

FAMILIES = ("bert", "vit", "gpt2", "llama")
USAGE = [3.0, 50.0, 7.0, 0.0, 40.0]  # of five experts of unequal size; 1 and 4 are used most


class Constant(Router):
    """Scores that do not look at the token."""

    def __init__(self, like: Router, scores: list[float], top_k: int) -> None:
        super().__init__(like.num_experts, dataclasses.replace(like.rule, top_k=top_k))
        self.constant = torch.tensor(scores)
        self.by_neurons = like.by_neurons

    def scores(self, x: Tensor) -> Tensor:
        return self.constant.expand(len(x), -1)

    def from_preactivations(self, z: Tensor, bias: Tensor | None) -> Tensor:
        return self.scores(z)


def converted(family: str, **changes: Any) -> Any:
    model = tiny.build(family)
    settings = {"num_experts": 5, "top_k": 2, "layers": "all", **changes}
    moduli.convert(model, moduli.EMoE(**settings))
    return model


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    found: Tensor = model.eval()(**tiny.batch(tiny.rows(family, 4, seed=1))).logits
    return found


def usage_of(model: Any, counts: Sequence[float] | None = None) -> dict[str, list[int | float]]:
    return {name: list(counts or USAGE) for name in routed_layers(model)}


@pytest.mark.parametrize("keep", [None, 3])
@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_that_always_chooses_them(
    family: str, preset: str, keep: int | None
) -> None:
    split = {"out_bias": "split"} if preset == "paper" else {}
    model = converted(family, **split)
    with torch.no_grad():  # as training would leave them
        for layer in routed_layers(model).values():
            if getattr(layer, "out_bias", None) is not None:
                layer.out_bias.normal_()
    constant = converted(family, **split)
    constant.load_state_dict(model.state_dict())
    for layer in routed_layers(constant).values():
        assert layer.router.rule.combine == "one"
        layer.router = Constant(layer.router, USAGE, keep or 2)
    expected = logits(constant, family)
    assert not torch.allclose(expected, logits(model, family), atol=1e-2)
    report = prune_statically(model, usage_of(model), keep)
    torch.testing.assert_close(logits(model, family), expected, rtol=1e-5, atol=1e-4)
    kept = {None: (1, 4), 3: (1, 2, 4)}[keep]
    assert {layer.kept for layer in report.layers} == {kept}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_an_ordinary_checkpoint_of_the_same_shapes(
    family: str, tmp_path: Path
) -> None:
    model, original = converted(family), tiny.build(family)
    prune_statically(model, usage_of(model))
    assert not moduli.is_modular(model)
    shapes = {name: tensor.shape for name, tensor in original.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), family), logits(model, family))


def test_keeping_all_experts_is_merging() -> None:
    model = converted("bert")
    report = prune_statically(model, usage_of(model), keep=5)
    original = tiny.build("bert").state_dict()
    assert all(torch.equal(t, original[name]) for name, t in model.state_dict().items())
    assert report.dropped == 0


class Unmovable(nn.Linear):
    """A projection whose weight surgery must not touch, so that neurons keep their places."""


@torch.no_grad()
def test_experts_that_are_scattered_over_the_projection() -> None:
    def scattered() -> Any:
        model = tiny.build("bert")
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.__class__ = Unmovable
        moduli.convert(model, moduli.EMoE(num_experts=5, top_k=2, layers="all"))
        return model

    model, constant = scattered(), scattered()
    for layer in routed_layers(constant).values():
        assert layer.labels is not None
        layer.router = Constant(layer.router, USAGE, 2)
    prune_statically(model, usage_of(model))
    expected = logits(constant, "bert")
    torch.testing.assert_close(logits(model, "bert"), expected, rtol=1e-5, atol=1e-4)


def test_the_report_counts_what_was_dropped() -> None:
    model = converted("bert")
    report = prune_statically(model, usage_of(model))
    assert report.dropped == pytest.approx(0.1)
    for layer in report.layers:
        assert layer.of_neurons == tiny.NEURONS
        assert 0 < layer.neurons < tiny.NEURONS
    json.dumps(report.to_dict())
    assert "10.0% of the selections dropped" in str(report)


def test_equally_used_experts_are_kept_in_order() -> None:
    model = converted("bert")
    report = prune_statically(model, usage_of(model, [1, 2, 2, 2, 2]))
    assert report.layers[0].kept == (1, 2)
    assert prune_statically(converted("bert"), usage_of(converted("bert"), [0] * 5)).dropped == 0


def test_experts_of_their_own_are_refused() -> None:
    model = tiny.build("bert")
    moduli.convert(model, moduli.GMoE(num_experts=5, layers="all", projection=8))
    before = logits(model, "bert")
    with pytest.raises(ConfigError, match=r"moduli\.merge"):
        prune_statically(model, usage_of(model))
    assert torch.equal(logits(model, "bert"), before)


@pytest.mark.parametrize(
    ("usage", "keep", "match"),
    [
        ({}, None, "nothing for bert"),
        ([1, 2, 3], None, "3 numbers for bert"),
        (USAGE, 6, "choose 1 to 5"),
        (USAGE, 0, "choose 1 to 5"),
    ],
)
def test_what_does_not_fit_changes_nothing(usage: Any, keep: int | None, match: str) -> None:
    model = converted("bert")
    before = logits(model, "bert")
    given = usage_of(model, usage) if isinstance(usage, list) else usage
    with pytest.raises(ConfigError, match=match):
        prune_statically(model, given, keep)
    assert torch.equal(logits(model, "bert"), before)


def test_adapters_have_to_be_merged_first() -> None:
    config = LoraConfig(r=2, target_modules=["output.dense"])
    model = get_peft_model(converted("bert"), config)
    with pytest.raises(ModelError, match="merge_and_unload"):
        prune_statically(model, usage_of(model))


def test_a_dense_model_has_nothing_to_prune() -> None:
    with pytest.raises(ModelError, match="no routed layers"):
        prune_statically(tiny.build("bert"), {})
