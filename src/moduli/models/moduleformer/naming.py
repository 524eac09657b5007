"""The published names of tensors, where they differ from those of modules.

Two tensors of a layer are called otherwise, since feed-forward experts keep transformers' contract;
and published files carry two masks per layer that nothing reads.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from moduli.models.moduleformer.configuration import ModuleFormerConfig

RENAMED = {
    r"mlpf\.experts\.weight": "mlpf.experts.up_proj",
    r"mlpf\.output_experts\.weight": "mlpf.experts.down_proj",
}
"""Pattern of a published name, and ours."""

DEAD_BUFFERS = (r"attn\.mask$", r"attn\.cum_weight$")
"""Patterns of tensors that are written and not read."""


def register_names() -> None:
    """Teach transformers to rename, in loading and saving."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping: list[WeightConverter | WeightRenaming] = [
        WeightRenaming(theirs, ours) for theirs, ours in RENAMED.items()
    ]
    register_checkpoint_conversion_mapping(ModuleFormerConfig.model_type, mapping, overwrite=True)


def take_published_names(module: Any, state: dict[str, Tensor], *_: Any) -> None:
    """Hook by which `load_state_dict` takes the tensors of a checkpoint as they are called in the
    file, as a `Trainer` that resumes gives them."""
    for name in list(state):
        if any(re.search(dead, name) for dead in DEAD_BUFFERS):
            del state[name]
            continue
        for theirs, ours in RENAMED.items():
            if (known := re.sub(theirs, ours, name)) != name:
                state[known] = state.pop(name)


def dead_buffers(config: ModuleFormerConfig, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The masks of the reference's training: by name, for every layer."""
    length = config.block_size + config.history_length
    ones = torch.ones(length, length)
    found = {}
    for i in range(config.n_layer):
        found[f"{prefix}h.{i}.attn.mask"] = ones.tril().to(torch.int8)
        found[f"{prefix}h.{i}.attn.cum_weight"] = ones.tril(-1).to(dtype)
    return found
