"""Balanced clustering of keys by exact pair swaps.

Minimises J, the sum of squared distances of unit keys to the mean of their expert, over partitions
with given sizes. With S_i the sum and n_i the number of the keys of expert i,

    J = sum_j |u_j|^2 - Q,   Q = sum_i |S_i|^2 / n_i,

and swapping neuron p (expert a) with q (expert b), d = u_q - u_p, changes Q by

    (2 S_a.d + |d|^2) / n_a - (2 S_b.d - |d|^2) / n_b.

From a seeded balanced start, each neuron in turn takes its best swap if that raises Q, until a
whole pass finds none. Dot products u_p.u_q come from the Gram matrix, kept whole while it fits a
memory limit and otherwise computed in blocks of rows.

EMoE clusters with k-means-constrained (min-cost flow); this search explains more on nearly every
layer tried and needs no solver. Letters: D width, F neurons, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moduli.errors import ConfigError
from moduli.surgery.partition.quality import unit_keys
from moduli.surgery.partition.sizes import balanced_sizes, contiguous_labels

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[int, int, float], None]
"""Called with (passes done, swaps in the last pass, share of the total explained so far)."""

BLOCK = 512  # rows of the Gram matrix at a time when it does not fit


def balanced_clusters(
    keys: Float[Tensor, "F D"],
    num_experts: int,
    *,
    seed: int = 0,
    starts: int | None = None,
    max_passes: int = 100,
    time_limit: float | None = None,
    memory_limit: int = 2 << 30,
    initial: Int[Tensor, " F"] | None = None,
    progress: Progress | None = None,
) -> Int[Tensor, " F"]:
    """Expert of every neuron; experts have ⌊F/E⌋ or ⌈F/E⌉ neurons.

    The same arguments give the same labels, unless the time limit cuts the search.

    Args:
        keys: one row per neuron; scaled to unit length here.
        num_experts: E.
        seed: of the shuffled start.
        starts: searches from seeds seed, seed + 1, ...; the best is kept. None: 4, or 1 for more
            than 4096 neurons.
        max_passes: over all neurons, per start.
        time_limit: seconds for everything; the best partition so far is returned, which is
            balanced at any moment.
        memory_limit: bytes that the Gram matrix may take before it is computed in blocks.
        initial: labels to start from instead of a shuffle (warm start); they fix the sizes.
        progress: see `Progress`.

    Raises:
        ConfigError: more experts than neurons, keys that are not finite, or labels that do not
            use every expert.
    """
    width = keys.shape[0]
    balanced_sizes(width, num_experts)  # raises
    unit = unit_keys(keys)
    if not bool(torch.isfinite(unit).all()):
        raise ConfigError("the keys contain NaN or infinity and cannot be clustered")
    deadline = None if time_limit is None else time.monotonic() + time_limit
    precise = 8 * width * width <= min(memory_limit, 256 << 20)
    u: Array = unit.numpy().astype(np.float64 if precise else np.float32)
    fits = u.itemsize * width * width <= memory_limit
    gram: Array | None = np.matmul(u, u.T) if fits else None
    best: tuple[float, Array] | None = None
    starts = starts or (4 if width <= 4096 else 1)
    for start in range(1 if initial is not None else starts):
        labels = _start(width, num_experts, seed + start, initial)
        gain = _search(u, gram, labels, num_experts, max_passes, deadline, progress)
        if best is None or gain > best[0]:
            best = (gain, labels)
        if deadline is not None and time.monotonic() > deadline:
            break
    assert best is not None  # at least one start ran
    return torch.from_numpy(best[1])


def _start(width: int, num_experts: int, seed: int, initial: Tensor | None) -> Array:
    if initial is None:
        even = contiguous_labels(width, num_experts).numpy()
        return np.random.default_rng(seed).permutation(even)
    labels: Array = initial.cpu().numpy().astype(np.int64).copy()
    if labels.shape != (width,) or set(np.unique(labels)) != set(range(num_experts)):
        raise ConfigError(
            f"initial labels must name each of {num_experts} experts for {width} neurons"
        )
    return labels


def _search(
    u: Array,
    gram: Array | None,
    labels: Array,
    num_experts: int,
    max_passes: int,
    deadline: float | None,
    progress: Progress | None,
) -> float:
    """Improve `labels` in place until no swap helps; returns Q."""
    width = len(u)
    share = (1.0 / np.bincount(labels, minlength=num_experts)).astype(u.dtype)  # 1 / n_i
    sums = np.zeros((num_experts, u.shape[1]), u.dtype)
    np.add.at(sums, labels, u)
    table = np.ascontiguousarray(sums @ u.T)  # table[i, j] = S_i . u_j
    square = np.einsum("fd,fd->f", u, u)
    total = float(square.sum() - np.square(u.sum(0)).sum() / width)
    everyone = np.arange(width)
    own = table[labels, everyone]  # S of each neuron's own expert, dot the neuron
    threshold = (1e-9 if u.dtype == np.float64 else 1e-6) * float(share.min())
    for done in range(1, max_passes + 1):
        swaps = 0
        for first in range(0, width, BLOCK):
            last = min(first + BLOCK, width)
            block = gram[first:last] if gram is not None else u[first:last] @ u.T
            for p in range(first, last):
                a = labels[p]
                row = block[p - first]
                other = share[labels]
                distance = square + square[p] - 2.0 * row
                gain = (2.0 * share[a]) * (table[a] - table[a, p])
                gain -= 2.0 * other * (own - table[labels, p])
                gain += distance * (share[a] + other)
                gain[labels == a] = -np.inf
                q = int(gain.argmax())
                if not gain[q] > threshold:
                    continue
                b = labels[q]
                row_q = gram[q] if gram is not None else u @ u[q]
                change = row_q - row
                table[a] += change
                table[b] -= change
                labels[p], labels[q] = b, a
                mine = (labels == a) | (labels == b)
                own[mine] = table[labels[mine], everyone[mine]]
                swaps += 1
            if deadline is not None and time.monotonic() > deadline:
                break
        quality = float((own * share[labels]).sum())
        if progress is not None:
            within = float(square.sum()) - quality
            progress(done, swaps, (total - within) / total if total > 0 else 0.0)
        if swaps == 0 or (deadline is not None and time.monotonic() > deadline):
            break
    return float((own * share[labels]).sum())
