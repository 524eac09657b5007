"""Who takes part: our kernels, the automatic choice, dense forms, transformers' backends.

A candidate is a function of one layer and one input. Every peer gets the weights in the layout it
likes best and no bias that our experts do not have.
Letters: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moduli.bench.cases import LayerCase
from moduli.bench.layers import Layer, Visit
from moduli.experts.kernels import KERNELS, Between, choose, run_experts
from moduli.experts.kernels.precision import fast_fp32

Role = Literal["kernel", "dense", "peer"]
Layout = Literal["dense", "stock"]
Compute = Callable[[Layer, Visit], Tensor]

# transformers' own advice: a copy of the weights per token pays while there are few tokens.
BATCHED_TOKENS = 64


@dataclass(frozen=True)
class Candidate:
    """One way to compute a layer.

    Attributes:
        name: as tables show it.
        role: ours, a form of the dense layer, or a backend of transformers.
        layout: where the weights are that it reads and whose gradients it writes.
        compute: the output of a layer for an input.
        routed: False for dense forms, which compute what routing to all their experts with
            weight 1 would.
        fast: whether it asks for fast float32 by itself, whatever the settings.
        trains: whether it has a backward.
    """

    name: str
    role: Role
    layout: Layout
    compute: Compute
    routed: bool = True
    fast: bool = False
    trains: bool = True

    def scope(self) -> AbstractContextManager[object]:
        """What is around a call: fast float32 where the candidate asks for it.

        Even where it rounds: then the candidate is found to be wrong and gets no time.
        """
        return fast_fp32(True) if self.fast else nullcontext()


def candidates(case: LayerCase, device: torch.device) -> list[Candidate]:
    """All that could compute a case; some may turn out not to support it."""
    ours: Layout = "stock" if case.owned else "dense"
    names = ["auto", *(name for name in KERNELS if name not in ("auto", "eager"))]
    found = [Candidate(name, "kernel", ours, partial(_ours, name)) for name in names]
    found += dense_forms(case, device)
    backends = ["eager", "grouped_mm"]
    backends += ["batched_mm"] if case.tokens <= BATCHED_TOKENS else []
    found += [
        Candidate(f"transformers {name}", "peer", "stock", partial(_stock, name))
        for name in backends
    ]
    if case.owned and _registered():
        found.append(Candidate("registered", "kernel", "stock", partial(_stock, "moduli")))
    return [c for c in found if c.trains or case.mode == "forward"]


def dense_forms(case: LayerCase, device: torch.device) -> list[Candidate]:
    """The dense layer as it is written, with fast float32, and with fused activations."""
    forms = [Candidate("dense", "dense", "dense", _dense, routed=False)]
    if device.type != "cpu":
        return forms
    if case.dtype == "float32":
        forms.append(Candidate("dense fast", "dense", "dense", _dense, routed=False, fast=True))
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        forms.append(Candidate("dense fused", "dense", "dense", _fused, routed=False, trains=False))
    return forms


def chosen_kernel(layer: Layer) -> str:
    """The kernel that "auto" takes for a layer."""
    visit = layer.visits[0]
    x = visit.x.detach().requires_grad_(layer.case.mode == "train")
    with torch.set_grad_enabled(layer.case.mode == "train"):
        return choose(x, visit.routing, layer.experts(), Between(layer.activation))


def _registered() -> bool:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return "moduli" in ALL_EXPERTS_FUNCTIONS


def _ours(kernel: str, layer: Layer, visit: Visit) -> Tensor:
    y: Tensor = run_experts(
        visit.x, visit.routing, layer.experts(), layer.activation, kernel=kernel
    )
    return y


def _stock(implementation: str, layer: Layer, visit: Visit) -> Tensor:
    layer.stock.config._experts_implementation = implementation
    y: Tensor = layer.stock(visit.x, visit.routing.experts, visit.routing.weights)
    return y


def _dense(layer: Layer, visit: Visit) -> Tensor:
    dense = layer.dense
    hidden = layer.activation(F.linear(visit.x, dense.first))
    if dense.up is not None:
        hidden = hidden * F.linear(visit.x, dense.up)
    return F.linear(hidden, dense.second)


def _fused(layer: Layer, visit: Visit) -> Tensor:
    dense, linear = layer.dense, torch.ops.mkldnn._linear_pointwise
    name = "gelu" if dense.up is None else "swish"
    hidden = linear(visit.x, dense.first, None, name, [], "none")
    if dense.up is not None:
        hidden = linear.binary(visit.x, hidden, dense.up, None, "mul")
    y: Tensor = linear(hidden, dense.second, None, "none", [], "")
    return y
