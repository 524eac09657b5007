"""FFN experts as tensors: what a kernel reads, and how they are cut out of a dense FFN.

The key of a neuron is its row of the first matrix, its value the matching column of the second
(Geva et al. 2021). A gated FFN (SwiGLU) has a second key per neuron, the row of the up projection;
the first key is then that of the gate projection, whose pre-activation passes the activation.

Letters: D width, F neurons of the dense FFN, E experts, e neurons of one expert ("_" in the
annotations, since experts of one layer may differ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ExpertFFN:
    """The experts of one layer, each a list entry; sizes may differ (ragged).

    Attributes:
        keys: E tensors [e, D].
        values: E tensors [e, D]; row j is added to the output as often as neuron j fires.
        key_bias: E tensors [e], or None.
        up_keys: E tensors [e, D] for gated FFNs, or None.
        up_bias: E tensors [e], or None.
        out_bias: one output bias per expert [E, D], weighted like the expert itself, or None.
    """

    keys: Sequence[Float[Tensor, "_ D"]]
    values: Sequence[Float[Tensor, "_ D"]]
    key_bias: Sequence[Float[Tensor, " _"]] | None = None
    up_keys: Sequence[Float[Tensor, "_ D"]] | None = None
    up_bias: Sequence[Float[Tensor, " _"]] | None = None
    out_bias: Float[Tensor, "E D"] | None = None

    def __len__(self) -> int:
        return len(self.keys)


def members_of(
    labels: Int[Tensor, " F"], num_experts: int, repeat: int = 1
) -> list[Int[Tensor, " _"]]:
    """Neurons of every expert, in ascending order.

    Args:
        labels: cluster of every neuron.
        num_experts: E.
        repeat: expert i takes clusters i, i + 1, ..., i + repeat - 1 (mod E); 1 is a partition
            and E makes every expert the whole FFN.
    """
    ahead = [(labels - i) % num_experts < repeat for i in range(num_experts)]
    return [mask.nonzero().flatten() for mask in ahead]


def gather_experts(
    keys: Float[Tensor, "F D"],
    values: Float[Tensor, "F D"],
    members: Sequence[Int[Tensor, " _"]],
    *,
    key_bias: Float[Tensor, " F"] | None = None,
    out_bias: Float[Tensor, "E D"] | None = None,
) -> ExpertFFN:
    """Copies of the neurons of every expert (owned experts; may overlap)."""
    return ExpertFFN(
        keys=[keys[m] for m in members],
        values=[values[m] for m in members],
        key_bias=None if key_bias is None else [key_bias[m] for m in members],
        out_bias=out_bias,
    )


def scatter_experts(
    experts: ExpertFFN, members: Sequence[Int[Tensor, " _"]]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Dense keys [F, D], key bias [F] and values [F, D] from the experts of a partition.

    The inverse of `gather_experts`; bit-exact, since nothing is computed.
    """
    inverse = torch.cat(list(members)).argsort()
    keys = torch.cat(list(experts.keys))[inverse]
    values = torch.cat(list(experts.values))[inverse]
    bias = None if experts.key_bias is None else torch.cat(list(experts.key_bias))[inverse]
    return keys, bias, values


def merged_out_bias(out_bias: Float[Tensor, "E D"], top_k: int) -> Float[Tensor, " D"]:
    """Output bias of the dense FFN: what a token receives on average under uniform routing."""
    return top_k * out_bias.mean(dim=0)
