"""MoEfication's routers: the sum of what fires, nearest centres, and a small learned network.

MoEfication splits the FFN of a ReLU model and keeps, for each token, the experts that carry most
of its positive activation. `GroundTruthRouter` knows it, at the price of computing every neuron;
the other two guess it from the token. With x^ = x / |x| and c_i the mean of the keys of expert i,
each scaled to unit length first,

    ground truth   s_i = sum over neurons j of expert i of relu(a_j)
    similarity     s_i = -|x^ - c_i|
    MLP            s   = B tanh(A x^),   A from the rows c_i, B from the identity.

Letters: T tokens, D width, F neurons, E experts.
Source: MoEfication (Findings of ACL 2022), section 3.3; thunlp/MoEfication `moefication/utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moduli.routing.avgk import key_means
from moduli.routing.derived import DerivedRouter
from moduli.routing.router import Router, full_precision
from moduli.routing.rule import Rule


def key_centers(keys: Float[Tensor, "F D"], sizes: Sequence[int]) -> Float[Tensor, "E D"]:
    """Mean of the unit-length keys of every expert, in at least float32; not of unit length."""
    keys = keys.float() if keys.dtype.itemsize < 4 else keys
    return key_means(F.normalize(keys, dim=-1), sizes)


class GroundTruthRouter(Router):
    """Scores an expert by the positive part of its neurons' activations.

    No choice of k experts carries more of it. For ReLU that is all an expert does but for the
    direction of its values; for other activations their positive part is summed.

    Args:
        keys: returns the current keys [F, D], one expert after the other.
        sizes: neurons per expert.
        rule: see `Rule`.
        bias: returns the current bias of the keys [F], or None where they have none.
        activation: of the FFN.
    """

    learned = False
    by_neurons = True

    def __init__(
        self,
        keys: Callable[[], Tensor],
        sizes: Sequence[int],
        rule: Rule,
        *,
        bias: Callable[[], Tensor | None] = lambda: None,
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> None:
        super().__init__(len(sizes), rule)
        self.keys = keys
        self.bias = bias
        self.sizes = tuple(sizes)
        # In a tuple, so that an activation that is a module does not become a part of this one.
        self._activation = (activation,)

    def scores(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        keys, bias = self.keys(), self.bias()
        with full_precision(x.device):
            z = F.linear(x.to(keys.dtype), keys, bias)
        return self.from_preactivations(z, bias)

    def from_preactivations(
        self, z: Float[Tensor, "T F"], bias: Float[Tensor, " F"] | None = None
    ) -> Float[Tensor, "T E"]:
        """The same scores from the pre-activations of all neurons.

        Args:
            z: with their bias, as the first projection returns them.
            bias: not used, since what fires is decided with it; there for other routers.
        """
        mass = self._activation[0](z).clamp_min(0)
        groups = mass.split(list(self.sizes), dim=-1)
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        return torch.stack([group.sum(dim=-1, dtype=dtype) for group in groups], dim=-1)


class SimilarityRouter(DerivedRouter):
    """Scores an expert by minus the distance of the unit-length token to its centre.

    Since |x^ - c|^2 = 1 - 2 x^.c + |c|^2, that is the order of x^.c - |c|^2 / 2.

    Args:
        keys: returns the current keys [F, D], one expert after the other.
        sizes: neurons per expert.
        rule: see `Rule`.
    """

    def __init__(self, keys: Callable[[], Tensor], sizes: Sequence[int], rule: Rule) -> None:
        super().__init__(len(sizes), rule, keys)
        self.sizes = tuple(sizes)

    def scores(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        centers = self._derived(self._centers, self.keys(), self._reusable(x))
        with full_precision(x.device):
            x = F.normalize(x.to(centers.dtype), dim=-1)
            return -torch.cdist(x, centers)

    def _centers(self, keys: Tensor) -> Tensor:
        return key_centers(keys, self.sizes)


class MLPRouter(Router):
    """Scores experts by a network of one hidden layer on the unit-length token.

    It is trained to rank experts like the ground truth, see
    `moduli.training.router_fit.train_mlp_router`.

    Args:
        hidden: D.
        num_experts: E.
        rule: see `Rule`.
        init: starting rows of A [E, D], in MoEfication the centres of the experts
            (`key_centers`); None keeps torch's default.
    """

    def __init__(
        self, hidden: int, num_experts: int, rule: Rule, init: Float[Tensor, "E D"] | None = None
    ) -> None:
        super().__init__(num_experts, rule)
        self.first = nn.Linear(hidden, num_experts, bias=False)
        self.second = nn.Linear(num_experts, num_experts, bias=False)
        nn.init.eye_(self.second.weight)
        if init is not None:
            with torch.no_grad():
                self.first.weight.copy_(init)

    def scores(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        with full_precision(x.device):
            x = F.normalize(x.to(self.first.weight.dtype), dim=-1)
            logits: Tensor = self.second(self.first(x).tanh())
            return logits
