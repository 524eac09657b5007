"""Architectures of ours are inspected like any other: both routers of every block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moduli
from moduli.data.task import Splits, Task
from moduli.inspect.duplicates import duplicate_experts
from moduli.inspect.text import layer_names
from moduli.inspect.watching import expert_layers, watch
from moduli.models.moduleformer import ModuleFormerConfig, ModuleFormerForCausalLM

MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = ModuleFormerConfig(
        vocab_size=64, n_embd=16, att_hidden=8, n_head=2, ffd_hidden=12, n_layer=2,
        n_att_experts=4, n_mlp_experts=6, gating_size=8, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return ModuleFormerForCausalLM(config).eval()


def test_both_routers_of_every_block_are_watched(model: Any) -> None:
    layers = expert_layers(model)
    assert [layer.num_experts for layer in layers] == [4, 6, 4, 6]
    with torch.no_grad(), watch(model) as seen:
        out = model(torch.randint(64, MASK.shape), MASK, output_router_logits=True)
    assert [one.layer for one in seen] == [layer.name for layer in layers]
    for one, logits, experts in zip(seen, out.router_logits, out.router_experts, strict=True):
        assert one.real is not None
        assert torch.equal(one.real, MASK.bool().flatten())
        assert one.routing.scores is not None
        assert torch.equal(one.routing.scores, logits)
        assert torch.equal(one.routing.experts, experts)


def test_equal_experts_are_found_in_both_kinds(model: Any) -> None:
    block = model.transformer.h[1]
    with torch.no_grad():
        for tensor in (*block.attn.q_proj.experts.parameters(),
                       *block.attn.q_proj.output_experts.parameters(),
                       *block.mlpf.experts.parameters()):  # fmt: skip
            tensor[3] = tensor[1]
    pairs = [duplicate_experts(layer.module) for layer in expert_layers(model)]
    assert [[pair[:2] for pair in found] for found in pairs] == [[], [], [(1, 3)], [(1, 3)]]


def test_an_inspection_has_a_table_of_every_layer(model: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "b", "c", "d"])}
    bare = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="[PAD]", unk_token="[UNK]")
    rows = Dataset.from_dict({"text": ["a b c d a b", "d c b a", "a a a b"]})
    splits = Splits(train=rows, validation=rows, test=rows)
    task = Task("letters", "language-modeling", (), {"one": splits})
    found = moduli.inspect_model(model, tokenizer, task)
    assert len(found.layers) == 4
    for layer in found.layers:
        assert sum(layer.load) > 0


def test_two_layers_of_a_block_are_told_apart_in_few_letters() -> None:
    parts = [f"transformer.h.{i}.{part}" for i in (0, 10) for part in ("attn.q_proj", "mlpf")]
    assert layer_names(parts) == ["0 attn", "0 mlpf", "10 attn", "10 mlpf"]
    assert layer_names(parts[::2]) == ["layer 0", "layer 10"]
    alike = ["h.0.mlp.a", "h.0.mlp.b"]
    assert layer_names(alike) == alike
    assert layer_names(["mlp", "head"]) == ["mlp", "head"]
