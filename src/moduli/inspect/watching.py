"""Watch a model route: every routing of every layer with experts, as it happens.

Layers of converted models report their routing themselves (`Pass.record`), and in architectures of
ours a hook reads what a router returns. The experts modules of transformers
(Mixtral, OLMoE, Qwen-MoE, DeepSeek, ...) share one call, `forward(hidden_states, top_k_index,
top_k_weights)`, in front of which a hook reads it; the scores are the output of the router beside
them, where it is a module. Hooks look and change nothing, and all are gone afterwards.

Letters: B batch, S sequence, T tokens = B x S, D width, E experts, K experts per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.routing import Router, Routing
from moduli.surgery.locate import stacks
from moduli.surgery.modular import MaskHook, routed_layers
from moduli.surgery.routed import Pass, RoutedLayer
from moduli.surgery.stochastic import stochastic_projections

See = Callable[[str, Routing, Tensor | None], None]
"""Called with (name of the layer, its routing, mask [T] of real tokens or None if unknown)."""


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """A layer with experts: name and module of its block, and how many experts it has.

    Attributes:
        name: of the block, in the model.
        module: a `RoutedLayer`, a block of ours with its router, or an experts module of
            transformers.
        num_experts: E.
        stack: name of the stack it belongs to; layers of one stack see the same tokens.
    """

    name: str
    module: nn.Module
    num_experts: int
    stack: str


@dataclass(frozen=True, eq=False)
class Seen:
    """One routing of one layer; `real` is None where nothing is known of padding."""

    layer: str
    routing: Routing
    real: Bool[Tensor, " T"] | None


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """The layers with experts, in the order of the model.

    Raises:
        ModelError: there is none, or none that is routed to.
    """
    found: list[tuple[str, int, nn.Module]]
    found = [(name, layer.num_experts, layer) for name, layer in routed_layers(model).items()]
    found += [(name, r.num_experts, block) for name, (block, r) in own_routers(model).items()]
    stock = _stock_experts(model)
    found += [(name, int(module.num_experts), module) for name, module in stock.items()]
    if not found:
        if stochastic_projections(model):
            raise ModelError(
                f"the experts of this {type(model).__name__} are drawn at random, so that there is "
                "no routing to look at; moduli.thor_report(model, batches) compares what they say"
            )
        raise ModelError(
            f"this {type(model).__name__} has no experts to look at; moduli.convert(model, method) "
            "or `moduli tune` makes them, moduli.load(directory) brings back saved ones, and MoE "
            "models of transformers have their own"
        )
    place = {id(module): i for i, module in enumerate(model.modules())}
    found.sort(key=lambda one: place[id(one[2])])
    names = list(stacks(model))
    return [ExpertLayer(name, module, size, _stack(name, names)) for name, size, module in found]


@contextmanager
def watch(model: nn.Module) -> Iterator[list[Seen]]:
    """Within the block the list that is yielded grows by one entry per layer and forward pass.

    Empty it (`seen.clear()`) between batches to keep memory small.

    Args:
        model: a modular model of ours, or an MoE model of transformers.

    Raises:
        ModelError: it has no layer with experts.
    """
    seen: list[Seen] = []
    with listen(model, lambda *one: seen.append(Seen(*one))):
        yield seen


@contextmanager
def listen(model: nn.Module, see: See) -> Iterator[None]:
    """Within the block `see` is called with every routing; see `watch`."""
    expert_layers(model)
    with ExitStack() as undo:
        _listen_to_ours(model, see, undo)
        _listen_to_routers(model, see, undo)
        _listen_to_stock(model, see, undo)
        yield


def _listen_to_ours(model: nn.Module, see: See, undo: ExitStack) -> None:
    states = {id(layer.shared): layer.shared for layer in routed_layers(model).values()}
    for state in states.values():
        before = state.record

        def record(
            name: str, routing: Routing, real: Tensor | None, before: See | None = before
        ) -> None:
            if before is not None:
                before(name, routing, real)
            see(name, _detached(routing), real)

        state.record = record
        undo.callback(setattr, state, "record", before)


def _listen_to_routers(model: nn.Module, see: See, undo: ExitStack) -> None:
    for name, (_, router) in own_routers(model).items():

        def hook(module: nn.Module, args: tuple[Any, ...], output: Routing, of: str = name) -> None:
            see(of, _detached(output), args[1].real)

        undo.callback(router.register_forward_hook(hook).remove)


def _listen_to_stock(model: nn.Module, see: See, undo: ExitStack) -> None:
    stock = _stock_experts(model)
    if not stock:
        return
    shared = Pass()
    for stack_name, stack in stacks(model).items():
        given = list(inspect.signature(stack.forward).parameters)
        position = given.index("attention_mask") if "attention_mask" in given else None
        hook = MaskHook(shared, stack_name, position)
        undo.callback(stack.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)
    for block, experts in stock.items():
        listener = _Listener(block, experts, shared, see)
        undo.callback(
            experts.register_forward_pre_hook(listener.on_experts, with_kwargs=True).remove
        )
        for name, child in model.get_submodule(block).named_children():
            if "gate" in name or "router" in name:
                undo.callback(child.register_forward_hook(listener.on_router).remove)


class _Listener:
    """The hooks on one experts module of transformers and on the router beside it."""

    def __init__(self, name: str, experts: Any, shared: Pass, see: See) -> None:
        self.name, self.shared, self.see = name, shared, see
        self.num_experts = int(experts.num_experts)
        self.scores: Tensor | None = None

    def on_router(self, module: nn.Module, args: object, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.shape[-1] == self.num_experts:
            self.scores = as_logits(first.detach().reshape(-1, self.num_experts))

    def on_experts(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> None:
        given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False))
        given |= kwargs
        index, weights = given["top_k_index"].detach(), given["top_k_weights"].detach()
        scores, self.scores = self.scores, None
        if scores is not None and len(scores) != len(index):
            scores = None
        # An index that is no expert's stands for one of another process (expert parallelism).
        here = index < self.num_experts
        active = None if bool(here.all()) else here
        routing = Routing(index.where(here, 0).long(), weights, active, scores, scores)
        self.see(self.name, routing, self._real(len(index)))

    def _real(self, tokens: int) -> Bool[Tensor, " T"] | None:
        for mask in self.shared.masks.values():
            if mask is not None and tokens % len(mask) == 0:
                shape = torch.Size((len(mask), tokens // len(mask)))
                if (real := self.shared.real_tokens(shape, self.name)) is not None:
                    return real
        return None


def as_logits(scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Scores whose softmax is the router's distribution: some routers return it already."""
    sums = scores.float().sum(-1)
    tolerance = 1e-4 if scores.dtype == torch.float32 else 2e-2
    if bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=tolerance):
        return scores.float().log()
    return scores


