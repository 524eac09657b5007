"""torch's own quantised linear layers: converted in place, since their weights cannot be moved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import moduli
from moduli.surgery.fast import path_of
from moduli.surgery.modular import routed_layers
from tests import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
FAMILIES = ("bert", "vit", "llama")


def quantised(family: str) -> Any:
    model = tiny.build(family)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@torch.no_grad()
def logits(model: Any, family: str) -> torch.Tensor:
    found: torch.Tensor = model(**tiny.batch(tiny.rows(family, 3))).logits
    return found


@pytest.mark.parametrize("settings", [{}, {"gate": "linear"}, {"gate_momentum": 0.5}])
@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_stay_in_place_and_all_experts_are_the_dense_model(
    family: str, settings: dict[str, Any]
) -> None:
    model = quantised(family)
    dense = logits(model, family)
    method = moduli.EMoE(num_experts=5, top_k=5, layers="all", **settings)
    moduli.convert(model, method)
    assert torch.equal(logits(model, family), dense)
    assert all("could not be moved" in path_of(x) for x in routed_layers(model).values())
    moduli.set_top_k(model, 2)
    assert not torch.allclose(logits(model, family), dense, atol=1e-3)
    moduli.merge(model)
    assert torch.equal(logits(model, family), dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_is_that_of_the_weights_it_was_quantised_from(family: str) -> None:
    """With the same split, quantised and full-precision models choose nearly the same experts."""
    full = tiny.build(family)
    chosen: list[list[torch.Tensor]] = []
    for model in (copy.deepcopy(full), quantised(family)):
        moduli.convert(model, moduli.EMoE(num_experts=4, top_k=1, split="contiguous", layers=[0]))
        seen: list[torch.Tensor] = []
        (layer,) = routed_layers(model).values()
        layer.shared.record = lambda name, routing, real, seen=seen: seen.append(routing.experts)
        logits(model, family)
        chosen.append(seen)
    same = (torch.cat(chosen[0]) == torch.cat(chosen[1])).float().mean()
    assert same > 0.9
