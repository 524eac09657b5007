"""Saving owned experts as a stock mixture-of-experts class of transformers.

Where the experts are full copies of Llama-like FFNs and the routing rule is one that a stock class
follows, the model is an ordinary checkpoint of that class: plain transformers loads it, and so does
what else reads such checkpoints. Letters: D width, F neurons, E experts, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moduli.errors import ModelError
from moduli.routing import LinearRouter
from moduli.surgery.checkpoint import versions
from moduli.surgery.compose.write import Slot, write_shards
from moduli.surgery.convert import base_model, recorded_layout
from moduli.surgery.files import EXPORTED, new_directory
from moduli.surgery.modular import require_modular
from moduli.surgery.owned import OwnedExperts
from moduli.surgery.stock import StockMoE, StockRule, stock_for

SHARD_BYTES = 5 * 10**9


def export(
    model: Any, directory: str | Path, tokenizer: Any = None, *, target: str | None = None
) -> Path:
    """Write a converted model as a checkpoint of a stock MoE class; the model stays as it is.

    Args:
        model: a decoder all of whose FFNs are full copies behind a linear router, such as
            `SparseUpcycling(layers="all")` makes of a Llama, Mistral or Qwen.
        directory: created, or replaced if moduli wrote it.
        tokenizer: saved beside the model if given.
        target: `model_type` of the class, where there is a choice.

    Returns:
        The directory.

    Raises:
        ModelError: no stock class computes what this model does; says which condition failed.
        CheckpointError: the directory is not ours, or writing failed (nothing is half-written).
    """
    host: Any = base_model(model)
    layers = require_modular(host)
    stock = stock_for(host.config.model_type, target)
    refusal = _refusal(host, stock)
    if refusal is not None:
        raise ModelError(
            f"this model cannot be saved as {stock.moe}: {refusal}. moduli.save(model, directory) "
            "keeps it as it is"
        )
    owned = [layer for layer in layers.values() if isinstance(layer, OwnedExperts)]
    first = owned[0]
    rule = _rule(first)
    assert rule is not None
    config = stock.config(host.config, first.num_experts, first.router.rule.top_k, rule=rule)
    config.dtype = next(host.parameters()).dtype
    layout = recorded_layout(host)[1]
    tensors = _tensors(host, owned, stock, config)
    slots = []
    for name, make in tensors.items():
        tensor = make()
        slots.append(Slot(name, tuple(tensor.shape), tensor.dtype))
    with new_directory(Path(directory)) as folder:
        config.save_pretrained(folder)
        if getattr(host, "generation_config", None) is not None:
            host.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_shards(folder, slots, lambda slot: tensors[slot.name](), SHARD_BYTES)
        record = {"method": layout.method, "config": dict(layout.config), "versions": versions()}
        (folder / EXPORTED).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Path(directory)


def _refusal(host: Any, stock: StockMoE) -> str | None:
    """Which condition of a stock class the model does not meet; None if it meets all."""
    layers = require_modular(host)
    if reason := stock.refusal(host.config):
        return reason
    count = host.config.num_hidden_layers
    if len(layers) != count:
        return f"{len(layers)} of its {count} layers have experts, the class has them in every one"
    settings = set()
    for name, layer in layers.items():
        if not isinstance(layer, OwnedExperts):
            return f"the experts of {name} are neurons of a dense FFN, not FFNs of their own"
        if any(size != layer.width for size in layer.sizes) or layer.residual is not None:
            return f"the experts of {name} are not full copies of the FFN"
        rule, router = layer.router.rule, layer.router
        if type(router) is not LinearRouter:
            return f"{name} routes by a {type(router).__name__}, the class by a linear router"
        if rule.choose != "top" or rule.capacity_factor:
            return f"{name} drops tokens or does not choose the best experts"
        if _rule(layer) not in stock.rules:
            return (
                f"{name} weights experts by {rule.combine!r} with top_k={rule.top_k}, the class by "
                f"{' or '.join(stock.rules)}"
            )
        settings.add((layer.num_experts, rule.top_k))
    return None if len(settings) == 1 else "its layers differ in experts or top_k"


def _rule(layer: OwnedExperts) -> StockRule | None:
    """What stock classes call the combine weights of a layer; None if none has them."""
    rule = layer.router.rule
    if rule.combine == "softmax":
        return "renormalised" if rule.top_k > 1 else "probabilities"
    if rule.combine == "probability":
        return "probabilities"
    return "renormalised" if rule.combine == "one" and rule.top_k == 1 else None


def _tensors(
    host: Any, layers: list[OwnedExperts], stock: StockMoE, config: Any
) -> dict[str, Callable[[], Tensor]]:
    """Every tensor of the checkpoint by its published name, made when it is written."""
    _, layout = recorded_layout(host)
    prefixes = tuple(f"{entry.name}." for entry in layout.layers)
    found: dict[str, Callable[[], Tensor]] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in host.state_dict().items():
        where = (tensor.data_ptr(), tensor.shape)
        if name.startswith(prefixes) or where in seen:  # ours, or tied to an earlier one
            continue
        seen.add(where)
        found[name] = partial(torch.Tensor.detach, tensor)
    for index, layer in enumerate(layers):
        found[stock.router_tensor(index)] = partial(_gate, layer)
        for i in range(layer.num_experts):
            names = zip(("gate", "up", "down"), stock.expert_tensors(index, i), strict=True)
            found |= {name: partial(_part, layer, i, part) for part, name in names}
        if stock.has_shared:
            width = config.shared_expert_intermediate_size
            found |= _no_shared(stock, index, layer.hidden, width, layer.experts.down_proj)
    return found


def _gate(layer: OwnedExperts) -> Tensor:
    """Weight [E, D] of the linear router."""
    assert isinstance(layer.router, LinearRouter)
    return layer.router.gate.weight.detach()


def _part(layer: OwnedExperts, expert: int, part: str) -> Tensor:
    """gate [F, D], up [F, D] or down [D, F] of one expert."""
    if part == "down":
        return layer.experts.down_proj[expert].detach()
    stacked = layer.experts.gate_up_proj
    assert isinstance(stacked, Tensor)
    gate, up = stacked[expert].detach().chunk(2)
    return gate if part == "gate" else up


def _no_shared(
    stock: StockMoE, index: int, hidden: int, width: int, like: Tensor
) -> Mapping[str, Callable[[], Tensor]]:
    """A shared expert that adds nothing, for classes that always have one."""
    gate, up, down = stock.shared_tensors(index)
    shapes = {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}
    shapes[stock.shared_gate(index)] = (1, hidden)
    return {name: partial(like.new_zeros, shape) for name, shape in shapes.items()}
