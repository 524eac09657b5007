"""PEFT's `modules_to_save` on converted models: trained gates, and projections trained in full."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import moduli
from moduli.surgery.modular import routed_layers
from tests import tiny
from tests.peft.test_lora import adapted, logits, train
from tests.training.test_auxiliary import assert_same, term_by_hand
from tests.training.test_auxiliary import train as step

COPIES = {
    "bert": (["query"], ["intermediate.dense"]),
    "gpt2": (["c_attn"], ["c_fc", "mlp.c_proj"]),
    "llama": (["q_proj"], ["gate_proj", "down_proj"]),
}


@pytest.mark.parametrize("family", COPIES)
def test_projections_trained_in_full(family: str, tmp_path: Path) -> None:
    model = tiny.build(family)
    moduli.convert(model, moduli.EMoE(num_experts=5, top_k=2, layers="all"))
    targets, copies = COPIES[family]
    config = LoraConfig(
        r=2, target_modules=targets, fan_in_fan_out=family == "gpt2", modules_to_save=copies
    )
    model = get_peft_model(model, config)
    train(model, family, tmp_path / "run")
    with moduli.dense(model):
        expected = logits(model, family)
    moduli.save(model, tmp_path / "saved")
    moduli.merge(model)
    merged = logits(model, family)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    fresh = PeftModel.from_pretrained(tiny.build(family), tmp_path / "saved")
    assert torch.equal(logits(fresh, family), merged)
    with model.disable_adapter():  # what was under the copies is in its place again
        found = logits(model, family)
    assert torch.equal(found, logits(tiny.build(family), family))


def test_a_gate_that_is_trained_beside_adapters(tmp_path: Path) -> None:
    settings = {"gate": "linear", "aux": "switch"}
    model = adapted("bert", settings, modules_to_save=["router", "classifier"])
    gates = {n: p for n, p in model.named_parameters() if "router" in n and p.requires_grad}
    start = {name: gate.detach().clone() for name, gate in gates.items()}
    assert len(gates) == tiny.LAYERS
    train(model, "bert", tmp_path / "run")
    assert all(not torch.equal(start[name], gate) for name, gate in gates.items())
    two = logits(model, "bert")
    moduli.set_top_k(model, 4)
    assert not torch.equal(logits(model, "bert"), two)
    moduli.save(model, tmp_path / "saved")
    moduli.merge(model)
    fresh = PeftModel.from_pretrained(tiny.build("bert"), tmp_path / "saved")
    assert torch.equal(logits(fresh, "bert"), logits(model, "bert"))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_auxiliary_loss_reaches_the_factors(family: str, tmp_path: Path) -> None:
    def model(aux: str) -> Any:
        settings = {"gate": "linear", "aux": aux, "aux_weight": 0.5}
        return adapted(family, settings, init_lora_weights=False)

    rows = tiny.rows(family)
    torch.manual_seed(3)
    _, (plain,) = step(model("none"), tmp_path, rows * 2, family, gradient_accumulation_steps=2)
    torch.manual_seed(3)
    with_term = model("switch")
    _, (found,) = step(with_term, tmp_path, rows * 2, family, gradient_accumulation_steps=2)
    _, term = term_by_hand(with_term, tiny.batch(rows))
    assert found
    assert all("lora_" in name for name in found)
    assert any("lora_" in name and bool(term[name].any()) for name in found)
    assert_same(found, {name: term[name] + plain[name] for name in found})
    assert len(routed_layers(with_term)) == tiny.LAYERS
