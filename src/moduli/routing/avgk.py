"""The avg-k gate of EMoE: the score of an expert is the dot product with its mean key.

The gate has no parameters. It is computed from the keys as they are now (`live`), or kept as a
copy that is re-tied to the keys after every training micro-batch, as the reference does.
Letters: T tokens, D width, F neurons, E experts.
Source: EMoE (NAACL 2024), sections on the avg-k gate; qiuzh20/EMoE `update_one_score_gate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moduli.routing.derived import DerivedRouter
from moduli.routing.router import full_precision
from moduli.routing.rule import Rule


def key_means(keys: Float[Tensor, "F D"], sizes: Sequence[int]) -> Float[Tensor, "E D"]:
    """Mean key of every expert, experts being consecutive groups of rows of the given sizes."""
    if len(set(sizes)) == 1:
        return keys.reshape(len(sizes), sizes[0], -1).mean(dim=1)
    return torch.stack([group.mean(dim=0) for group in keys.split(list(sizes))])


def gate_from_keys(
    keys: Float[Tensor, "F D"], sizes: Sequence[int], *, normalize: bool = False
) -> Float[Tensor, "E D"]:
    """The avg-k gate: mean keys in float32, rows of unit length if `normalize`."""
    gate = key_means(keys.float() if keys.dtype.itemsize < 4 else keys, sizes)
    return F.normalize(gate, dim=-1) if normalize else gate


def retie(
    gate: Float[Tensor, "E D"],
    keys: Float[Tensor, "F D"],
    sizes: Sequence[int],
    *,
    momentum: float = 0.0,
    normalize: bool = False,
    values: Float[Tensor, "F D"] | None = None,
) -> Float[Tensor, "E D"]:
    """The gate after one update, m * gate + (1 - m) * mean key.

    Args:
        gate: the gate before.
        keys: current keys, one expert after the other.
        sizes: neurons per expert.
        momentum: m; 0 replaces the gate.
        normalize: scale the rows of the mean to unit length before mixing.
        values: if given, keys are averaged with the norms of these as weights.
    """
    if values is None:
        means = gate_from_keys(keys, sizes, normalize=normalize)
    else:
        norms = values.norm(dim=-1)
        share = torch.cat([group / group.sum() for group in norms.split(list(sizes))])
        weighted = (keys * share[:, None]).split(list(sizes))
        means = torch.stack([group.sum(dim=0) for group in weighted])
        means = F.normalize(means, dim=-1) if normalize else means
    return momentum * gate + (1 - momentum) * means


class AvgKRouter(DerivedRouter):
    """Scores x @ mean_key of every expert, in float32.

    Args:
        keys: returns the current keys [F, D], one expert after the other.
        sizes: neurons per expert.
        rule: see `Rule`.
        normalize: cosine instead of dot product (input and gate rows of unit length).
        momentum: None computes the gate from the current keys (once for as long as they do not
            change, in evaluation: see `moduli.routing.derived`); a number keeps a
            copy, not normalised at first, that `update` moves towards them.
    """

    gate: Tensor | None

    def __init__(
        self,
        keys: Callable[[], Tensor],
        sizes: Sequence[int],
        rule: Rule,
        *,
        normalize: bool = False,
        momentum: float | None = None,
    ) -> None:
        super().__init__(len(sizes), rule, keys)
        self.sizes = tuple(sizes)
        self.normalize = normalize
        self.momentum = momentum
        self.stale = False  # a training micro-batch has run since the last update
        copy = None if momentum is None else gate_from_keys(keys().detach(), self.sizes).clone()
        self.register_buffer("gate", copy)

    @property
    def live(self) -> bool:
        """Whether the gate follows the keys at every call."""
        return self.momentum is None

    @property
    def by_neurons(self) -> bool:  # type: ignore[override]
        """A live mean key scores a token by the mean of its neurons' pre-activations."""
        return self.live and not self.normalize

    def current_gate(self) -> Float[Tensor, "E D"]:
        """The gate rows that the next token is scored with."""
        return self._gate(self._reusable())

    def _gate(self, reuse: bool) -> Tensor:
        if self.gate is not None:
            return self.gate
        return self._derived(self._from_keys, self.keys(), reuse, self.normalize)

    def _from_keys(self, keys: Tensor) -> Tensor:
        return gate_from_keys(keys, self.sizes, normalize=self.normalize)

    def scores(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        gate = self._gate(self._reusable(x))
        with full_precision(x.device):
            x = x.to(gate.dtype)
            x = F.normalize(x, dim=-1) if self.normalize else x
            return F.linear(x, gate)

    def from_preactivations(
        self, z: Float[Tensor, "T F"], bias: Float[Tensor, " F"] | None
    ) -> Float[Tensor, "T E"]:
        """The same scores from the pre-activations of all neurons: mean of z minus mean of bias.

        It follows whatever the projection really computes (LoRA, quantised weights).
        """
        means = group_means(z, self.sizes)
        if bias is None:
            return means
        return means - group_means(bias[None], self.sizes)

    @torch.no_grad()
    def update(self) -> None:
        """Move a kept gate towards the current keys, if a training micro-batch ran since."""
        if self.gate is not None and self.momentum is not None and self.stale:
            keys = self.keys().detach()
            gate = retie(
                self.gate, keys, self.sizes, momentum=self.momentum, normalize=self.normalize
            )
            self.gate = gate  # not in place: an earlier forward may still need the old one
        self.stale = False


def group_means(z: Float[Tensor, "T F"], sizes: Sequence[int]) -> Float[Tensor, "T E"]:
    """Mean over each of the consecutive groups of columns, accumulated in at least float32."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    if len(set(sizes)) == 1:
        grouped = z.reshape(z.shape[0], len(sizes), sizes[0])
        return grouped.mean(dim=-1, dtype=dtype)
    return torch.stack([g.mean(dim=-1, dtype=dtype) for g in z.split(list(sizes), dim=-1)], dim=-1)
