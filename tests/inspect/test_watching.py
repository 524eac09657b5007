"""Watching shows what a model does, changes nothing in it and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moduli
from moduli.errors import ModelError
from moduli.inspect.watching import as_logits, expert_layers, strongest_first, watch
from moduli.routing import Routing
from tests import families, tiny
from tests.inspect import models

MODELS = {
    "bert": (lambda: models.split("bert"), "bert"),
    "vit": (lambda: models.split("vit"), "vit"),
    "llama": (lambda: models.split("llama"), "llama"),
    "owned": (models.owned, "bert"),
    **{name: (lambda name=name: families.moe(name), "llama") for name in families.MOE},
}


def hooks(model: nn.Module) -> list[tuple[str, int]]:
    """How many hooks every module has."""
    return [
        (name, len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_bit_equal_and_no_hook_stays(name: str) -> None:
    make, family = MODELS[name]
    model, batch = make(), models.inputs(family)
    before = hooks(model)
    with torch.no_grad():
        plain = model(**batch).logits
        with watch(model) as seen:
            watched = model(**batch).logits
        after = model(**batch).logits
    assert torch.equal(plain, watched)
    assert torch.equal(plain, after)
    assert hooks(model) == before
    layers = expert_layers(model)
    assert [one.layer for one in seen] == [layer.name for layer in layers]
    assert len(layers) == tiny.LAYERS
    assert all(layer.num_experts == 4 for layer in layers)
    for one in seen:
        assert one.routing.experts.shape == (len(one.routing.weights), 2)
        if "attention_mask" in batch:
            assert one.real is not None
            assert torch.equal(one.real, batch["attention_mask"].bool().flatten())


@pytest.mark.parametrize("name", MODELS)
def test_no_hook_stays_after_an_error(name: str) -> None:
    make, _ = MODELS[name]
    model = make()
    before = hooks(model)
    with pytest.raises(ZeroDivisionError), watch(model):
        raise ZeroDivisionError
    assert hooks(model) == before
    with torch.no_grad(), watch(model) as seen:
        model(**models.inputs(MODELS[name][1]))
    assert len(seen) == tiny.LAYERS


@pytest.mark.parametrize("name", families.MOE)
def test_stock_routing_is_the_model_s_own(name: str) -> None:
    model, batch = families.moe(name), models.inputs("llama")
    with torch.no_grad(), watch(model) as seen:
        logits = model(**batch, output_router_logits=True).router_logits
    for one, expected in zip(seen, logits, strict=True):
        assert one.routing.scores is not None
        torch.testing.assert_close(one.routing.scores, expected)
        chosen = expected.topk(2).indices.sort().values
        assert torch.equal(one.routing.experts.sort().values, chosen)


def test_two_watchers_both_see() -> None:
    model = models.split("bert")
    with torch.no_grad(), watch(model) as outer:
        with watch(model) as inner:
            model(**models.inputs("bert"))
        model(**models.inputs("bert"))
    assert (len(outer), len(inner)) == (2 * tiny.LAYERS, tiny.LAYERS)


def test_nothing_is_seen_of_a_dense_pass() -> None:
    model = models.split("bert")
    with torch.no_grad(), watch(model) as seen, moduli.dense(model):
        model(**models.inputs("bert"))
    assert seen == []


def test_a_dense_model_is_refused() -> None:
    with (
        pytest.raises(ModelError, match=r"no experts to look at; moduli\.convert"),
        watch(tiny.build("bert")),
    ):
        pass


def test_experts_that_are_drawn_at_random_have_no_routing_to_look_at() -> None:
    model = tiny.build("bert")
    moduli.convert(model, moduli.THOR(num_experts=2))
    with pytest.raises(ModelError, match=r"drawn at random.*moduli\.thor_report"), watch(model):
        pass


def test_new_tokens_of_a_decoder_are_the_last_of_its_mask() -> None:
    model: Any = families.moe("mixtral")
    batch = {name: tensor.flip(1) for name, tensor in models.inputs("llama").items()}
    with torch.no_grad(), watch(model) as seen:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    later = seen[tiny.LAYERS :]
    assert all(one.real is not None and bool(one.real.all()) for one in later)
    assert {len(one.routing.experts) for one in later} == {len(batch["input_ids"])}


def test_probabilities_become_logits() -> None:
    logits = torch.randn(5, 4)
    torch.testing.assert_close(as_logits(logits.softmax(-1)).softmax(-1), logits.softmax(-1))
    assert as_logits(logits) is logits


def test_idle_slots_come_last() -> None:
    routing = Routing(
        experts=torch.tensor([[0, 2], [1, 3]]),
        weights=torch.tensor([[0.9, 0.1], [0.3, 0.7]]),
        active=torch.tensor([[False, True], [True, True]]),
    )
    experts, weights = strongest_first(routing)
    assert experts.tolist() == [[2, -1], [3, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.1, 0.0], [0.7, 0.3]]))


@pytest.mark.parametrize("target", ["q_proj", "gate_up_proj"])
@pytest.mark.parametrize("name", ["mixtral", "split"])
def test_adapters_change_nothing_in_what_is_seen(name: str, target: str) -> None:
    import peft

    model = models.split("llama") if name == "split" else families.moe(name)
    batch = models.inputs("llama")
    with torch.no_grad(), watch(model) as plain:
        model(**batch)
    if name == "split" and target == "gate_up_proj":
        target = "gate_proj"
    inside = target == "gate_up_proj"
    config = peft.LoraConfig(
        target_modules=[] if inside else [target],
        target_parameters=[f"experts.{target}", "experts.down_proj"] if inside else None,
    )
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad(), watch(adapted) as seen:
        adapted(**batch)
    assert len(seen) == len(plain) == tiny.LAYERS
    for one, other in zip(seen, plain, strict=True):  # a new adapter adds nothing
        assert one.layer.endswith(other.layer)
        assert one.real is not None
        assert torch.equal(one.routing.experts, other.routing.experts)
        assert one.routing.scores is not None
        assert other.routing.scores is not None
        torch.testing.assert_close(one.routing.scores, other.routing.scores)
