"""LoRA on models converted by MoEfication and LLaMA-MoE, and conversion of models with LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import moduli
from moduli.surgery.modular import routed_layers
from tests import tiny

TARGETS = ["intermediate.dense", "output.dense"]
METHODS: dict[str, Any] = {
    "ground truth": moduli.MoEfication(num_experts=6, top_k=2, select="ground_truth"),
    "fitted": moduli.MoEfication(num_experts=6, top_k=2, select="mlp", router_epochs=2),
    "llama-moe": moduli.LlamaMoE(num_experts=6, top_k=2, split="importance"),
}


def data() -> list[dict[str, torch.Tensor]]:
    return [tiny.batch(tiny.rows("bert", 3, seed=i)) for i in range(6)]


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:the activation of this model")
def test_adapters_before_or_after_and_back_to_the_original_base(name: str, tmp_path: Path) -> None:
    batch = data()[0]
    before = adapted(tiny.build("bert"))
    dense = before(**batch).logits
    moduli.convert(before, METHODS[name], batch=data())
    assert not torch.allclose(before(**batch).logits, dense)
    with moduli.dense(before):
        torch.testing.assert_close(before(**batch).logits, dense, atol=1e-5, rtol=1e-4)
    before.train()(**batch).loss.backward()
    trained = [p for n, p in before.named_parameters() if "lora_" in n and p.grad is not None]
    assert len(trained) == len([n for n, _ in before.named_parameters() if "lora_" in n])
    moduli.merge(before.eval(), exact=True)
    torch.testing.assert_close(before(**batch).logits, dense)
    before.save_pretrained(tmp_path)
    served = PeftModel.from_pretrained(tiny.build("bert"), tmp_path).eval()
    torch.testing.assert_close(served(**batch).logits, dense)


@torch.no_grad()
def test_the_ground_truth_sees_the_adapter() -> None:
    model = tiny.build("bert")
    moduli.convert(model, METHODS["ground truth"], batch=data())
    seen: list[torch.Tensor] = []
    shared = next(iter(routed_layers(model).values())).shared
    shared.record = lambda name, routing, real: seen.append(routing.scores)
    model(**data()[0])
    adapted(model)(**data()[0])
    assert not torch.allclose(seen[0], seen[2])
