"""GMoE: the vision form starts at the dense function, the language form loses part of a bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moduli
from moduli.errors import ConfigError
from moduli.surgery.modular import routed_layers
from moduli.training.auxiliary import auxiliary_loss
from tests import families


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "bert", "llama"])
def test_it_starts_at_the_dense_function(family: str) -> None:
    model, batch = families.build(family), families.inputs(family)
    dense = model(**batch).logits
    report = moduli.convert(model, moduli.GMoE(layers="all"))
    assert report is not None
    assert report.num_experts == 6
    torch.testing.assert_close(model(**batch).logits, dense, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_language_preset_starts_with_a_share_of_the_bias() -> None:
    """Every expert has b / k, and their weights sum to 1."""
    for preset in (None, "paper-language"):
        model = families.build("bert")
        bias = model.bert.encoder.layer[1].output.dense.bias.clone()
        moduli.convert(model, moduli.GMoE(preset=preset, capacity_factor=0.0))
        each = model.bert.encoder.layer[1].output.dense.experts.down_proj_bias
        torch.testing.assert_close(each, (bias / (2 if preset else 1)).expand(6, -1))
        report = moduli.merge(model)
        assert report.exact
        torch.testing.assert_close(model.bert.encoder.layer[1].output.dense.bias, bias)


@torch.no_grad()
def test_the_paper_preset_drops_tokens_at_evaluation() -> None:
    model, batch = families.build("vit"), families.inputs("vit")
    dense = model(**batch).logits
    moduli.convert(model, moduli.GMoE(layers="all", preset="paper", capacity_factor=0.25))
    assert not torch.allclose(model(**batch).logits, dense, atol=1e-3)


def test_the_auxiliary_loss_trains_the_gate() -> None:
    model, batch = families.build("vit"), families.inputs("vit")
    moduli.convert(model, moduli.GMoE())
    model.train()(**batch)
    term = auxiliary_loss(model)
    assert term is not None
    term.backward()
    (layer,) = routed_layers(model).values()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.router.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 7}, "top_k is 7, but there are 6 experts"),
        ({"preset": "vision"}, "preset is 'vision'"),
        ({"noise": 0.0}, "needs noise > 0"),
    ],
)
def test_settings_that_contradict_each_other(
    settings: dict[str, Any], message: str, without_shape_checks: None
) -> None:
    with pytest.raises(ConfigError, match=message):
        moduli.GMoE(**settings)
