"""Copies, and back: an ordinary checkpoint is the mean, and what was saved is what is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import moduli
from moduli.errors import CheckpointError, ModelError
from moduli.methods.thor.plan import seeded
from moduli.surgery.stochastic import stochastic_projections
from tests import families, tiny
from tests.methods.thor.models import (
    assert_drawn_train,
    build,
    gradients,
    labelled,
    parted,
)
from tests.surgery.test_roundtrip import digests

FAMILIES = [
    *("bert", "gpt2", "llama"),
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("vit", "t5", "bart", "whisper")),
]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_untouched_copies_come_back_bit_for_bit(family: str) -> None:
    model = families.build(family)
    before, batch = digests(model), families.inputs(family)
    expected, config = families.outputs(model, batch), model.config.to_dict()
    report = moduli.convert(model, moduli.THOR(num_experts=3, layers="all"))
    assert report is not None
    assert len(report.layers) == families.ffn_count(family)
    assert report.added_parameters > 0
    assert torch.equal(families.outputs(model, batch), expected)
    assert moduli.merge(model, exact=True).exact
    assert digests(model) == before
    assert model.config.to_dict() == config
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not hooks
    assert torch.equal(families.outputs(model, batch), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_and_plain_transformers(family: str, tmp_path: Path) -> None:
    model, batch = parted(build(family)), families.inputs(family)
    average = families.outputs(model, batch)
    moduli.set_inference(model, "fixed:1")
    expected = families.outputs(model, batch)
    report = moduli.save(model, tmp_path / "saved", batch=batch)
    assert not report.exact
    assert report.gap is not None
    assert report.gap > 0
    plain = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(families.outputs(plain, batch), average)
    assert not hasattr(plain.config, "moduli")
    again = moduli.load(tmp_path / "saved")
    assert torch.equal(families.outputs(again, batch), expected)
    model.save_pretrained(tmp_path / "bare")  # as a Trainer's checkpoint
    bare = moduli.load(tmp_path / "bare")
    assert torch.equal(families.outputs(bare, batch), expected)
    assert digests(bare) == digests(again) == digests(model)


@torch.no_grad()
def test_parted_copies_merge_into_their_mean() -> None:
    model = parted(build("gpt2"))
    path, projection = next(iter(stochastic_projections(model).items()))
    mean = torch.stack([e.weight for e in projection.experts]).mean(0)
    with pytest.raises(ModelError, match="its copies were trained apart"):
        moduli.merge(model, exact=True)
    report = moduli.merge(model)
    assert not report.exact
    assert f"experts of {path}" in report.averaged
    torch.testing.assert_close(model.get_submodule(path).weight, mean)


def test_copies_are_layers_of_their_own() -> None:
    model = build("llama")
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    projection = next(iter(stochastic_projections(model).values()))
    assert {type(expert) for expert in projection.experts} == {torch.nn.Linear}


@torch.no_grad()
def test_noise_is_relative_and_seeded() -> None:
    dense = tiny.build("bert").bert.encoder.layer[0].intermediate.dense.weight
    drawn = {}
    for seed in (1, 1, 2):
        model = build("bert", noise=0.1, seed=seed)
        experts = next(iter(stochastic_projections(model).values())).experts
        moved = torch.stack([e.weight - dense for e in experts])
        assert float(moved.std() / dense.std()) == pytest.approx(0.1, rel=0.05)
        assert not torch.equal(moved[0], moved[1])
        if seed in drawn:
            assert torch.equal(moved, drawn[seed])
        drawn[seed] = moved
    assert not torch.equal(drawn[1], drawn[2])
    assert seeded(1).initial_seed() != seeded(2).initial_seed()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # which PEFT mends itself
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_experts_carry_adapters(family: str) -> None:
    """LoRA on every expert: what is drawn trains, modes compute with it, merging brings it home."""
    model, batch = build(family), labelled(family)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=r".*\.experts\.\d+", init_lora_weights=False)
    )
    adapted.train()(**batch).loss.backward()
    assert all("lora_" in name for name in gradients(adapted))
    assert_drawn_train(adapted, "lora_")
    with pytest.raises(ModelError, match="carry an adapter"):
        moduli.merge(adapted)
    adapted.eval()
    with torch.no_grad():
        average = adapted(**batch).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, average, rtol=1e-4, atol=1e-5)
        assert moduli.merge(merged).averaged


@pytest.mark.parametrize("names", [["dense"], ["experts"]])
def test_names_of_projections_are_no_targets_of_adapters(names: list[str]) -> None:
    """As the page says: such a name stands for all experts of a projection together."""
    with pytest.raises(ValueError, match=r"is not supported"):
        get_peft_model(build("bert"), LoraConfig(r=2, target_modules=names))


def test_another_number_of_copies_is_not_resumed(tmp_path: Path) -> None:
    from moduli.surgery.convert import require_same_layout

    build("bert").save_pretrained(tmp_path)
    require_same_layout(build("bert", seed=3), tmp_path)
    for other in (build("bert", num_experts=2), build("bert", layers=[0]), tiny.build("bert")):
        with pytest.raises(CheckpointError, match="another order"):
            require_same_layout(other, tmp_path)


def test_what_is_converted_is_not_converted_again() -> None:
    with pytest.raises(ModelError, match="is modular already"):
        moduli.convert(build("bert"), moduli.EMoE())
    with pytest.raises(ModelError, match="no stochastic experts"):
        moduli.set_inference(tiny.build("bert"), "average")


@torch.no_grad()
def test_the_seed_of_an_inference_mode_is_saved(tmp_path: Path) -> None:
    model, batch = parted(build("bert", num_experts=4), by=1.0).eval(), families.inputs("bert")
    moduli.set_inference(model, "random_sentence", seed=7)
    expected = model(**batch).logits
    moduli.save(model, tmp_path / "seven")
    assert torch.equal(moduli.load(tmp_path / "seven").eval()(**batch).logits, expected)
    moduli.set_inference(model, "random_sentence", seed=8)
    assert not torch.equal(model(**batch).logits, expected)
