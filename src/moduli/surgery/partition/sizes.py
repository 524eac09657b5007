"""Sizes of experts, and the two partitions that look at nothing.

Letters: F neurons, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from moduli.errors import ConfigError


def balanced_sizes(width: int, num_experts: int) -> tuple[int, ...]:
    """Sizes that differ by one at most: the first F mod E experts have one neuron more.

    Raises:
        ConfigError: there are more experts than neurons, or none.
    """
    if not 1 <= num_experts <= width:
        raise ConfigError(
            f"num_experts is {num_experts}, but the FFN has {width} neurons; "
            f"choose 1 to {width} (a divisor of {width} gives equal experts)"
        )
    small, larger = divmod(width, num_experts)
    return tuple(small + 1 if i < larger else small for i in range(num_experts))


def contiguous_labels(width: int, num_experts: int) -> Int[Tensor, " F"]:
    """Blocks of neurons in their original order: what EMoE's `random_cluster` really builds."""
    sizes = torch.tensor(balanced_sizes(width, num_experts))
    return torch.repeat_interleave(torch.arange(num_experts), sizes)


def random_labels(width: int, num_experts: int, seed: int) -> Int[Tensor, " F"]:
    """A seeded shuffle of balanced labels."""
    labels = contiguous_labels(width, num_experts).numpy()
    return torch.from_numpy(np.random.default_rng(seed).permutation(labels))
