"""Experts of their own: what they start as, what merging makes of them, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import moduli
from moduli.errors import ModelError
from moduli.surgery.modular import routed_layers
from moduli.surgery.owned import OwnedExperts, merged_experts
from tests import tiny
from tests.surgery.test_roundtrip import digests, inputs

FAMILIES = list(tiny.MODELS)


def upcycled(family: str, **changes: Any) -> Any:
    model = tiny.build(family)
    settings = {"num_experts": 3, "top_k": 2, "layers": "all", **changes}
    moduli.convert(model, moduli.SparseUpcycling(**settings))
    return model


def scatter(model: Any) -> Any:
    """Move experts and routers apart, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts." in name or "router." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_start_as_the_dense_model_and_merge_into_it(family: str) -> None:
    model = tiny.build(family)
    before, original = digests(model), model(**inputs(family)).logits
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    moduli.convert(model, moduli.SparseUpcycling(num_experts=3, layers="all"))
    torch.testing.assert_close(model(**inputs(family)).logits, original, rtol=1e-5, atol=1e-5)
    report = moduli.merge(model, exact=True)
    assert report.exact
    assert digests(model) == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert torch.equal(model(**inputs(family)).logits, original)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_copies_merge_into_their_mean(family: str) -> None:
    model = scatter(upcycled(family))
    layer = next(iter(routed_layers(model).values()))
    assert isinstance(layer, OwnedExperts)
    mean = layer.experts.down_proj.mean(dim=0)
    with moduli.dense(model):
        announced = model(**inputs(family)).logits
    twin = copy.deepcopy(model)
    with pytest.raises(ModelError, match=r"cannot be merged exactly: its experts overlap"):
        moduli.merge(twin, exact=True)
    assert moduli.is_modular(twin)
    report = moduli.merge(model)
    assert not report.exact
    last = layer.ffn.last.weight
    torch.testing.assert_close(last.T if family == "gpt2" else last, mean)
    torch.testing.assert_close(model(**inputs(family)).logits, announced, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_experts_come_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = scatter(upcycled(family))
    expected = model(**inputs(family)).logits
    report = moduli.save(model, tmp_path / "ours")
    assert not report.exact
    assert report.gap is not None
    assert report.gap > 0
    model.save_pretrained(tmp_path / "bare")
    for folder in ("ours", "bare"):
        again = moduli.load(tmp_path / folder)
        assert torch.equal(again(**inputs(family)).logits, expected)
    plain = type(model).from_pretrained(tmp_path / "ours").eval()
    assert set(plain.state_dict()) == set(tiny.build(family).state_dict())
    with moduli.dense(model):
        torch.testing.assert_close(
            plain(**inputs(family)).logits, model(**inputs(family)).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_and_router_learns(family: str) -> None:
    model = upcycled(family, num_experts=2).train()
    rows = tiny.batch(tiny.rows(family, 3))
    model(**rows).loss.backward()
    ours = {n: p for n, p in model.named_parameters() if "experts." in n or "router." in n}
    assert ours
    for name, parameter in ours.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_dropout_of_the_block_acts_inside_experts() -> None:
    from tests import families

    model = families.build("bart")
    for layer in model.model.encoder.layers:
        layer.activation_dropout = 0.5
    moduli.convert(model, moduli.GMoE(layers="*encoder*", expert_dropout=0.5))
    layer = model.model.encoder.layers[0]
    assert layer.activation_dropout == 0.0
    assert layer.fc2.experts.dropout == 0.75  # one after the other, a quarter is left
    moduli.merge(model)
    assert layer.activation_dropout == 0.5


def test_neurons_are_averaged_over_the_experts_that_have_them() -> None:
    model = upcycled("bert", num_experts=2)
    layer = next(iter(routed_layers(model).values()))
    assert isinstance(layer, OwnedExperts)
    layer.members = (torch.arange(36), torch.arange(36).flip(0))
    with torch.no_grad():
        layer.experts.up_proj[1] = layer.experts.up_proj[0].flip(0)
    merged, averaged = merged_experts(layer)
    assert averaged  # values and biases of the second expert were not turned around
    torch.testing.assert_close(merged.keys[0], layer.experts.up_proj[0])
    values = layer.experts.down_proj.transpose(1, 2)
    torch.testing.assert_close(merged.values[0], (values[0] + values[1].flip(0)) / 2)


def test_adapters_on_what_becomes_experts_are_refused() -> None:
    config = LoraConfig(r=2, target_modules=["intermediate.dense"])
    model = get_peft_model(tiny.build("bert"), config)
    before = digests(model)
    with pytest.raises(ModelError, match=r"carries an adapter.*merge_and_unload"):
        moduli.convert(model, moduli.SparseUpcycling())
    assert digests(model) == before


def test_adapters_elsewhere_train_beside_experts(tmp_path: Path) -> None:
    model = upcycled("bert")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"]))
    model.train()(**tiny.batch(tiny.rows("bert", 3))).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in n or "modules_to_save" in n for n in grads)
    assert any(g is not None and g.abs().sum() > 0 for g in grads.values())
