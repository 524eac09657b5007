"""The layer of a case as tensors: the same numbers in the layouts that candidates read.

Our borrowed experts are views of a dense FFN; transformers' and our owned ones are stacked
parameters. Letters: T tokens, D width, F neurons of the dense FFN, E experts, K experts per
token, e neurons of an expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moduli.bench.cases import LayerCase
from moduli.experts.ffn import ExpertFFN, Fused, StackedFFN
from moduli.routing import RouteContext, Routing
from moduli.routing.rule import Rule, route

# For one token the weights of all layers together are larger than any cache, and every call
# takes another layer and other experts, as decoding does.
DECODE_LAYERS, DECODE_VISITS = 8, 8
CACHE_BYTES, MAX_BYTES = 128 * 2**20, 2**30


class DenseFFN(nn.Module):
    """The dense FFN: `first` and `up` [F, D], `second` [D, F]."""

    def __init__(self, first: Tensor, up: Tensor | None, second: Tensor) -> None:
        super().__init__()
        self.first = nn.Parameter(first)
        self.up = None if up is None else nn.Parameter(up)
        self.second = nn.Parameter(second)


@dataclass(frozen=True)
class Visit:
    """Tokens and their routing. `gradient` is that of the output."""

    x: Float[Tensor, "T D"]
    routing: Routing
    gradient: Float[Tensor, "T D"]


@dataclass(frozen=True)
class Layer:
    """One layer of a case.

    Attributes:
        dense: the dense FFN that the floor is taken from: the experts `dense_experts`, side by
            side.
        stock: transformers' experts module with the same weights.
        dense_experts: which experts `dense` consists of: all where they are borrowed from it; the
            first K, which cost what a token uses, where they are owned.
        visits: inputs, one after the other.
        activation: between the matrices.
    """

    case: LayerCase
    dense: DenseFFN
    stock: Any
    dense_experts: int
    visits: list[Visit]
    activation: nn.Module

    def experts(self) -> StackedFFN:
        """The experts as our kernels read them: views of `dense`, or of `stock` where owned."""
        case, dense, stock = self.case, self.dense, self.stock
        sizes = (case.width,) * case.experts
        if case.owned:
            fused: Fused | None = "concatenated" if case.gated else None
            values = stock.down_proj.transpose(1, 2)
            return StackedFFN(first_of(stock), values, sizes, fused=fused)
        shape = (case.experts, case.width, case.hidden)
        return StackedFFN(
            first=dense.first.view(shape),
            second=dense.second.T.unflatten(0, shape[:2]),
            sizes=sizes,
            up=None if dense.up is None else dense.up.view(shape),
        )

    def reference(self, experts: int) -> ExpertFFN:
        """The first so many experts in float32, as copies that take gradients in training."""
        training = self.case.mode == "train"

        def leaves(rows: Tensor) -> list[Tensor]:
            return [one.clone().requires_grad_() if training else one for one in rows.unbind()]

        first = first_of(self.stock).detach()[:experts].float()
        keys, *up = first.split(self.case.width, dim=1)
        values = self.stock.down_proj.detach()[:experts].float().transpose(1, 2)
        return ExpertFFN(leaves(keys), leaves(values), up_keys=leaves(up[0]) if up else None)

    def parameters(self) -> list[nn.Parameter]:
        """Weights in all layouts."""
        return [*self.dense.parameters(), *self.stock.parameters()]


def build(case: LayerCase, device: torch.device, seed: int = 0) -> list[Layer]:
    """The layers of a case: one, or several for one token.

    Args:
        case: the case.
        device: where.
        seed: of weights, tokens and routings; the same numbers on every device.
    """
    from transformers.activations import ACT2FN

    generator = torch.Generator().manual_seed(seed)
    count = decode_layers(case) if case.decode else 1
    activation = ACT2FN["silu" if case.gated else "gelu"]
    return [_layer(case, device, generator, activation) for _ in range(count)]


def decode_layers(case: LayerCase) -> int:
    """As many layers as no cache holds, at least eight; fewer where they are huge."""
    wanted = max(DECODE_LAYERS, math.ceil(CACHE_BYTES / case.layer_bytes))
    return max(1, min(wanted, MAX_BYTES // case.layer_bytes))


def _layer(
    case: LayerCase, device: torch.device, generator: torch.Generator, activation: nn.Module
) -> Layer:
    E, e, D = case.experts, case.width, case.hidden

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        sample = torch.empty(shape).normal_(generator=generator) * scale
        return sample.to(device, case.torch_dtype)

    keys = [normal(E, e, D, scale=D**-0.5) for _ in range(case.matrices - 1)]
    values = normal(E, e, D, scale=(case.top_k * e) ** -0.5)
    stock = _stock(case, torch.cat(keys, dim=1), values.transpose(1, 2).contiguous(), device)
    first, *up = (part[: case.top_k] if case.owned else part for part in keys)
    second = values[: case.top_k] if case.owned else values
    # A copy of its own: in the borrowed layout the value of a neuron is a column.
    dense = DenseFFN(
        first.reshape(-1, D).clone(),
        up[0].reshape(-1, D).clone() if up else None,
        second.reshape(-1, D).T.contiguous(),
    )
    visits = []
    for _ in range(DECODE_VISITS if case.decode else 1):
        scores = torch.empty(case.tokens, E).normal_(generator=generator)
        if case.spread == "skewed":
            scores += torch.empty(E).normal_(generator=generator)
        chosen = route(scores, Rule(case.top_k, combine="softmax"), RouteContext())
        weights = chosen.weights.to(device, case.torch_dtype)
        # Batch rows are tokens; gradients are as large as a mean over tokens makes them.
        x, gradient = normal(case.tokens, D), normal(case.tokens, D)
        visits.append(Visit(x, Routing(chosen.experts.to(device), weights), gradient))
    return Layer(case, dense, stock, case.top_k if case.owned else E, visits, activation)


def _stock(case: LayerCase, first: Tensor, down: Tensor, device: torch.device) -> nn.Module:
    """An experts module of transformers, without biases, on given weights."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    act = "silu" if case.gated else "gelu"
    config: Any = SimpleNamespace(
        hidden_size=case.hidden,
        num_local_experts=case.experts,
        intermediate_size=case.width,
        hidden_act=act,
        n_routed_experts=case.experts,
        moe_intermediate_size=case.width,
        moe_latent_size=None,
        mlp_hidden_act=act,
        _experts_implementation="eager",
    )
    with torch.device("meta"):
        module: nn.Module = (MixtralExperts if case.gated else NemotronHExperts)(config)
    name = "gate_up_proj" if case.gated else "up_proj"
    module.register_parameter(name, nn.Parameter(first))
    module.register_parameter("down_proj", nn.Parameter(down))
    return module


def first_of(stock: Any) -> Tensor:
    """The first matrices of an experts module of transformers."""
    found: Tensor = stock.gate_up_proj if hasattr(stock, "gate_up_proj") else stock.up_proj
    return found
