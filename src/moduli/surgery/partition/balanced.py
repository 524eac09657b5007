"""Balanced clustering of keys: exchanges of many neurons at once, then swaps of two.

Minimises J, the sum of squared distances of unit keys to the mean of their expert, over partitions
with given sizes. With S_i the sum and n_i the number of the keys of expert i,

    J = sum_j |u_j|^2 - Q,   Q = sum_i |S_i|^2 / n_i.

From seeded balanced starts, `lloyd.exchanges` moves all neurons at once by an exact assignment
per step; the best result is polished by `pairswap.swap_passes` until no swap of two neurons helps.

EMoE clusters with k-means-constrained (min-cost flow), whose steps are assignments of the same
kind; this search explains more of the spread on every real layer tried, in a fraction of the time
(`benchmarks/clustering.py`). Letters: D width, F neurons, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moduli.errors import ConfigError
from moduli.surgery.partition.lloyd import cluster_sums, clustering_quality, exchanges
from moduli.surgery.partition.pairswap import swap_passes
from moduli.surgery.partition.quality import unit_keys
from moduli.surgery.partition.sizes import balanced_sizes, contiguous_labels

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[int, int, float], None]
"""Called with (passes done in all, neurons moved in the last, share of the total explained)."""

SMALL = 1024  # neurons: below, starts cost next to nothing
LARGE = 4096  # neurons: from there on one start, and no polish: F^2 D would take all the time
CERTAIN = 32  # experts: one start is enough from there on, the results of several are so alike


def balanced_clusters(
    keys: Float[Tensor, "F D"],
    num_experts: int,
    *,
    seed: int = 0,
    starts: int | None = None,
    polish: bool | None = None,
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
        starts: searches from seeds seed, seed + 1, ...; the best is kept. None: 4 for less than
            1024 neurons, 1 for more than 4096, and between 32 / E rounded up, 4 at most.
        polish: swap pairs of neurons in the best of them until no swap helps. None: up to 4096
            neurons.
        max_passes: over all neurons, per start and in the polish.
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
    u: Array = unit.numpy()
    squares = float(np.einsum("fd,fd->", u, u, dtype=np.float64))
    total = squares - float(np.square(u.sum(0, dtype=np.float64)).sum()) / width
    done = 0

    def follow(passes: Iterator[tuple[int, float]]) -> None:
        nonlocal done
        for moved, quality in islice(passes, max_passes):
            done += 1
            if progress is not None:
                explained = total - (squares - quality)
                progress(done, moved, explained / total if total > 0 else 0.0)
            if deadline is not None and time.monotonic() > deadline:
                break

    if starts is None:
        starts = 4 if width < SMALL else 1 if width > LARGE else min(4, -(-CERTAIN // num_experts))
    best: tuple[float, Array] | None = None
    for start in range(1 if initial is not None else starts):
        labels = _start(width, num_experts, seed + start, initial)
        follow(exchanges(u, labels, num_experts, np.random.default_rng(seed + start)))
        sizes = np.bincount(labels, minlength=num_experts)
        quality = clustering_quality(cluster_sums(u, labels, num_experts), sizes)
        if best is None or quality > best[0]:
            best = (quality, labels)
        if deadline is not None and time.monotonic() > deadline:
            break
    assert best is not None  # at least one start ran
    labels = best[1]
    if polish or (polish is None and width <= LARGE):
        gram = u @ u.T if u.itemsize * width * width <= memory_limit else None
        follow(swap_passes(u, labels, num_experts, gram, deadline))
    return torch.from_numpy(labels)


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
