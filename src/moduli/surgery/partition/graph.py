"""Experts as parts of the co-activation graph, cut by METIS.

Neurons are vertices. Two of them are joined if their entry of the co-activation matrix is above a
threshold tau, with the entry in units of tau, rounded down, as the weight. METIS cuts the graph
into parts of about equal size such that little weight is cut; then parts that are too large give
randomly chosen neurons to those that are too small.

Letters: F neurons, E experts.
Source: MoEfication (Findings of ACL 2022), section 3.2; thunlp/MoEfication `examples/adj.py` and
`trans_gp.py`; METIS is Karypis and Kumar 1998, through the package `pymetis`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moduli.errors import ConfigError, DataError
from moduli.surgery.partition.sizes import balanced_sizes

Array = np.ndarray[Any, np.dtype[Any]]


def coactivation_labels(
    coactivation: Float[Tensor, "F F"], num_experts: int, *, seed: int = 0
) -> Int[Tensor, " F"]:
    """Expert of every neuron; experts have ⌊F/E⌋ or ⌈F/E⌉ neurons.

    The edges take 8 bytes each and there may be F * F of them; METIS takes several times that.

    Args:
        coactivation: symmetric up to rounding, see `Coactivation`.
        num_experts: E.
        seed: of METIS and of the choice of neurons that change their part.

    Raises:
        ConfigError: more experts than neurons, or `pymetis` is not installed.
        DataError: no two neurons are ever active together, or entries are not finite.
    """
    width = coactivation.shape[0]
    balanced_sizes(width, num_experts)  # raises
    starts, columns, weights = graph_edges(coactivation)
    if num_experts == 1:  # METIS cuts into two or more
        return torch.zeros(width, dtype=torch.long)
    try:
        import pymetis
    except ImportError as error:
        raise ConfigError(
            "cutting the co-activation graph needs METIS: pip install 'moduli[graph]'. "
            "balanced_clusters, which splits by the keys, needs nothing"
        ) from error
    kind = pymetis.zero_copy_dtype()
    # METIS adds weights up in its own integers; beyond them it would cut at random.
    total, most = int(weights.sum()), int(np.iinfo(kind).max)
    if total > most:
        weights = np.maximum(weights // (total // most + 1), 1)
    _, parts = pymetis.part_graph(
        num_experts,
        pymetis.CSRAdjacency(starts.astype(kind), columns.astype(kind)),
        eweights=weights.astype(kind),
        options=pymetis.Options(seed=seed),
        recursive=False,  # k-way, as the gpmetis program does
    )
    return rebalance(torch.tensor(list(parts), dtype=torch.long), num_experts, seed=seed)


def threshold(coactivation: Float[Tensor, "F F"]) -> float:
    """Tau: the first positive one of the 10th, 20th, ..., 100th percentile of all entries.

    MoEfication takes the first that is not 0; with raw activations that may be a negative one,
    and would turn the graph around.

    Raises:
        DataError: no entry is positive, or some are not finite.
    """
    percentiles = np.percentile(coactivation.cpu().numpy(), np.arange(10, 101, 10))
    if not np.isfinite(percentiles).all():
        raise DataError("the co-activations contain NaN or infinity")
    positive = percentiles[percentiles > 0]
    if len(positive) == 0:
        raise DataError("no two neurons are ever active together: there is no graph to cut")
    return float(positive[0])


def graph_edges(coactivation: Float[Tensor, "F F"]) -> tuple[Array, Array, Array]:
    """The graph in compressed rows: (starts [F + 1], neighbours, weights), every edge twice.

    Neurons are joined where A / (0.99 tau) >= 1, with that rounded down as the weight.

    Raises:
        DataError: there is no edge, or entries are not finite.
    """
    limit = 0.99 * threshold(coactivation)
    a = coactivation.cpu().numpy()
    columns: list[Array] = []
    weights: list[Array] = []
    for i, row in enumerate(a):
        # The larger of (i, j) and (j, i): they may differ in the last bit, and METIS relies on
        # every edge being there in both directions with the same weight.
        weight = np.floor(np.maximum(row, a[:, i]) / limit).astype(np.int64)
        weight[i] = 0
        joined = np.flatnonzero(weight > 0)
        columns.append(joined.astype(np.int32))
        weights.append(np.minimum(weight[joined], np.iinfo(np.int32).max).astype(np.int32))
    starts = np.concatenate([[0], np.cumsum([len(c) for c in columns])])
    if starts[-1] == 0:
        raise DataError("no two neurons are ever active together: there is no graph to cut")
    return starts, np.concatenate(columns), np.concatenate(weights)


def rebalance(labels: Int[Tensor, " F"], num_experts: int, *, seed: int = 0) -> Int[Tensor, " F"]:
    """Labels with sizes ⌊F/E⌋ and ⌈F/E⌉, by moving as few neurons as possible.

    Parts that are too large give up randomly chosen neurons; those that are too small receive
    them, in random order.

    Args:
        labels: part of every neuron, of any sizes, empty ones included.
        num_experts: E.
        seed: of the choice.

    Raises:
        ConfigError: more experts than neurons, or a label that is none of 0 to E - 1.
    """
    if not bool(((labels >= 0) & (labels < num_experts)).all()):
        raise ConfigError(f"labels must be 0 to {num_experts - 1}")
    generator = np.random.default_rng(seed)
    found = labels.cpu().numpy().astype(np.int64)
    counts = np.bincount(found, minlength=num_experts)
    # The larger sizes go to the parts that are large already.
    wanted = np.empty(num_experts, np.int64)
    wanted[np.argsort(-counts, kind="stable")] = balanced_sizes(len(found), num_experts)
    surplus = [
        generator.permutation(np.flatnonzero(found == part))[wanted[part] :]
        for part in range(num_experts)
    ]
    moved = generator.permutation(np.concatenate(surplus))
    found[moved] = np.repeat(np.arange(num_experts), np.maximum(wanted - counts, 0))
    return torch.from_numpy(found)
