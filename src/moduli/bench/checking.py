"""Whether a candidate computes the right thing: outputs and gradients against the reference.

The reference is the kernel `eager` in float32 on the same numbers. A candidate that is wrong gets
no time. Letters: T tokens, D width, E experts, K experts per token, e neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from moduli.bench.candidates import Candidate
from moduli.bench.cases import LayerCase
from moduli.bench.layers import Layer, Visit, first_of
from moduli.experts.kernels import run_experts
from moduli.routing import Routing

# Largest deviation relative to the largest entry of the reference. Rounding stays well below it;
# one token at a wrong expert is far above.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Results:
    """What a layer returned for one input, and the gradients it left, in one layout for all.

    Attributes:
        y: output.
        gradients: of the tokens, of the combine weights (routed candidates only), and of keys,
            up keys and values as [E, e, D]; empty in forward mode.
    """

    y: Float[Tensor, "T D"]
    gradients: dict[str, Tensor]


def evaluate(candidate: Candidate, layer: Layer, visit: Visit) -> Results:
    """Run a candidate once."""
    with candidate.scope():
        if layer.case.mode == "forward":
            with torch.no_grad():
                return Results(candidate.compute(layer, visit), {})
        used = train_step(candidate, layer, visit)
    x, weights, y = used
    found = {"tokens": _gradient(x), **_weight_gradients(candidate, layer)}
    if candidate.routed:
        found["combine weights"] = _gradient(weights)
    return Results(y.detach(), found)


def train_step(candidate: Candidate, layer: Layer, visit: Visit) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward; the leaves for tokens and combine weights, and the output."""
    module = layer.dense if candidate.layout == "dense" else layer.stock
    for parameter in module.parameters():
        parameter.grad = None
    x = visit.x.detach().requires_grad_()
    weights = visit.routing.weights.detach().requires_grad_()
    routing = replace(visit.routing, weights=weights)
    y = candidate.compute(layer, replace(visit, x=x, routing=routing))
    y.backward(visit.gradient)
    return x, weights, y


def expected(layer: Layer, visit: Visit, *, routed: bool) -> Results:
    """The reference: of the routed layer, or of its dense form."""
    case = layer.case
    experts = layer.reference(case.experts if routed else layer.dense_experts)
    x = visit.x.detach().float().requires_grad_()
    if routed:
        index, weights = visit.routing.experts, visit.routing.weights.detach().float()
    else:
        index = torch.arange(len(experts), device=x.device).expand(len(x), -1)
        weights = torch.ones(index.shape, device=x.device)
    weights.requires_grad_()
    training = case.mode == "train"
    with torch.set_grad_enabled(training):
        y = run_experts(x, Routing(index, weights), experts, layer.activation, kernel="eager")
    if not training:
        return Results(y, {})
    y.backward(visit.gradient.float())
    found = {"tokens": _gradient(x), "keys": _stacked(experts.keys)}
    found["values"] = _stacked(experts.values)
    if experts.up_keys is not None:
        found["up keys"] = _stacked(experts.up_keys)
    if routed:
        found["combine weights"] = _gradient(weights)
    return Results(y.detach(), found)


def deviation(results: Results, reference: Results) -> float:
    """The largest deviation of output or gradients, relative to the largest entry of each."""
    pairs = [(results.y, reference.y)]
    pairs += [(results.gradients[name], g) for name, g in reference.gradients.items()]
    found = 0.0
    for tensor, right in pairs:
        scale = right.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        worst = float((tensor.float() - right).abs().max() / scale)
        if not worst <= found:  # also where it is not a number
            found = worst
    return found


def right_enough(error: float, case: LayerCase) -> bool:
    """Whether a deviation is rounding."""
    return error <= TOLERANCE[case.dtype]


def saved_bytes(candidate: Candidate, layer: Layer, visit: Visit) -> int:
    """Bytes kept for backward, beyond the weights and the tokens.

    Every storage counts once and whole, since that is what stays in memory.
    """
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    free = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    free.add(visit.x.untyped_storage().data_ptr())
    x = visit.x.detach().requires_grad_()
    weights = visit.routing.weights.detach().requires_grad_()
    used = replace(visit, x=x, routing=replace(visit.routing, weights=weights))
    with candidate.scope(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = candidate.compute(layer, used)
    held = [t for pointer, t in kept.items() if pointer not in free]
    del y
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


def _weight_gradients(candidate: Candidate, layer: Layer) -> dict[str, Tensor]:
    case = layer.case
    if candidate.layout == "dense":
        shape = (layer.dense_experts, case.width, case.hidden)
        dense = layer.dense
        found = {
            "keys": _gradient(dense.first).view(shape),
            "values": _gradient(dense.second).T.reshape(shape),
        }
        return found if dense.up is None else {**found, "up keys": _gradient(dense.up).view(shape)}
    parts = _gradient(first_of(layer.stock)).split(case.width, dim=1)
    values = _gradient(layer.stock.down_proj).transpose(1, 2)
    found = {"keys": parts[0], "values": values}
    return {**found, "up keys": parts[1]} if case.gated else found


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _stacked(leaves: Sequence[Tensor]) -> Tensor:
    return torch.stack([_gradient(leaf) for leaf in leaves])
