"""Hash Layers on models: dense at the start, tables by token wherever ids come from, hand-back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moduli
from moduli.errors import ConfigError, ModelError
from moduli.routing import Routing
from moduli.surgery.modular import routed_layers
from tests import families, tiny
from tests.surgery.test_roundtrip import digests


def hashed(family: str, **settings: Any) -> Any:
    model = families.build(family)
    settings = {"num_experts": 4, "layers": "all", **settings}
    moduli.convert(model, moduli.HashLayers(**settings))
    return model


def scatter(model: Any) -> Any:
    """Move experts apart, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text(family: str) -> dict[str, Tensor]:
    return {k: v for k, v in families.inputs(family).items() if k != "labels"}


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart"])
def test_it_starts_at_the_dense_function(family: str) -> None:
    inputs = text(family)
    dense = families.build(family)(**inputs).logits
    torch.testing.assert_close(hashed(family)(**inputs).logits, dense, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "llama", "opt", "t5", "bart"])
def test_every_layer_goes_by_the_ids_of_its_own_stack(family: str) -> None:
    model, inputs = hashed(family), text(family)
    seen: dict[str, Routing] = {}
    shared = next(iter(routed_layers(model).values())).shared
    shared.record = lambda name, routing, real: seen.update({name: routing})
    model(**inputs)
    layers = routed_layers(model)
    assert seen.keys() == layers.keys()
    tables = [layer.router.table for layer in layers.values()]
    assert not torch.equal(tables[0], tables[1])  # a layer has its own
    for name, layer in layers.items():
        decodes = "decoder_input_ids" in inputs and "decoder." in name
        ids = inputs["decoder_input_ids" if decodes else "input_ids"].flatten()
        assert torch.equal(seen[name].experts[:, 0], layer.router.table[ids])


@torch.no_grad()
@pytest.mark.parametrize("family", ["opt", "t5", "bart"])
def test_generation_with_a_cache_knows_the_new_tokens(family: str) -> None:
    model, inputs = scatter(hashed(family)), text(family)
    prompt = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(**prompt, **settings)
    assert torch.equal(model.generate(**prompt, **settings, use_cache=False), found)
    beams = model.generate(**prompt, **settings, num_beams=2)
    assert torch.equal(model.generate(**prompt, **settings, num_beams=2, use_cache=False), beams)


def test_experts_learn_with_and_without_checkpointing() -> None:
    found = []
    for checkpointing in (False, True):
        model = scatter(hashed("bert", num_experts=2)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(**families.inputs("bert")).logits.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if "experts." in n})
    for name, gradient in found[0].items():
        assert gradient is not None
        assert gradient.any(), name
        torch.testing.assert_close(found[1][name], gradient)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("table", ["random", "balanced"])
def test_tables_travel_in_checkpoints(family: str, table: str, tmp_path: Path) -> None:
    model, inputs = families.build(family), text(family)
    method = moduli.HashLayers(num_experts=4, layers="all", table=table, seed=3)  # type: ignore[arg-type]
    moduli.convert(model, method, batch=[families.inputs(family)])
    scatter(model)
    expected = model(**inputs).logits
    moduli.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "bare")
    for folder in ("ours", "bare"):
        again = moduli.load(tmp_path / folder)
        assert torch.equal(again(**inputs).logits, expected)
        for name, layer in routed_layers(again).items():
            assert torch.equal(layer.router.table, routed_layers(model)[name].router.table)
    plain = type(model).from_pretrained(tmp_path / "ours").eval()
    moduli.merge(model)
    assert torch.equal(plain(**inputs).logits, model(**inputs).logits)


def test_merging_untrained_copies_restores_every_tensor() -> None:
    model = families.build("bert")
    before = digests(model)
    moduli.convert(model, moduli.HashLayers(num_experts=3, layers="all"))
    assert moduli.merge(model, exact=True).exact
    assert digests(model) == before
    model(**text("bert"))  # no hook is left behind


def test_balance_is_by_what_a_stack_reads() -> None:
    often = torch.tensor([[5, 5, 5, 5, 5, 5, 6, 7, 8, 9, 10, 11]])
    batch = {
        "input_ids": often,
        "attention_mask": torch.ones_like(often),
        "labels": torch.tensor([[20, 20, 20, 20, 21, 22, 23, 24, -100]]),
    }
    model = families.build("t5")
    method = moduli.HashLayers(num_experts=2, layers="all", table="balanced")
    moduli.convert(model, method, batch=batch)
    for name, layer in routed_layers(model).items():
        table = layer.router.table
        seen = batch["labels"][0, :-1] if "decoder." in name else often[0]
        loads = torch.bincount(table[seen], minlength=2).tolist()
        assert loads[0] == loads[1], name


@pytest.mark.parametrize("family", ["vit", "whisper"])
def test_layers_that_see_no_tokens_are_refused(family: str) -> None:
    model = families.build(family)
    with pytest.raises(ModelError, match=r"does not see tokens.*moduli.Switch"):
        moduli.convert(model, moduli.HashLayers(layers="all"))
    assert not moduli.is_modular(model)


@torch.no_grad()
def test_a_text_tower_beside_an_image_tower_is_enough() -> None:
    model, inputs = families.build("clip"), families.inputs("clip")
    dense = families.outputs(model, inputs)
    moduli.convert(model, moduli.HashLayers(num_experts=3, layers="text_model*"))
    torch.testing.assert_close(families.outputs(model, inputs), dense, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_embeddings_instead_of_ids_are_refused() -> None:
    model, inputs = hashed("bert"), text("bert")
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ModelError, match=r"looks tokens up by their ids.*inputs_embeds"):
        model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"])
    assert model(**inputs).logits.isfinite().all()


def test_a_second_expert_is_refused() -> None:
    model, inputs = hashed("bert"), text("bert")
    expected, recorded = model(**inputs).logits, dict(model.config.moduli)
    with pytest.raises(ConfigError, match=r"top_k is 2.*one expert per token"):
        moduli.set_top_k(model, 2)
    assert model.config.moduli == recorded
    moduli.set_top_k(model, 1)
    assert torch.equal(model(**inputs).logits, expected)


def test_a_balanced_table_needs_data() -> None:
    model = tiny.build("bert")
    with pytest.raises(ConfigError, match=r"counts tokens.*batch=\[\.\.\.\].*random"):
        moduli.convert(model, moduli.HashLayers(table="balanced"))
    assert not moduli.is_modular(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"table": "sorted"}, "table is 'sorted'. Known names: balanced, random"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"expert_dropout": 1.0}, "expert_dropout is 1.0"),
    ],
)
def test_settings_that_cannot_work(
    settings: dict[str, Any], message: str, without_shape_checks: None
) -> None:
    with pytest.raises(ConfigError, match=message):
        moduli.HashLayers(**settings)


def test_a_token_that_was_added_later_has_no_expert() -> None:
    model = hashed("bert")
    model.resize_token_embeddings(families.VOCAB + 4)
    assert model(**text("bert")).logits.isfinite().all()
    with pytest.raises(ModelError, match=rf"has {families.VOCAB} tokens, and token .*convert it"):
        model(input_ids=torch.tensor([[families.VOCAB + 1, 3]]))
