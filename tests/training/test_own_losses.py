"""Auxiliary losses that a language model adds by itself are trained too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import moduli
from moduli.inspect.watching import watch
from moduli.models.moduleformer import ModuleFormerConfig, ModuleFormerForCausalLM
from moduli.training.auxiliary import adds_own_losses, with_stock_auxiliary
from moduli.training.finetune import finetune
from moduli.training.settings import FinetuneSettings

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "in", "mat", "park", "and", "then", "slept"]


@pytest.fixture
def tokenizer() -> Any:
    bare = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"
        )
    )
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="[PAD]", unk_token="[UNK]")


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (48, 12), generator=generator).tolist()
    return Dataset.from_dict({"text": [" ".join(WORDS[i] for i in row) for row in picks]})


def moduleformer(weight: float) -> Any:
    torch.manual_seed(0)
    return ModuleFormerForCausalLM(
        ModuleFormerConfig(
            vocab_size=16, n_embd=16, att_hidden=8, n_head=2, ffd_hidden=12, n_layer=2,
            n_att_experts=4, n_mlp_experts=6, gating_size=8, bos_token_id=None, eos_token_id=None,
            pad_token_id=0, concentration_weight=weight,
        )
    )  # fmt: skip


def mixtral(told: bool) -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=16, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=6,
            output_router_logits=told, router_aux_loss_coef=5.0, bos_token_id=None,
            eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip


def unevenness(model: Any) -> float:
    """Mean over routers of the entropy that mean probabilities lack, in nats."""
    model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), watch(model) as seen:
        model(torch.randint(2, 15, (4, 12), generator=generator))
    lacks = []
    for one in seen:
        assert one.routing.scores is not None
        p = one.routing.scores.softmax(-1).mean(0)
        lacks.append(float(p.log().mul(p).sum()) + torch.tensor(float(len(p))).log().item())
    return sum(lacks) / len(lacks)


def trained(model: Any, tokenizer: Any, accumulation: int = 1) -> Any:
    settings = FinetuneSettings(
        learning_rate=1e-2, max_steps=12, batch_size=4, max_length=16, bf16=False,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    result = finetune(model, tokenizer, "language-modeling", rows(), settings=settings, seed=0)
    return model, result.losses


def test_concentration_gathers_the_load(tokenizer: Any) -> None:
    without, with_it = (trained(moduleformer(w), tokenizer)[0] for w in (0.0, 2.0))
    assert unevenness(with_it) > 10 * unevenness(without)


def test_stock_mixtures_are_balanced_when_asked(tokenizer: Any) -> None:
    found = {}
    for told in (False, True):
        model = mixtral(told)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight[0] += 2.0  # uneven at the start
        assert not adds_own_losses(model)
        found[told] = unevenness(trained(model, tokenizer)[0])
    assert found[True] < found[False]


def test_a_stock_auxiliary_loss_counts_by_its_share_of_the_step() -> None:
    model = mixtral(True)
    ids = torch.randint(2, 15, (3, 9), generator=torch.Generator().manual_seed(2))
    out = model(ids)

    def nothing(outputs: Any, labels: torch.Tensor, count: Any) -> torch.Tensor:
        return torch.zeros(())

    loss = with_stock_auxiliary(nothing, model)
    whole = 5.0 * out.aux_loss
    torch.testing.assert_close(loss(out, ids, None), whole)
    torch.testing.assert_close(loss(out, ids, 4 * 3 * 8), whole / 4)


def test_the_loss_of_an_unweighted_model_does_not_change(tokenizer: Any) -> None:
    """The model's own loss is the one that is made of its logits."""
    _, made = trained(moduleformer(0.0), tokenizer, accumulation=2)
    _, own = trained(moduleformer(1e-12), tokenizer, accumulation=2)
    assert own == pytest.approx(made, rel=1e-5)


def test_a_directory_of_a_registered_architecture_loads(tmp_path: Path) -> None:
    model = moduleformer(0.0)
    model.save_pretrained(tmp_path)
    again = moduli.load(tmp_path)
    ids = torch.arange(2, 14)[None]
    assert type(again) is type(model)
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
