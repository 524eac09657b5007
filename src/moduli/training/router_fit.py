"""Fitting a router to what experts really carry, after the model itself is trained.

The target of expert i is its ground-truth score, the sum of the positive activations of its
neurons, divided by the largest score of the batch; the loss is the binary cross-entropy of the
router's logits with it. A router is as good as the share of the positive activation that it
captures with 20 % of the experts.

Letters: T tokens, D width, E experts, K experts looked at.
Source: MoEfication (Findings of ACL 2022), section 3.3; thunlp/MoEfication `MLPCenter` in
`moefication/utils.py`. That code keeps the second-best epoch; here the best one is kept, the
start included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moduli.errors import DataError
from moduli.routing import Router

TRAIN_SHARE = 0.9
EXPERT_SHARE = 0.2


@dataclass(frozen=True)
class RouterFit:
    """How a fit went.

    Attributes:
        losses: mean loss of every epoch.
        captured: share of the positive activation captured on held-out tokens, at the start and
            after every epoch.
        best_epoch: whose weights the router has now; 0 is the start.
    """

    losses: tuple[float, ...]
    captured: tuple[float, ...]
    best_epoch: int

    @property
    def start(self) -> float:
        """Share captured before the fit."""
        return self.captured[0]

    @property
    def best(self) -> float:
        """Share captured with the weights that were kept."""
        return self.captured[self.best_epoch]


def train_mlp_router(
    router: Router,
    x: Float[Tensor, "T D"],
    target_scores: Float[Tensor, "T E"],
    *,
    generator: torch.Generator,
    epochs: int = 30,
    batch_size: int = 512,
    lr: float = 0.01,
    progress: Callable[[int, float], None] | None = None,
) -> RouterFit:
    """Fit a router's scores to ground-truth scores with Adam; the best epoch's weights stay.

    The last 10 % of the tokens are held out: the tokens of a text stay together.

    Args:
        router: with parameters of its own, usually an `MLPRouter`.
        x: inputs of the FFN, in the order in which they came.
        target_scores: what the experts carry for each, as `GroundTruthRouter` scores them. To do
            as MoEfication's code, which has models without bias, score unit-length tokens,
            `F.normalize(x, dim=-1)`: then a token's length does not decide its weight.
        generator: of the order of tokens, on the CPU.
        epochs: passes over the other 90 %.
        batch_size: tokens per step; the first steps do harm, so a few thousand tokens want a
            smaller one than MoEfication's 512.
        lr: of Adam.
        progress: called after every epoch with (epochs done, share captured).

    Raises:
        DataError: fewer than 10 tokens, or targets that are negative, not finite, or all 0 among
            the held-out tokens.
    """
    if len(x) < 10:
        raise DataError(f"a router is fitted on 10 tokens or more, not on {len(x)}")
    if not bool((torch.isfinite(target_scores) & (target_scores >= 0)).all()):
        raise DataError("target scores are sums of positive activations: finite and not negative")
    device = next(router.parameters()).device
    split = int(len(x) * TRAIN_SHARE)
    held_x, held_scores = x[split:].to(device), target_scores[split:].to(device)
    k = max(1, int(router.num_experts * EXPERT_SHARE))
    with torch.no_grad():
        captured = [captured_share(router.scores(held_x), held_scores, k)]
    kept, best = _copy(router), 0
    optimizer = torch.optim.Adam(router.parameters(), lr=lr)
    losses: list[float] = []
    for epoch in range(1, epochs + 1):
        total = 0.0
        for chosen in torch.randperm(split, generator=generator).split(batch_size):
            rows = chosen.to(x.device)
            loss = selection_loss(router.scores(x[rows].to(device)), target_scores[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / split)
        with torch.no_grad():
            captured.append(captured_share(router.scores(held_x), held_scores, k))
        if captured[-1] > captured[best]:
            kept, best = _copy(router), epoch
        if progress is not None:
            progress(epoch, captured[-1])
    optimizer.zero_grad()  # no gradient of the fit is left for a training that follows
    router.load_state_dict(kept)
    return RouterFit(tuple(losses), tuple(captured), best)


def selection_loss(
    logits: Float[Tensor, "T E"], target_scores: Float[Tensor, "T E"]
) -> Float[Tensor, ""]:
    """Binary cross-entropy of logits with scores divided by the largest of them."""
    scores = target_scores.to(logits.dtype)
    top = scores.max().clamp_min(torch.finfo(scores.dtype).tiny)  # all 0: nothing fires
    return F.binary_cross_entropy_with_logits(logits, scores / top)


def captured_share(
    predicted: Float[Tensor, "T E"], target_scores: Float[Tensor, "T E"], k: int
) -> float:
    """Mean share of a token's positive activation inside the k experts predicted best.

    Tokens for which nothing fires do not count.

    Raises:
        DataError: nothing fires for any token.
    """
    mass = target_scores.double().gather(1, predicted.topk(k, dim=-1).indices).sum(-1)
    total = target_scores.double().sum(-1)
    fires = total > 0
    if not bool(fires.any()):
        raise DataError("no neuron fires for any held-out token: there is nothing to capture")
    return float((mass[fires] / total[fires]).mean())


def _copy(router: Router) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in router.state_dict().items()}
