"""The tensors of an FFN that run over its neurons, and moving neurons about in all of them.

Letters: D width, F neurons, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.surgery.locate import FFN
from moduli.surgery.projection import (
    base_of,
    bias_of,
    full_copies,
    in_dim,
    is_matrix,
    out_dim,
    placed_like,
    weight_of,
    whole,
)


@dataclass(frozen=True, eq=False)
class NeuronTensor:
    """One tensor with a neuron dimension.

    Attributes:
        name: within the block.
        tensor: the parameter.
        dim: the dimension that runs over neurons.
        halves: how often all neurons follow each other in it: 2 in a fused gated projection.
    """

    name: str
    tensor: Tensor
    dim: int
    halves: int = 1

    def moved(self, order: Int[Tensor, " F"]) -> Tensor:
        """A copy in which neuron order[i] is at position i; gathered if the tensor is sharded."""
        full = whole(self.tensor.detach())
        order = order.to(full.device)
        if self.halves > 1:
            order = torch.cat([order + half * order.numel() for half in range(self.halves)])
        return full.index_select(self.dim, order)


def neuron_tensors(ffn: FFN) -> list[NeuronTensor]:
    """Every tensor of the block that has a neuron dimension.

    Besides weights and biases of the projections these are the parts of adapters on them: of LoRA
    the output side on a projection into the neurons and the input side on one out of them, the
    magnitudes of DoRA, the factors of IA3; and the full copies of PEFT's `modules_to_save`.

    Raises:
        ModelError: a projection keeps its weight in a form whose neurons cannot be moved, or has
            an adapter whose coordinates are not known.
    """
    found: list[NeuronTensor] = []
    for path, layer in ffn.projections.items():
        outward = path == ffn.family.last
        halves = 2 if ffn.family.fused and not outward else 1
        base = base_of(layer)
        if not is_matrix(base):
            raise ModelError(
                f"{ffn.name}.{path} is a {type(base).__name__} whose weight is not a plain "
                f"tensor but a {type(getattr(base, 'weight', None)).__name__}, so its neurons "
                "cannot change places; merge before quantising, or convert after it (neurons "
                "then stay where they are)"
            )
        plain = {"": layer} if base is layer else {"base_layer": base}
        for name, module in (full_copies(layer) or plain).items():
            prefix = f"{path}.{name}." if name else f"{path}."
            dim = in_dim(module) if outward else out_dim(module)
            found.append(NeuronTensor(f"{prefix}weight", weight_of(module), dim, halves))
            bias = bias_of(module)
            if bias is not None and not outward:
                found.append(NeuronTensor(f"{prefix}bias", bias, 0, halves))
        if hasattr(layer, "base_layer"):
            found += [
                NeuronTensor(f"{path}.{name}", tensor, dim, halves)
                for name, tensor, dim in _adapter_tensors(layer, outward)
            ]
    return found


def _adapter_tensors(layer: nn.Module, outward: bool) -> list[tuple[str, Tensor, int]]:
    """Name, tensor and neuron dimension of the adapters on one projection."""
    found: list[tuple[str, Tensor, int]] = []
    for name, tensor in layer.named_parameters():
        part = name.split(".", 1)[0]
        if part == "base_layer":
            continue
        if part == "lora_A":  # [R, in]
            if outward:
                found.append((name, tensor, 1))
        elif part in ("lora_B", "lora_magnitude_vector"):  # [out, R] or [out]
            if not outward:
                found.append((name, tensor, 0))
        elif part == "ia3_l":  # scales inputs [1, in] or outputs [out, 1]
            scales_inputs = bool(getattr(layer, "is_feedforward", False))
            if scales_inputs == outward:
                found.append((name, tensor, 1 if outward else 0))
        else:
            raise ModelError(
                f"{type(layer).__name__} has a parameter {name!r} whose neuron order is not "
                "known; LoRA, DoRA and IA3 are. Merge or unload the adapter first."
            )
    return found


@torch.no_grad()
def permute_neurons(ffn: FFN, order: Int[Tensor, " F"]) -> None:
    """Move neuron order[i] to position i in every tensor of the FFN, adapters included."""
    for entry in neuron_tensors(ffn):
        entry.tensor.copy_(placed_like(entry.moved(order), entry.tensor))
