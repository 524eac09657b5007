"""Sparse upcycling: the function at the start, balanced expert choice, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moduli
from moduli.errors import ConfigError
from moduli.surgery.modular import routed_layers
from tests import families, tiny


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"num_experts": 5, "top_k": 5}, {"noise": 1.0}])
def test_it_starts_at_the_dense_function(settings: dict[str, Any]) -> None:
    model, batch = families.build("bert"), families.inputs("bert")
    dense = model(**batch).logits
    moduli.convert(model, moduli.SparseUpcycling(layers="all", **settings))
    torch.testing.assert_close(model(**batch).logits, dense, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_top_1_is_scaled_by_its_probability() -> None:
    model, batch = families.build("bert"), families.inputs("bert")
    dense = model(**batch).logits
    moduli.convert(model, moduli.SparseUpcycling(top_k=1))
    assert not torch.allclose(model(**batch).logits, dense, atol=1e-3)


@torch.no_grad()
def test_expert_choice_is_dense_for_tokens_that_are_taken() -> None:
    model = tiny.build("vit")
    method = moduli.SparseUpcycling(num_experts=2, top_k=2, routing="expert_choice", layers="all")
    pixels = torch.randn(2, 3, 8, 8)
    dense = model(pixel_values=pixels).logits
    moduli.convert(model, method)  # k = E: every expert takes every token
    torch.testing.assert_close(model(pixel_values=pixels).logits, dense, rtol=1e-5, atol=1e-5)
    moduli.set_top_k(model, 1)
    loads: list[int] = []
    shared = next(iter(routed_layers(model).values())).shared
    shared.record = lambda name, routing, real: loads.extend(
        routing.active.sum(dim=0).tolist() if routing.active is not None else []
    )
    model(pixel_values=pixels)
    tokens = 2 * 17
    assert loads == [tokens // 2] * 4


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_expert_choice_would_leak_into_decoders(family: str) -> None:
    model = families.build(family)
    with pytest.raises(ConfigError, match=r"later ones included.*token_choice"):
        moduli.convert(model, moduli.SparseUpcycling(routing="expert_choice", layers="all"))
    assert not moduli.is_modular(model)


def test_expert_choice_suits_the_encoder_of_a_translator() -> None:
    model, batch = families.build("t5"), families.inputs("t5")
    method = moduli.SparseUpcycling(routing="expert_choice", layers="encoder.*", num_experts=4)
    moduli.convert(model, method)
    assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 9}, "top_k is 9, but there are 8 experts"),
        ({"routing": "random"}, "routing is 'random'"),
        ({"aux": "load_importance"}, "needs noise > 0"),
        ({"routing": "expert_choice", "aux": "switch"}, "for token choice"),
        ({"routing": "expert_choice", "capacity_factor": 1.0}, "for token choice"),
    ],
)
def test_settings_that_contradict_each_other(
    settings: dict[str, Any], message: str, without_shape_checks: None
) -> None:
    with pytest.raises(ConfigError, match=message):
        moduli.SparseUpcycling(**settings)


def test_routers_are_drawn_from_the_seed() -> None:
    def gates(seed: int) -> list[torch.Tensor]:
        model = tiny.build("bert")
        moduli.convert(model, moduli.SparseUpcycling(layers="all", seed=seed))
        return [p for n, p in model.named_parameters() if "router" in n]

    first, again, other = gates(0), gates(0), gates(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


@torch.no_grad()
def test_on_the_real_encoder(minilm_path: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    batch = tokenizer(["a good film", "not for me, sorry"], padding=True, return_tensors="pt")
    dense = model(**batch).last_hidden_state
    report = moduli.convert(model, moduli.SparseUpcycling(num_experts=4), batch=dict(batch))
    assert report is not None
    assert report.added_parameters > 3 * 3 * 2 * 384 * 1536
    torch.testing.assert_close(model(**batch).last_hidden_state, dense, rtol=1e-4, atol=1e-4)
    moduli.save(model, tmp_path / "out", batch=dict(batch))
    again = moduli.load(tmp_path / "out")
    assert torch.equal(again(**batch).last_hidden_state, model(**batch).last_hidden_state)
