"""Tiny ModuleFormers with random weights, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moduli.models.moduleformer import ModuleFormerConfig, ModuleFormerForCausalLM
from tests import tiny

VOCAB, WIDTH = 61, 32
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "att_hidden": 16,
    "n_head": 2,
    "ffd_hidden": 24,
    "n_layer": 2,
    "n_att_experts": 4,
    "k_att": 2,
    "n_mlp_experts": 5,
    "k_mlp": 2,
    "gating_size": 8,
    "block_size": 8,
    "history_length": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# As all published checkpoints: keys and values are the input itself.
PUBLISHED_KIND = {"att_hidden": WIDTH, "n_head": 1}


def config(**changes: Any) -> ModuleFormerConfig:
    return ModuleFormerConfig(**{**SIZES, **changes})


def build(seed: int = 0, *, auto: Any = ModuleFormerForCausalLM, **changes: Any) -> Any:
    """The same model for the same seed, in evaluation mode, with weights of a size that matters."""
    model = tiny.initialise(lambda: auto(config(**changes)), seed)
    with torch.no_grad():  # expert tensors start as small as 1 / width
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.mul_(8)
    return model


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)
