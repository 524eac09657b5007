"""Tiny dense checkpoints of every family, the same bits wherever they are made.

Also used where moduli is not installed, by the script that runs mergekit; it imports nothing of
ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

KINDS: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "olmo2": Olmo2Config,
}
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
OWN: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 8}}


def tiny_config(family: str, **changes: Any) -> Any:
    return KINDS[family](**{**SIZES, **OWN.get(family, {}), **changes})


def tiny_model(family: str, seed: int, **changes: Any) -> Any:
    """A model whose every weight is drawn from a generator of its own, in order of names."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.dim() == 2 else 1 + 0.1 * noise)
    return model


def tiny_tokenizer(vocab_size: int = 61) -> PreTrainedTokenizerFast:
    """One token per word: w3 has id 3."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_source(folder: Path, family: str, seed: int, **changes: Any) -> Path:
    """A directory as `save_pretrained` writes it, with tokenizer and generation settings."""
    model = tiny_model(family, seed, **changes)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, max_new_tokens=7)
    model.save_pretrained(folder)
    tiny_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder
