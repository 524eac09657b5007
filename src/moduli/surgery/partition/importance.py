"""Experts from the importance of neurons: the gradient splits of LLaMA-MoE.

A pretraining sample is clustered into one group of data per expert, and neuron j has for group i
the importance v_i[j] = mean over tokens of |a_j dL/da_j|, a the neurons' activations (what the
last projection of the FFN is given). Experts are then made of the neurons that matter most to
their group: as a partition (`greedy_labels`), as overlapping sets (`inner_sharing_members`), or
with a pool of neurons that all groups want (`inter_sharing`).

Letters: D width, F neurons, E experts, G groups of data, N samples, e neurons of one expert ("_"
in the annotations).
Source: LLaMA-MoE (EMNLP 2024), section 3.1; pjlab-sys4nlp/llama-moe `expert_split.py` and
`expert_split_residual.py` in `smoe/utils/expert_construction`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moduli.errors import ConfigError, DataError
from moduli.surgery.evaluating import evaluating
from moduli.surgery.locate import FFN
from moduli.surgery.partition.observe import real_tokens, select_rows
from moduli.surgery.partition.sizes import balanced_sizes


@dataclass(frozen=True)
class SharedSplit:
    """Experts of which some serve every token.

    Attributes:
        residual: neurons of each expert that is always on.
        routed: neurons of each expert that is chosen by a router.
    """

    residual: list[Int[Tensor, " _"]]
    routed: list[Int[Tensor, " _"]]


def greedy_labels(
    scores: Float[Tensor, "E F"], sizes: Sequence[int] | None = None, *, largest: bool = True
) -> Int[Tensor, " F"]:
    """Expert of every neuron: the neuron-independent split.

    As long as neurons are left, every expert that is not full proposes its best one among them;
    the proposal with the highest score wins, of equal ones that of the larger expert index.

    Args:
        scores: importance of every neuron for every expert.
        sizes: neurons per expert; None: as equal as possible.
        largest: False takes the smallest scores first.

    Raises:
        ConfigError: the sizes are not those of a partition, or a score is not finite.
    """
    num_experts, width = scores.shape
    sizes = balanced_sizes(width, num_experts) if sizes is None else tuple(sizes)
    if len(sizes) != num_experts or sum(sizes) != width or min(sizes) < 1:
        raise ConfigError(
            f"sizes {sizes} do not divide {width} neurons among {num_experts} experts; for equal "
            "ones leave sizes out"
        )
    labels = torch.empty(width, dtype=torch.long)
    everyone = torch.ones(width, dtype=torch.bool)
    for expert, members in enumerate(_greedy(_better(scores, largest), sizes, everyone)):
        labels[members] = expert
    return labels


def inner_sharing_members(
    scores: Float[Tensor, "E F"], size: int, *, largest: bool = True
) -> list[Int[Tensor, " _"]]:
    """Every expert's best neurons, best first. Experts may overlap and may leave neurons out.

    Args:
        scores: importance of every neuron for every expert.
        size: e, the same for all.
        largest: False takes the smallest scores.

    Raises:
        ConfigError: an expert cannot have that many neurons, or a score is not finite.
    """
    width = scores.shape[1]
    if not 1 <= size <= width:
        raise ConfigError(f"size is {size}, but the FFN has {width} neurons; choose 1 to {width}")
    return list(_order(_better(scores, largest))[:, :size])


def inter_sharing(
    scores: Float[Tensor, "E F"],
    size: int,
    num_residual: int,
    *,
    share: bool = False,
    largest: bool = True,
) -> SharedSplit:
    """Neurons that many experts want go to residual experts, the others are routed.

    While the residual pool is not full: of the best `size` remaining neurons of every expert,
    those that are in the largest number of lists move to the pool, in the order of their index.

    Args:
        scores: importance of every neuron for every routed expert.
        size: e, the same for residual and routed experts.
        num_residual: experts that are always on.
        share: routed experts take the best of what is left, and may overlap; otherwise they
            divide it like `greedy_labels`, and all neurons have to be used.
        largest: False takes the smallest scores.

    Raises:
        ConfigError: the neurons do not suffice, or are not all used where they have to be; or a
            score is not finite.
    """
    num_experts, width = scores.shape
    pool_size = num_residual * size
    if size < 1 or num_residual < 0 or pool_size + size > width:
        raise ConfigError(
            f"{num_residual} residual experts and a routed one of {size} neurons do not fit into "
            f"{width} neurons; choose a size up to {width // (max(num_residual, 0) + 1)}"
        )
    if not share and pool_size + num_experts * size != width:
        raise ConfigError(
            f"{num_residual} residual and {num_experts} routed experts of {size} neurons are "
            f"{pool_size + num_experts * size} neurons, not {width}; "
            f"share=True lets routed experts overlap"
        )
    scores = _better(scores, largest)
    order = _order(scores)
    free = torch.ones(width, dtype=torch.bool)
    pool: list[Tensor] = []
    missing = pool_size
    while missing:
        wanted = torch.bincount(order[:, :size].flatten(), minlength=width)
        moved = (wanted == wanted.max()).nonzero().flatten()[:missing]
        pool.append(moved)
        missing -= len(moved)
        free[moved] = False
        order = order[free[order]].view(num_experts, -1)
    residual = list(torch.cat(pool).split(size)) if pool else []
    if share:
        return SharedSplit(residual, list(order[:, :size]))
    return SharedSplit(residual, _greedy(scores, (size,) * num_experts, free))


def _better(scores: Tensor, largest: bool) -> Tensor:
    """The scores such that higher is better."""
    scores = scores.detach().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise ConfigError("the importance of neurons contains NaN or infinity")
    return scores if largest else -scores


def _order(scores: Tensor) -> Tensor:
    """Neurons of every expert [E, F], best first; of equal ones the smaller index."""
    return scores.argsort(dim=1, descending=True, stable=True)


def _greedy(scores: Tensor, sizes: Sequence[int], free: Tensor) -> list[Tensor]:
    """Members of every expert in the order in which it won them; `free` holds for enough."""
    order = _order(scores)
    ranked = scores.gather(1, order).tolist()
    order_list: list[list[int]] = order.tolist()
    left: list[bool] = free.tolist()
    place = [0] * len(sizes)
    members: list[list[int]] = [[] for _ in sizes]
    # One entry per expert that is not full: its best proposal when it was last looked at.
    heap = [(-ranked[i][0], -i) for i in range(len(sizes))]
    heapq.heapify(heap)
    while heap:
        expert = -heap[0][1]
        if left[order_list[expert][place[expert]]]:
            neuron = order_list[expert][place[expert]]
            left[neuron] = False
            members[expert].append(neuron)
            if len(members[expert]) == sizes[expert]:
                heapq.heappop(heap)
                continue
        place[expert] += 1
        heapq.heapreplace(heap, (-ranked[expert][place[expert]], -expert))
    return [torch.tensor(m, dtype=torch.long) for m in members]


def neuron_importance(
    model: nn.Module,
    ffns: Sequence[FFN],
    groups: Sequence[Iterable[Mapping[str, Any]]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Float[Tensor, "G F"]]:
    """Importance of the neurons of FFNs for every group of data, by the name of the FFN.

    v_i[j] = mean over the real tokens of group i of |a_j dL/da_j|, L the loss that the model
    returns. That is usually a mean over the batch, so batches should be of one size: the tokens
    of a smaller one would weigh more. The model runs in evaluation mode; its parameters may be
    frozen, and their gradients are left alone.

    Args:
        model: returns a `loss` for a batch with labels.
        ffns: of the model, as `find_ffns` gives them; plain or gated.
        groups: batches (keyword arguments of the model) of every group of data.
        progress: called after every batch with (groups done, batches of this one done).

    Raises:
        DataError: the model returns no loss for a batch, or a group has no tokens.
    """
    total = {f.name: torch.zeros(len(groups), f.width, dtype=torch.float64) for f in ffns}
    inputs: dict[FFN, Tensor] = {}
    handles = [f.last.register_forward_pre_hook(_keep_input(inputs, f)) for f in ffns]
    try:
        with evaluating(model), torch.enable_grad():
            for index, group in enumerate(groups):
                tokens = dict.fromkeys(total, 0)
                for done, batch in enumerate(group, start=1):
                    inputs.clear()
                    loss = getattr(model(**batch), "loss", None)
                    if loss is None:
                        raise DataError("the model returned no loss; give batches with `labels`")
                    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
                    for (ffn, a), grad in zip(inputs.items(), grads, strict=True):
                        keep = real_tokens(model, ffn, batch, a.shape[:-1])
                        rows = select_rows(a.detach(), keep)
                        tokens[ffn.name] += len(rows)
                        if grad is not None:  # None: the loss does not depend on this layer
                            change = (rows * select_rows(grad, keep)).abs()
                            total[ffn.name][index] += change.sum(0, dtype=torch.float64).cpu()
                    if progress is not None:
                        progress(index, done)
                for name, count in tokens.items():
                    if count == 0:
                        raise DataError(f"group {index} of the data has no tokens for {name}")
                    total[name][index] /= count
    finally:
        for handle in handles:
            handle.remove()
    return {name: v.float() for name, v in total.items()}


def _keep_input(inputs: dict[FFN, Tensor], ffn: FFN) -> Callable[..., tuple[Tensor, ...]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a = args[0]
        if not a.requires_grad:  # everything before is frozen: the graph may begin here
            a = a.detach().requires_grad_()
        inputs[ffn] = a
        return (a, *args[1:])

    return hook


def kmeans_groups(
    embeddings: Float[Tensor, "N D"], num_groups: int, seed: int
) -> Int[Tensor, " N"]:
    """Group of every sample by k-means on its embedding."""
    from sklearn.cluster import KMeans

    found = KMeans(num_groups, n_init=10, random_state=seed).fit_predict(embeddings.cpu().numpy())
    return torch.from_numpy(found).long()
