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
from typing import Literal

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


Fused = Literal["concatenated", "interleaved"]


@dataclass(frozen=True)
class StackedFFN:
    """All experts of a layer in a few tensors, as kernels read them: views of the parameters.

    Experts of equal size are stacked, others packed one after the other. Strides are free, so
    that the second matrix of an `nn.Linear`, which holds a value per column, is passed as its
    transpose. R rows of the first matrix belong to an expert of e neurons: R = e, or 2e where
    gate and up projection share a tensor.

    Attributes:
        first: keys, [E, R, D] or packed [sum of R, D].
        second: values, [E, e, D] or packed [sum of e, D]; one row per neuron.
        sizes: neurons of every expert.
        first_bias: [E, R] or packed [sum of R], or None.
        up: second keys of gated FFNs where they are a tensor of their own, like `first`; or None.
        up_bias: like `first_bias`, or None.
        out_bias: one output bias per expert [E, D], weighted like the expert itself, or None.
        fused: how an expert's rows of `first` hold its gate and up keys: one after the other or
            in turns; None if they do not.
    """

    first: Tensor
    second: Tensor
    sizes: tuple[int, ...]
    first_bias: Tensor | None = None
    up: Tensor | None = None
    up_bias: Tensor | None = None
    out_bias: Float[Tensor, "E D"] | None = None
    fused: Fused | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def gated(self) -> bool:
        return self.up is not None or self.fused is not None


def stack(experts: ExpertFFN) -> StackedFFN:
    """The lists as tensors: stacked if all are of one size, else packed. Copies."""
    sizes = tuple(len(keys) for keys in experts.keys)
    equal = len(set(sizes)) == 1

    def join(parts: Sequence[Tensor] | None) -> Tensor | None:
        if parts is None:
            return None
        return torch.stack(list(parts)) if equal else torch.cat(list(parts))

    first, second = join(experts.keys), join(experts.values)
    assert first is not None
    assert second is not None
    return StackedFFN(
        first=first,
        second=second,
        sizes=sizes,
        first_bias=join(experts.key_bias),
        up=join(experts.up_keys),
        up_bias=join(experts.up_bias),
        out_bias=experts.out_bias,
    )


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
