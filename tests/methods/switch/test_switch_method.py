"""Switch and GShard on models: where they start, what they lose, what padding does, hand-back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moduli
from moduli.errors import ConfigError, ModelError
from moduli.losses.balance import switch_loss
from moduli.losses.z_loss import z_loss
from moduli.routing import Routing
from moduli.surgery.modular import routed_layers
from moduli.surgery.owned import OwnedExperts
from moduli.training.auxiliary import auxiliary_loss
from tests import families, tiny
from tests.surgery.test_roundtrip import digests

Seen = list[tuple[str, Routing, Tensor | None]]


def switched(family: str = "bert", **settings: Any) -> Any:
    model = tiny.build(family)
    settings = {"num_experts": 3, "layers": "all", "router_std": 0.5, **settings}
    moduli.convert(model, moduli.Switch(**settings))
    return model


def watched(model: Any) -> Seen:
    """The list that every routing of the model is appended to."""
    seen: Seen = []
    shared = next(iter(routed_layers(model).values())).shared
    shared.record = lambda *one: seen.append(one)
    return seen


def rows(family: str = "bert", count: int = 4) -> dict[str, Tensor]:
    return tiny.batch(tiny.rows(family, count))


# --- where it starts ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [{"gate_scale": "one"}, {"top_k": 2}, {"top_k": 2, "renormalise": "before"}],
    ids=["one", "gshard", "before"],
)
def test_it_starts_at_the_dense_function(family: str, settings: dict[str, Any]) -> None:
    dense = tiny.build(family)
    inputs = {k: v for k, v in rows(family, 1).items() if k != "labels"}
    torch.testing.assert_close(
        switched(family, **settings)(**inputs).logits, dense(**inputs).logits, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_the_probability_scales_the_output_of_one_expert() -> None:
    inputs = rows(count=1)
    found = {}
    for scale in ("prob", "prob_times_E", "one"):
        model = switched(gate_scale=scale, router_std=0.0)  # every probability is 1 / 3
        found[scale] = model(**inputs).logits
    torch.testing.assert_close(found["prob_times_E"], found["one"])
    assert not torch.allclose(found["prob"], found["one"], atol=1e-3)


def test_from_scratch_experts_start_small_and_apart() -> None:
    model = switched(init_scale=0.1, num_experts=4)
    for layer in routed_layers(model).values():
        assert isinstance(layer, OwnedExperts)
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any()
                continue
            std = (0.1 / parameter.shape[-1]) ** 0.5
            assert float(parameter.detach().abs().max()) <= 2 * std
            # Cut at two of them, a normal has 0.88 of its standard deviation.
            assert float(parameter.detach().std()) == pytest.approx(0.88 * std, rel=0.3)
        assert not torch.equal(layer.experts.down_proj[0], layer.experts.down_proj[1])
    again = switched(init_scale=0.1, num_experts=4)
    assert digests(again) == digests(model)
    other = switched(init_scale=0.1, num_experts=4, seed=1)
    assert digests(other) != digests(model)


def test_a_report_from_scratch_claims_no_output_error() -> None:
    report = moduli.convert(tiny.build("bert"), moduli.Switch(init_scale=0.1))
    assert report is not None
    assert [layer.error for layer in report.layers] == [None]
    assert not report.probe


# --- dropping, padding, batches -----------------------------------------------------------------


@torch.no_grad()
def test_evaluation_drops_nothing_unless_it_is_asked_to() -> None:
    inputs = rows("bert", 1)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    for settings, drops in [
        ({"capacity_factor": 0.4}, False),
        ({"capacity_factor": 0.4, "drop_in_evaluation": True}, True),
        ({"preset": "paper"}, True),
        ({"preset": "paper", "drop_in_evaluation": False}, False),
        ({"rounding": "huggingface", "sequence_capacity": 2}, False),
        ({"rounding": "huggingface", "sequence_capacity": 2, "drop_in_evaluation": True}, True),
    ]:
        model = switched(evaluation_share=0.2, **settings)  # type: ignore[arg-type]
        seen = watched(model)
        model(**inputs)
        kept = [r.active is None or bool(r.active.all()) for _, r, _ in seen]
        assert kept == [not drops] * 2, settings


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_outputs_do_not_depend_on_the_batch_or_on_padding(family: str, top_k: int) -> None:
    model = switched(family, top_k=top_k)
    inputs = {k: v for k, v in rows(family, 3).items() if k != "labels"}
    together = model(**inputs).logits
    for i, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model(input_ids=inputs["input_ids"][i, mask][None]).logits[0]
        found = together[i] if family == "bert" else together[i, mask]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def training_terms(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Seen]:
    seen = watched(model)
    model.train()(**{k: v for k, v in inputs.items() if k != "labels"})
    term = auxiliary_loss(model)
    assert term is not None
    return term, seen


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_padding_is_not_in_the_losses_and_takes_no_slot(family: str) -> None:
    inputs = rows(family)
    settings = {"z_weight": 0.5, "jitter": 0.0, "capacity_factor": 0.7}
    term, seen = training_terms(switched(family, **settings), inputs)
    wider = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 3), value=5),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 3)),
    }
    other, again = training_terms(switched(family, **settings), wider)
    torch.testing.assert_close(other, term, rtol=1e-4, atol=1e-6)
    for (_, narrow, real), (_, wide, kept) in zip(seen, again, strict=True):
        assert real is not None
        assert kept is not None
        assert narrow.active is not None
        assert wide.active is not None
        assert torch.equal(wide.active[kept], narrow.active[real])
        assert not wide.active[~kept].any()
        assert not narrow.active[real].all()  # the capacity bites


def test_padding_is_known_to_a_model_that_flattens_its_tokens() -> None:
    model, inputs = families.build("opt"), rows("gpt2")
    moduli.convert(model, moduli.Switch(num_experts=3, layers="all"))
    _, seen = training_terms(model, inputs)
    for _, routing, real in seen:
        assert real is not None
        assert routing.active is not None
        assert torch.equal(real, inputs["attention_mask"].bool().flatten())
        assert not routing.active[~real].any()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_padded_targets_are_known_by_their_labels(family: str) -> None:
    model, inputs = families.build(family), families.inputs(family)
    moduli.convert(model, moduli.Switch(num_experts=3, layers="all", capacity_factor=0.7))
    labels = inputs.pop("decoder_input_ids")
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    seen = watched(model)
    model.train()(**inputs, labels=labels.masked_fill(padding, -100))
    sides = {name: (routing, real) for name, routing, real in seen if "decoder" in name}
    assert sides
    for routing, real in sides.values():
        assert real is not None
        assert torch.equal(real, ~padding.flatten())
        assert routing.active is not None
        assert not routing.active[~real].any()
    # A pass without labels does not see those of the pass before.
    seen = watched(model)
    model(**inputs, decoder_input_ids=labels)
    assert all(real is None for name, _, real in seen if "decoder" in name)


def test_the_losses_are_those_of_first_choices() -> None:
    settings = {"top_k": 2, "aux_weight": 0.02, "z_weight": 0.003, "num_experts": 4}
    term, seen = training_terms(switched(**settings), rows())
    expected = torch.zeros(())
    for _, routing, real in seen:
        assert routing.scores is not None
        assert real is not None
        scores, first = routing.scores[real], routing.scores[real].argmax(-1, keepdim=True)
        assert torch.equal(first, routing.experts[real, :1])
        expected = expected + 0.02 * switch_loss(scores, first) + 0.003 * z_loss(scores)
    torch.testing.assert_close(term, expected)


def test_the_paper_lets_padding_dilute_the_loss() -> None:
    settings = {"preset": "paper", "jitter": 0.0, "aux_weight": 1.0}
    term, seen = training_terms(switched(**settings), rows())
    expected = torch.zeros(())
    for _, routing, real in seen:
        assert routing.scores is not None
        expected = expected + switch_loss(routing.scores, routing.experts, real)
    torch.testing.assert_close(term, expected)


def test_the_z_loss_can_stand_alone_and_both_can_be_off() -> None:
    settings = {"aux": "none", "z_weight": 0.25, "jitter": 0.0}
    term, seen = training_terms(switched(**settings), rows())
    total = torch.zeros(())
    for _, routing, real in seen:
        assert routing.scores is not None
        total = total + 0.25 * z_loss(routing.scores[real])
    torch.testing.assert_close(term, total)
    model = switched(aux="none")
    model.train()(**rows())
    assert auxiliary_loss(model) is None


def test_a_batch_of_padding_alone_adds_nothing() -> None:
    inputs = {**rows(), "attention_mask": torch.zeros(4, 9, dtype=torch.long)}
    for settings in ({"z_weight": 0.1}, {"aux": "none", "z_weight": 0.1}):
        term, _ = training_terms(switched(**settings), inputs)  # type: ignore[arg-type]
        assert term.item() == 0


def test_jitter_leaves_the_experts_their_input() -> None:
    model = switched(jitter=0.5, gate_scale="one", capacity_factor=None, aux="none").train()
    inputs, dense = rows(count=2), tiny.build("bert").train()
    # Copies behind weight 1 do the same whoever is chosen, as long as they see the tokens.
    torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits)


# --- training -----------------------------------------------------------------------------------

ALL_CHANCE = {
    "top_k": 2,
    "second": "random",
    "rounding": "deepspeed",
    "min_capacity": 2,
    "capacity_factor": 0.8,
    "jitter": 0.2,
    "z_weight": 0.01,
    "expert_dropout": 0.3,
}


@pytest.mark.parametrize("settings", [{}, ALL_CHANCE], ids=["switch", "gshard"])
def test_experts_and_router_learn(settings: dict[str, Any]) -> None:
    model = switched(num_experts=2, **settings).train()
    model(**rows("bert", 6)).loss.backward()
    for name, parameter in model.named_parameters():
        if "experts." in name or "router." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_gradient_checkpointing_draws_the_same(family: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = switched(family, **ALL_CHANCE).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        loss = model(**rows(family)).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    (loss, gradients), (again, recomputed) = found
    assert torch.equal(again, loss)
    assert gradients.keys() == recomputed.keys()
    for name in gradients:
        torch.testing.assert_close(recomputed[name], gradients[name], msg=name)


def test_bfloat16_autocast() -> None:
    model = switched(num_experts=2, **ALL_CHANCE).train()
    seen = watched(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**rows()).loss
    loss.backward()
    assert bool(loss.isfinite())
    for _, routing, _ in seen:
        assert routing.scores is not None
        assert routing.scores.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_two_steps_of_finetuning_with_gradient_checkpointing() -> None:
    from moduli.training.finetune import finetune
    from moduli.training.settings import FinetuneSettings
    from tests.training.tinykinds import tokenizer

    words = tokenizer()
    torch.manual_seed(0)
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            num_labels=2,
        )
    )
    moduli.convert(model, moduli.Switch(num_experts=2, layers="all", z_weight=0.001))
    model.gradient_checkpointing_enable()
    before = digests(model)
    data = [{"text": f"the film was {w}", "label": i % 2} for i, w in enumerate(("great", "awful"))]
    settings = FinetuneSettings(max_steps=2, batch_size=4, learning_rate=1e-2)
    result = finetune(model, words, "classification", data * 4, settings=settings, seed=0)
    assert result.steps == 2
    assert all(loss > 0 for loss in result.losses)
    changed = {name for name, digest in digests(model).items() if digest != before[name]}
    assert any("router" in name for name in changed)
    assert any("experts.down_proj" in name for name in changed)


# --- hand-back ----------------------------------------------------------------------------------


def scatter(model: Any) -> Any:
    """Move experts and routers apart, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts." in name or "router." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 2}, {"preset": "paper"}, {"init_scale": 0.1}],
    ids=["default", "gshard", "paper", "scratch"],
)
def test_saved_models_come_back_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    model = scatter(switched(**settings))
    inputs = rows()
    expected = model(**inputs).logits
    report = moduli.save(model, tmp_path / "ours")
    assert not report.exact
    model.save_pretrained(tmp_path / "bare")
    for folder in ("ours", "bare"):
        again = moduli.load(tmp_path / folder)
        assert torch.equal(again(**inputs).logits, expected)
    plain = type(model).from_pretrained(tmp_path / "ours").eval()
    assert set(plain.state_dict()) == set(tiny.build("bert").state_dict())
    with moduli.dense(model):
        dense = model(**inputs).logits
    torch.testing.assert_close(plain(**inputs).logits, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_merging_untrained_copies_restores_every_tensor(family: str) -> None:
    model = tiny.build(family)
    before = digests(model)
    moduli.convert(model, moduli.Switch(num_experts=3, layers="all"))
    assert moduli.merge(model).exact
    assert digests(model) == before


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({}, False),
        ({"gate_scale": "prob_times_E"}, False),
        ({"gate_scale": "one"}, True),
        ({"top_k": 2}, True),
    ],
)
def test_merging_is_exact_only_if_no_weight_scales_the_output(
    settings: dict[str, Any], exact: bool
) -> None:
    model, batch = families.build("bert").eval(), families.inputs("bert")
    moduli.convert(model, moduli.Switch(num_experts=3, layers="all", **settings))
    routed = model(**batch).logits
    if not exact:
        with pytest.raises(ModelError, match="scaled by weights that do not sum to 1"):
            moduli.merge(model, exact=True)
        assert torch.equal(model(**batch).logits, routed)
        return
    moduli.merge(model, exact=True)
    torch.testing.assert_close(model(**batch).logits, routed, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_merged_layer_lacks_the_weight_of_its_expert() -> None:
    """At "prob" it gives FFN(x) where equal copies give p FFN(x), up to E times as much."""
    model = switched(gate_scale="prob", layers=[0])
    (layer,), seen = routed_layers(model).values(), watched(model)
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    ids = rows()["input_ids"]
    model(ids)
    with moduli.dense(model):
        model(ids)
    weights = seen[0][1].weights.reshape(*outputs[0].shape[:2], 1)
    torch.testing.assert_close(outputs[0], weights * outputs[1], rtol=1e-4, atol=1e-5)
    assert 1 / 3 < float(weights.min()) < float(weights.max()) < 1


@torch.no_grad()
def test_top_k_turns_switch_into_gshard_and_back() -> None:
    inputs = rows()
    one, two = (switched(top_k=k) for k in (1, 2))
    switch, gshard = one(**inputs).logits, two(**inputs).logits
    for model, k, expected in ((one, 2, gshard), (two, 1, switch), (one, 1, switch)):
        moduli.set_top_k(model, k)
        assert torch.equal(model(**inputs).logits, expected)
    assert not torch.allclose(switch, gshard)


@pytest.mark.parametrize(
    ("settings", "k", "says"),
    [
        ({}, 3, "top_k is 3; a router of Switch takes 1 .* GShard, 2.*SparseUpcycling"),
        ({"gate_scale": "one"}, 2, "top_k is 2, but .*gate_scale"),
        ({"gate_scale": "prob_times_E"}, 2, "top_k is 2, but .*gate_scale"),
    ],
)
def test_a_top_k_that_settings_refuse_is_refused_later(
    settings: dict[str, Any], k: int, says: str
) -> None:
    model = switched(**settings)
    recorded = dict(model.config.moduli)
    with pytest.raises(ConfigError, match=says):
        moduli.set_top_k(model, k)
    assert model.config.moduli == recorded
    assert next(iter(routed_layers(model).values())).router.rule.top_k == 1


def test_trained_copies_cannot_be_merged_exactly() -> None:
    model = scatter(switched())
    with pytest.raises(ModelError, match="cannot be merged exactly"):
        moduli.merge(model, exact=True)
    assert moduli.merge(model).averaged


@torch.no_grad()
def test_a_translator_generates_the_same_with_and_without_a_cache() -> None:
    model, inputs = families.build("t5"), families.inputs("t5")
    moduli.convert(model, moduli.Switch(num_experts=3, layers="all", router_std=0.5))
    prompt = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    found = [model.generate(**prompt, max_new_tokens=6, use_cache=use) for use in (True, False)]
    assert torch.equal(*found)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 3}, r"top_k is 3; it may be 1 \(Switch\) or 2 \(GShard\).*SparseUpcycling"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2, "num_experts": 1}, "top_k is 2, but there are 1 experts"),
        ({"capacity_factor": 0.0}, "capacity factor of 0"),
        ({"capacity_factor": -1.25}, "capacity factor of -1.25"),
        ({"rounding": "megatron"}, "rounding is 'megatron'"),
        ({"preset": "papers"}, "Did you mean 'paper'"),
        ({"second": "none"}, "second is 'none'"),
        ({"gate_scale": "two"}, "gate_scale is 'two'"),
        ({"gate_scale": "one", "top_k": 2}, "gate_scale='one' is for top_k=1"),
        ({"aux": "load_importance"}, "aux is 'load_importance'"),
        ({"z_weight": -0.1}, "z_weight is -0.1"),
        ({"jitter": 1.0}, "jitter is 1.0"),
        ({"expert_dropout": 1.0}, "expert_dropout is 1.0"),
        ({"init_scale": 0.0}, "init_scale is 0.0"),
    ],
)
def test_settings_that_cannot_work(
    settings: dict[str, Any], message: str, without_shape_checks: None
) -> None:
    with pytest.raises(ConfigError, match=message):
        moduli.Switch(**settings)


def test_tutel_reads_a_factor_of_its_own_way() -> None:
    moduli.Switch(rounding="tutel", capacity_factor=0.0)
    moduli.Switch(rounding="tutel", capacity_factor=-1.25)