def strongest_first(routing: Routing) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
    """Experts and weights of all slots, by falling score (weight, where there are no scores).

    Slots that compute nothing come last, with expert -1 and weight 0.
    """
    experts, weights = routing.experts, routing.weights.float()
    strength = weights if routing.scores is None else routing.scores.float().gather(1, experts)
    if routing.active is not None:
        strength = strength.masked_fill(~routing.active, -torch.inf)
        experts = experts.masked_fill(~routing.active, -1)
        weights = weights * routing.active
    order = strength.argsort(dim=1, descending=True, stable=True)
    return experts.gather(1, order), weights.gather(1, order)


def own_routers(model: nn.Module) -> dict[str, tuple[nn.Module, Router]]:
    """Blocks of our architectures that hold a router, with it, by name."""
    converted = _inside(layer for layer in model.modules() if isinstance(layer, RoutedLayer))
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Router) and id(module) not in converted:
            block = name.rpartition(".")[0]
            found[block] = (model.get_submodule(block), module)
    return found


def _inside(blocks: Iterable[nn.Module]) -> set[int]:
    return {id(module) for block in blocks for module in block.modules()}


def _stock_experts(model: nn.Module) -> dict[str, Any]:
    """Experts modules of transformers by the name of the block that holds them."""
    ours = _inside(layer for layer in model.modules() if isinstance(layer, RoutedLayer))
    ours |= _inside(block for block, _ in own_routers(model).values())
    return {
        _block_of(name): module
        for name, module in model.named_modules()
        if id(module) not in ours and _is_stock(module)
    }


def _block_of(experts: str) -> str:
    """Name of the block that holds an experts module; PEFT wraps it once per tensor it adapts."""
    parts = experts.split(".")
    while parts[-1] == "base_layer":
        parts.pop()
    return ".".join(parts[:-1])


def _is_stock(module: nn.Module) -> bool:
    if not isinstance(getattr(module, "num_experts", None), int):
        return False
    stacked = any(p.dim() == 3 for p in module.parameters(recurse=False))
    parameters = inspect.signature(type(module).forward).parameters
    return stacked and {"top_k_index", "top_k_weights"} <= set(parameters)


def _detached(routing: Routing) -> Routing:
    def plain(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach()

    return Routing(
        routing.experts,
        routing.weights.detach(),
        routing.active,
        plain(routing.scores),
        plain(routing.noisy_scores),
    )


def _stack(name: str, names: list[str]) -> str:
    fitting = [stack for stack in names if not stack or f"{name}.".startswith(f"{stack}.")]
    return max(fitting, key=len, default="")
