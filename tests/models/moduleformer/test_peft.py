"""LoRA by PEFT: in the stacks of both kinds of experts, and in the projections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.models.moduleformer import small

STACKS = [
    "q_proj.experts.weight",
    "q_proj.output_experts.weight",
    "mlpf.experts.up_proj",
    "mlpf.experts.down_proj",
]


@pytest.fixture
def adapted() -> Any:
    model = small.build()
    config = LoraConfig(
        r=2, target_modules=["k_proj", "v_proj"], target_parameters=STACKS,
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config).eval()


def test_every_target_learns_and_nothing_else(adapted: Any) -> None:
    ids = small.tokens(8)
    adapted(input_ids=ids, labels=ids).loss.backward()
    learning = {n for n, p in adapted.named_parameters() if p.grad is not None}
    assert all("lora_" in name for name in learning)
    assert all(p.grad.abs().max() > 0 for n, p in adapted.named_parameters() if n in learning)
    assert len(learning) == 2 * 2 * (len(STACKS) + 2)  # two factors, two layers


def test_a_merged_adapter_computes_what_it_did(adapted: Any, tmp_path: Path) -> None:
    ids = small.tokens()
    expected = adapted(input_ids=ids).logits
    assert (expected - small.build()(ids).logits).abs().max() > 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(small.build(), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, expected)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(plain(ids).logits, merged(ids).logits)
    assert {n for n, _ in plain.named_parameters()} == {
        n for n, _ in small.build().named_parameters()
    }


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_an_adapter(adapted: Any, reentrant: bool) -> None:
    ids = small.tokens()

    def gradients() -> dict[str, torch.Tensor]:
        adapted.zero_grad()
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}

    adapted.train()
    expected = gradients()
    adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapted.enable_input_require_grads()
    found = gradients()
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5, msg=name)
