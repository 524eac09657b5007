"""Which experts have the best scores: one rule for ties everywhere, at the speed of a sort.

`best` gives the indices of the k largest scores of every row, best first, and of equal scores the
one with the lower index first. `torch.topk` promises nothing about ties, so that a gate that
starts at 0 would choose other experts for one token than for many, or on another device. A score
that is not a number chooses some expert.

The rule is exact because what is ordered are numbers that contain the index: the bits of a float32
score, made to order like integers, in the upper half of 64 bits and the index in the lower. No two
are equal, so that it does not matter who sorts them; on CPU numpy's vectorised sort does it
several times faster than `torch.topk` chooses (`benchmarks/routers.py`).
Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moduli.routing.plain import is_plain

FEW = 512  # up to so many scores a stable argsort is faster than making numbers to sort
INDEX = 0xFFFFFFFF  # the half of a number with the index


def best(scores: Float[Tensor, "T E"], count: int) -> Int[Tensor, "T {count}"]:
    """Indices of the `count` largest scores of every row, best first; of equal ones the lower.

    It has no gradient, and is the same in eager mode, compiled and on every device.
    """
    if scores.requires_grad:
        scores = scores.detach()
    if scores.dtype.itemsize < 4:
        scores = scores.float()
    if is_plain(scores):
        try:
            return _best_in_memory(scores, count)
        except RuntimeError:  # a tensor inside a transform of `torch.func` has no memory to read
            pass
    compiled = torch.compiler.is_compiling() and scores.device.type == "cpu"
    if compiled and scores.dtype == torch.float32:
        # Subtracting turns the order round and makes -0 and 0 the same.
        bits = (0.0 - scores).view(torch.int32)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats order downwards
        numbers = (bits.long() << 32) | torch.arange(scores.shape[1])
        return numbers.topk(count, dim=-1, largest=False).values & INDEX
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _best_in_memory(scores: Tensor, count: int) -> Tensor:
    """The same by numpy."""
    array = scores.numpy()
    if array.size <= FEW or array.dtype != np.float32:
        return torch.from_numpy((-array).argsort(axis=-1, kind="stable")[:, :count].copy())
    bits = np.subtract(np.float32(0), array).view(np.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    numbers = bits.astype(np.int64)
    numbers <<= 32
    numbers |= np.arange(array.shape[1])
    numbers.sort(axis=-1)
    return torch.from_numpy(numbers[:, :count] & INDEX)
