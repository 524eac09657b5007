"""Tiny models with random weights, one of each family, and batches that fit them."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

VOCAB, WIDTH, NEURONS, LAYERS = 61, 16, 36, 2


def bert(dropout: float = 0.0) -> Any:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=NEURONS,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def vit() -> Any:
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=NEURONS,
        image_size=8,
        patch_size=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return ViTForImageClassification(config)


def gpt2() -> Any:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=2,
        n_inner=NEURONS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {"bert": bert, "vit": vit, "gpt2": gpt2, "llama": llama}


def build(family: str, seed: int = 0, scale: float = 8.0) -> Any:
    """The same model for the same seed, in evaluation mode.

    Initial weights of transformers are so small that FFNs hardly matter; `scale` makes them do.
    """
    return initialise(MODELS[family], seed, scale)


def initialise(make: Callable[[], Any], seed: int = 0, scale: float = 8.0) -> Any:
    """As `build`, for any function that makes a model."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:  # computed, not learned
                continue
            if parameter.dim() == 2:
                parameter.mul_(scale)
            elif parameter.numel() > 1 and parameter.std() == 0:  # a bias or the weight of a norm
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def rows(family: str, count: int = 2, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Labelled examples; texts have padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return [
            {
                "pixel_values": torch.randn(3, 8, 8, generator=generator),
                "labels": torch.tensor(i % 3),
            }
            for i in range(count)
        ]
    examples = []
    for i in range(count):
        ids = torch.randint(1, VOCAB, (9,), generator=generator)
        mask = (torch.arange(9) < 9 - 2 * (i % 3)).long()
        labels = torch.tensor(i % 3) if family == "bert" else ids.where(mask == 1, -100)
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return examples


def batch(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as one batch."""
    return {key: torch.stack([row[key] for row in examples]) for key in examples[0]}
