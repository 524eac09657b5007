"""How much a partition explains of the spread of keys.

Keys are scaled to unit length (as EMoE and MoEfication cluster them). The total sum of squares
splits into J within experts and the explained part between them. J itself is flat (a random
partition is only a few per cent worse), so quality is stated as explained sum of squares.
Letters: D width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SplitQuality:
    """Attributes: total sum of squares about the mean, J within experts, and their difference."""

    total: float
    objective: float

    @property
    def explained(self) -> float:
        return self.total - self.objective

    @property
    def share(self) -> float:
        """Explained part of the total, 0 to 1."""
        return self.explained / self.total if self.total > 0 else 0.0

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "explained": self.explained, "share": self.share}


def unit_keys(keys: Float[Tensor, "F D"]) -> Float[Tensor, "F D"]:
    """Rows divided by their length in float32; rows of length 0 stay 0."""
    return F.normalize(keys.detach().float().cpu(), dim=-1, eps=1e-12)


def explained_variance(keys: Float[Tensor, "F D"], labels: Int[Tensor, " F"]) -> SplitQuality:
    """Quality of a partition of keys that are already scaled; float64 inside."""
    u = keys.double()
    num_experts = int(labels.max()) + 1
    sums = u.new_zeros(num_experts, u.shape[1]).index_add_(0, labels.long(), u)
    sizes = torch.bincount(labels.long(), minlength=num_experts).clamp_min(1)
    squares = float(u.square().sum())
    within = squares - float((sums.square().sum(-1) / sizes).sum())
    total = squares - float(u.sum(0).square().sum()) / u.shape[0]
    return SplitQuality(total=total, objective=within)


def split_quality(keys: Float[Tensor, "F D"], labels: Int[Tensor, " F"]) -> SplitQuality:
    """Quality of a partition of raw keys."""
    return explained_variance(unit_keys(keys), labels)
