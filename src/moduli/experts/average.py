"""One dense FFN from experts that hold copies of its neurons.

Every neuron becomes the mean of its copies; where they are all equal it is moved, not computed, so
that what was never trained comes back bit for bit. Letters: D width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from moduli.experts.ffn import ExpertFFN


def average_experts(
    banks: Sequence[ExpertFFN], members: Sequence[Int[Tensor, " _"]], width: int
) -> tuple[ExpertFFN, bool]:
    """The dense FFN as the only entry of an `ExpertFFN`, and whether any two copies differed.

    Args:
        banks: the experts; the output biases are those of the first.
        members: neurons of every expert of all banks, one after the other.
        width: F; a neuron that no expert has is zero in the result.
    """
    index = torch.cat(list(members)).to(banks[0].keys[0].device)
    averaged = False

    def collect(parts: list[Sequence[Tensor] | None]) -> list[Tensor] | None:
        nonlocal averaged
        if any(part is None for part in parts):
            return None
        copies = torch.cat([rows for part in parts if part is not None for rows in part])
        merged, differ = _mean_by(copies, index, width)
        averaged = averaged or differ
        return [merged]

    keys, values = collect([b.keys for b in banks]), collect([b.values for b in banks])
    assert keys is not None
    assert values is not None
    key_bias = collect([b.key_bias for b in banks])
    up_keys, up_bias = collect([b.up_keys for b in banks]), collect([b.up_bias for b in banks])
    each, out_bias = banks[0].out_bias, None
    if each is not None:
        same = bool((each == each[0]).all())
        out_bias = (each[0] if same else each.mean(dim=0))[None]
        averaged = averaged or not same
    return ExpertFFN(keys, values, key_bias, up_keys, up_bias, out_bias), averaged


def _mean_by(copies: Tensor, index: Tensor, width: int) -> tuple[Tensor, bool]:
    """Mean of the rows that stand for the same neuron, and whether any two of them differ."""
    first = copies.new_zeros(width, *copies.shape[1:]).index_copy(0, index.flip(0), copies.flip(0))
    if bool((first.index_select(0, index) == copies).all()):
        return first, False
    counts = torch.bincount(index, minlength=width).clamp_min(1).to(copies.dtype)
    total = torch.zeros_like(first).index_add(0, index, copies)
    return total / counts.reshape(-1, *[1] * (copies.dim() - 1)), True
