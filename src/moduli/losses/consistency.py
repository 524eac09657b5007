"""The consistency loss: several passes of a model over one batch are to be right, and to agree.

    l_i = log_softmax(z_i) of pass i, p_i = exp(l_i), t = the (smoothed) target

    CE_i  = sum over M of  -sum_v t_v l_i[v]
    CR    = mean over pairs i < j of  sum over M of  1/2 sum_v (p_i[v] - p_j[v]) (l_i[v] - l_j[v])
    total = sum_i CE_i + alpha CR

CR is half of KL(p_i || p_j) + KL(p_j || p_i). It knows nothing of labels or smoothing, and its
gradient flows into all passes. Two passes give the loss of THOR and, up to a factor, of R-Drop.

    dCE_i / dz_i = p_i - t
    dCR / dz_i   = mean over pairs of  1/2 (p_i (a - KL(p_i || p_j)) + p_i - p_j),  a = l_i - l_j

Everything is made of log-softmax, so that it is finite for all finite logits. Positions are taken
in pieces, forward and backward, so that never more than a piece of a float32 distribution is in
memory. Letters: K passes, M scored positions, V classes.

Source: THOR (arXiv 2110.04260), microsoft/Stochastic-Mixture-of-Experts, criterion
`translation_thor`, which takes the logarithm of a softmax and is NaN where that underflows; label
smoothing as in facebookresearch/fairseq; R-Drop (arXiv 2106.14448).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moduli.errors import ConfigError, DataError

Reduction = Literal["sum", "token_mean"]
Smoothing = Literal["fairseq", "torch"]
"""Where the smoothed mass goes: "fairseq" gives the target 1 - s and every other class
s / (V - 1); "torch" gives every class s / V and the target the rest."""

PIECE = 1 << 20
"""Numbers of a distribution that are in memory at once, for each pass."""


@dataclass(frozen=True)
class ConsistencyLoss:
    """A consistency loss and what it is made of, all reduced alike.

    Attributes:
        total: sum of `errors` + alpha * `disagreement`; the only one to call `backward` on.
        errors: cross-entropy (nats) or squared error of each pass, detached.
        disagreement: CR (nats), or squared differences of predictions, detached.
        count: positions with a label, each counted once.
    """

    total: Float[Tensor, ""]
    errors: Float[Tensor, " K"]
    disagreement: Float[Tensor, ""]
    count: int


def consistency_loss(
    logits: Sequence[Float[Tensor, "*lead V"]],
    labels: Int[Tensor, "*lead"],
    alpha: float,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "sum",
    smoothing_style: Smoothing = "fairseq",
) -> ConsistencyLoss:
    """Cross-entropy of every pass, and alpha times how much the passes disagree.

    Args:
        logits: of each pass, of any float type; one pass gives plain cross-entropy.
        labels: the class at every position, or `ignore_index`.
        alpha: weight of the disagreement.
        label_smoothing: s, in [0, 1).
        ignore_index: label of positions that do not count.
        reduction: "sum" over positions, or that divided by their number ("token_mean"; each is
            counted once, however many passes there are).
        smoothing_style: see `Smoothing`. They agree if s of "torch" is V / (V - 1) times that of
            "fairseq".

    Returns:
        See `ConsistencyLoss`; in float32, or float64 for logits in that.

    Raises:
        ConfigError: no pass, passes of different shapes, alpha < 0, s outside [0, 1).
        DataError: a label that is no class.
    """
    _check(logits, labels, alpha, label_smoothing)
    target = _target(logits[0].shape[-1], label_smoothing, smoothing_style)
    rows = _scored(labels, logits[0].shape[-1], ignore_index).to(logits[0].device)
    flat = [one.reshape(-1, one.shape[-1]) for one in logits]
    known = labels.to(logits[0].device).reshape(-1)
    errors, disagreement = _Pieces.apply(known, rows, target, *flat)  # type: ignore[no-untyped-call]
    return _reduced(errors, disagreement, alpha, len(rows), reduction)


def consistency_loss_by_autograd(
    logits: Sequence[Float[Tensor, "*lead V"]],
    labels: Int[Tensor, "*lead"],
    alpha: float,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "sum",
    smoothing_style: Smoothing = "fairseq",
) -> ConsistencyLoss:
    """What `consistency_loss` computes, written down plainly: its reference in tests."""
    _check(logits, labels, alpha, label_smoothing)
    on_target, on_all = _target(logits[0].shape[-1], label_smoothing, smoothing_style)
    kept = labels != ignore_index
    logs = [one[kept].to(_precision(one)).log_softmax(-1) for one in logits]
    truth = labels[kept][:, None]
    errors = [-on_target * log.gather(1, truth).sum() - on_all * log.sum() for log in logs]
    pairs = [
        ((one.exp() - other.exp()) * (one - other)).sum() / 2
        for one, other in itertools.combinations(logs, 2)
    ]
    disagreement = torch.stack(pairs).mean() if pairs else torch.zeros_like(errors[0])
    return _reduced(torch.stack(errors), disagreement, alpha, int(kept.sum()), reduction)


def consistent_regression(
    predictions: Sequence[Float[Tensor, "*lead"]],
    targets: Float[Tensor, "*lead"],
    alpha: float,
    *,
    reduction: Reduction = "sum",
) -> ConsistencyLoss:
    """Squared error of every pass, and alpha times the squared differences between passes.

    Args:
        predictions: of each pass.
        targets: what they are to be.
        alpha: weight of the mean over pairs of passes of (y_i - y_j)^2.
        reduction: "sum" over numbers, or that divided by their number ("token_mean").

    Raises:
        ConfigError: no pass, passes of different shapes, alpha < 0.
    """
    _check_passes(predictions, alpha)
    if predictions[0].shape != targets.shape:
        raise ConfigError(
            f"predictions have the shape {tuple(predictions[0].shape)} and targets "
            f"{tuple(targets.shape)}; they have to be the same"
        )
    made = [one.to(_precision(one)) for one in predictions]
    errors = torch.stack([(one - targets).square().sum() for one in made])
    pairs = [(one - other).square().sum() for one, other in itertools.combinations(made, 2)]
    disagreement = torch.stack(pairs).mean() if pairs else torch.zeros_like(errors[0])
    return _reduced(errors, disagreement, alpha, targets.numel(), reduction)


def _reduced(
    errors: Tensor, disagreement: Tensor, alpha: float, count: int, reduction: Reduction
) -> ConsistencyLoss:
    if reduction == "token_mean":
        errors, disagreement = errors / max(count, 1), disagreement / max(count, 1)
    total = errors.sum()
    if alpha:  # 0 * inf would be NaN, and its gradient work for nothing
        total = total + alpha * disagreement
    return ConsistencyLoss(total, errors.detach(), disagreement.detach(), count)


class _Pieces(torch.autograd.Function):
    """(cross-entropy of each pass [K], CR) over the rows with a label, gradients in closed form."""

    @staticmethod
    def forward(
        ctx: Any, labels: Tensor, rows: Tensor, target: tuple[float, float], *logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # None for what has no part in the loss
        on_target, on_all = target
        zero = torch.zeros((), dtype=_precision(logits[0]), device=logits[0].device)
        errors, disagreement = [zero] * len(logits), zero
        for piece in _pieces(rows, logits[0].shape[-1]):
            logs, truth = _logs(logits, piece), labels[piece][:, None]
            for i, log in enumerate(logs):
                nll = -log.gather(1, truth).sum()
                errors[i] = errors[i] + on_target * nll
                if on_all:
                    errors[i] = errors[i] - on_all * log.sum()
            for one, other in itertools.combinations(logs, 2):
                difference = (one.exp() - other.exp()).mul_(one - other)
                disagreement = disagreement + difference.sum() / (2 * _pairs(len(logits)))
        ctx.save_for_backward(labels, rows, *logits)
        ctx.target = target
        return torch.stack(errors), disagreement

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_errors: Tensor | None, d_disagreement: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        labels, rows, *logits = ctx.saved_tensors
        on_target, on_all = ctx.target
        share = None if d_disagreement is None else d_disagreement / (2 * _pairs(len(logits)))
        grads = [torch.zeros_like(one) for one in logits]
        for piece in _pieces(rows, logits[0].shape[-1]):
            logs, truth = _logs(logits, piece), labels[piece][:, None]
            for i, log in enumerate(logs):
                p = log.exp()
                grad = p - on_all
                grad.scatter_add_(1, truth, grad.new_full(truth.shape, -on_target))
                grad.mul_(0 if d_errors is None else d_errors[i])
                for j, other in enumerate(logs):
                    if i != j and share is not None:
                        a = log - other
                        kl = (p * a).sum(-1, keepdim=True)
                        grad += share * (p * (a - kl) + p - other.exp())
                grads[i][piece] = grad.to(grads[i].dtype)
        return (None, None, None, *grads)


def _logs(logits: Sequence[Tensor], piece: Tensor) -> list[Tensor]:
    return [one[piece].to(_precision(one)).log_softmax(-1) for one in logits]


def _pieces(rows: Tensor, classes: int) -> Iterator[Tensor]:
    """The rows in pieces whose distributions are small."""
    yield from rows.split(max(1, PIECE // classes))


def _pairs(passes: int) -> int:
    return max(1, passes * (passes - 1) // 2)


def _precision(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _target(classes: int, smoothing: float, style: Smoothing) -> tuple[float, float]:
    """What is added to the target for the true class, and for every class."""
    if not smoothing:
        return 1.0, 0.0
    if style == "torch":
        return 1 - smoothing, smoothing / classes
    if style != "fairseq":
        raise ConfigError(f"smoothing_style is {style!r}; it may be 'fairseq' or 'torch'")
    if classes < 2:
        raise ConfigError("label smoothing needs two classes or more; set label_smoothing=0")
    each = smoothing / (classes - 1)
    return 1 - smoothing - each, each


def _scored(labels: Tensor, classes: int, ignore_index: int) -> Int[Tensor, " M"]:
    """Positions of the flattened labels that count."""
    flat = labels.reshape(-1)
    rows = (flat != ignore_index).nonzero().flatten()
    known = flat[rows]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < classes:
        bad = known[(known < 0) | (known >= classes)][0]
        raise DataError(
            f"a label is {int(bad)}, but there are {classes} classes; labels are 0 to "
            f"{classes - 1}, or {ignore_index} where a position does not count"
        )
    return rows


def _check(logits: Sequence[Tensor], labels: Tensor, alpha: float, smoothing: float) -> None:
    _check_passes(logits, alpha)
    if not 0 <= smoothing < 1:
        raise ConfigError(f"label_smoothing is {smoothing}; it is a share, in [0, 1)")
    if logits[0].shape[:-1] != labels.shape:
        raise ConfigError(
            f"logits have the shape {tuple(logits[0].shape)} and labels {tuple(labels.shape)}; "
            "labels are to have the shape of the logits without the last dimension"
        )


def _check_passes(passes: Sequence[Tensor], alpha: float) -> None:
    if not passes:
        raise ConfigError("there is no pass; give the outputs of one pass or more, as a list")
    shapes = {tuple(one.shape) for one in passes}
    if len(shapes) > 1:
        raise ConfigError(
            f"the passes have different shapes: {sorted(shapes)}; they are to be over one batch"
        )
    if not alpha >= 0:
        raise ConfigError(
            f"alpha is {alpha}; it is to be 0 or more, since a negative one would reward passes "
            "that disagree"
        )
