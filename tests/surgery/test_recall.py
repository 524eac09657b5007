"""Activation checkpointing: what is computed again is what the pass itself had computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moduli
from moduli.surgery.modular import routed_layers
from tests import families
from tests.methods.thor.models import assert_same, gradients

METHODS = {
    "hash-layers": moduli.HashLayers(num_experts=4, layers="all"),
    "switch": moduli.Switch(
        num_experts=4, layers="all", capacity_factor=1.0, jitter=0.0, router_std=1.0
    ),
}


def _modular(name: str) -> Any:
    model = families.build("llama")
    moduli.convert(model, METHODS[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in routed_layers(model).values():
            for parameter in layer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


@pytest.mark.parametrize("between", ["training", "evaluation", "dense"])
@pytest.mark.parametrize("name", METHODS)
def test_another_forward_before_the_backward_changes_no_gradient(name: str, between: str) -> None:
    model = _modular(name)
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randint(3, families.VOCAB, (2, 2, 9), generator=generator)
    mask = torch.ones_like(first)
    mask[1, 3:] = 0

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        loss = model(first, attention_mask=mask, labels=first.where(mask == 1, -100)).loss
        if between == "training":
            loss = loss + model(second, labels=second).loss
        elif between == "evaluation":
            with torch.no_grad():
                model.eval()(second)
            model.train()
        else:
            with moduli.dense(model):
                loss = loss + model(first, labels=first).loss
        loss.backward()
        return gradients(model)

    plain = step()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(step(), plain, rtol=1e-4, atol=1e-6)
    shared = next(iter(routed_layers(model).values())).shared
    assert not shared.dense
    assert shared.outside is None


def test_a_backward_that_fails_leaves_nothing_behind() -> None:
    model, ids = _modular("hash-layers"), torch.arange(3, 12)[None]
    with moduli.dense(model):
        logits = model(ids).logits

    def fail(grad: torch.Tensor) -> None:
        raise RuntimeError("in the middle")

    model.get_input_embeddings().weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        logits.sum().backward()
    model(ids)
    assert not next(iter(routed_layers(model).values())).shared.dense
