"""LoRA in the stacked tensors of experts, by PEFT's `target_parameters`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import moduli
from moduli.errors import ModelError
from tests import tiny
from tests.peft.test_lora import logits

STACKS = {
    "bert": ["experts.up_proj", "experts.down_proj"],
    "llama": ["experts.gate_up_proj", "experts.down_proj"],
}


def adapted(family: str) -> Any:
    model = tiny.build(family)
    moduli.convert(model, moduli.GMoE(num_experts=3, layers="all", projection=8))
    config = LoraConfig(
        r=2, target_modules=[], target_parameters=STACKS[family], init_lora_weights=False
    )
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", STACKS)
def test_adapters_in_experts_are_merged_into_them_before_saving(
    family: str, tmp_path: Path
) -> None:
    model = adapted(family)
    expected = logits(model, family)
    for act in (moduli.merge, lambda m: moduli.save(m, tmp_path / "out")):
        with pytest.raises(ModelError, match=r"carry an adapter.*merge_and_unload"):
            act(model)
    assert not (tmp_path / "out").exists()
    assert torch.equal(logits(model, family), expected)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain, family), expected, rtol=1e-4, atol=1e-4)
    moduli.save(plain, tmp_path / "out")
    loaded = moduli.load(tmp_path / "out")
    assert torch.equal(logits(loaded, family), logits(plain, family))
