"""Making the plan of a composition: what fits, what goes where.

It is made from configs and file headers alone, so that whatever does not fit is found, and said,
before anything is computed or written.

Letters: D width, F neurons, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moduli.errors import ModelError
from moduli.surgery.compose.plan import EMBEDDINGS, Origin, Part, Plan
from moduli.surgery.compose.recipe import DTYPES, Recipe
from moduli.surgery.compose.sources import Checkpoint, check_fits
from moduli.surgery.compose.write import Slot
from moduli.surgery.stock import StockMoE, stock_for


def plan(recipe: Recipe) -> Plan:
    """Check a recipe against its sources and lay out the result; nothing is written.

    Raises:
        ConfigError: the recipe cannot work.
        ModelError: no stock class fits, or a source does not fit the base.
        CheckpointError: a source is missing, damaged, unsafe, or lacks a tensor.
    """
    recipe.check()
    base = Checkpoint(recipe.base, "base")
    experts = [Checkpoint(e.model, f"expert {i}") for i, e in enumerate(recipe.experts)]
    shared = None if recipe.shared is None else Checkpoint(recipe.shared.model, "shared expert")
    stock = _stock(recipe, base)
    every = [*experts, *([] if shared is None else [shared])]
    for source in every:
        check_fits(source, base, same_vocab=recipe.vocab == "same")
    largest = max(experts, key=lambda source: source.config.vocab_size)
    if recipe.others == "base" or largest.config.vocab_size <= base.config.vocab_size:
        largest = base
    config = stock.config(
        base.config,
        len(experts),
        recipe.top_k,
        rule=recipe.rule,
        shared_width=None if shared is None else base.config.intermediate_size,
    )
    config.vocab_size = largest.config.vocab_size
    shapes = _dense_shapes(base)
    for name, shape in shapes.items():
        base.require(name, shape)
    dtype = _dtype(recipe, base, next(iter(shapes)))
    config.dtype = dtype
    parts = [
        *_taken_over(recipe, stock, base, experts, shapes, dtype),
        *_of_layers(stock, config, base.config, experts, shared, shapes, dtype),
    ]
    return Plan(
        recipe, stock, config, base, experts, shared, parts, largest, _notes(base, every, shapes)
    )


def _stock(recipe: Recipe, base: Checkpoint) -> StockMoE:
    target = recipe.target
    kind = base.config.model_type
    stock = stock_for(kind, target)
    if recipe.shared is not None and not stock.has_shared:
        if target is not None or kind not in ("llama", "mistral"):
            raise ModelError(
                f"{stock.moe} has no shared expert; leave it out"
                + (", or use target='qwen2_moe'" if kind in ("llama", "mistral") else "")
            )
        stock = stock_for(kind, "qwen2_moe")
    reason = stock.refusal(base.config)
    if reason is not None:
        raise ModelError(f"{stock.moe} cannot hold {base.role} exactly: {reason}")
    return stock


def _dense_shapes(base: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the base's class reads, tied ones once."""
    import transformers

    of_config: Any = transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = of_config(base.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if base.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _dtype(recipe: Recipe, base: Checkpoint, tensor: str) -> torch.dtype:
    if recipe.dtype is not None:
        found: torch.dtype = getattr(torch, DTYPES[recipe.dtype])
        return found
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    stored = base.dtype(tensor)
    if stored not in known:
        raise ModelError(
            f"{base.role} stores its weights as {stored}; known are {', '.join(known)}"
        )
    return known[stored]


def _taken_over(
    recipe: Recipe,
    stock: StockMoE,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> list[Part]:
    ties = base.config.tie_word_embeddings
    for source in experts if recipe.others == "average" else ():
        if source.config.tie_word_embeddings != ties:
            raise ModelError(
                f"{source.role} has tie_word_embeddings={not ties}, the base {ties}, so their "
                "output layers cannot be averaged; use others='base'"
            )
    parts = []
    for name, shape in shapes.items():
        copied = stock.copied(name)
        if copied is None:
            continue
        if recipe.others == "base":
            parts.append(Part(Slot(copied, shape, dtype), "base", name))
            continue
        for source in experts:
            rows = source.config.vocab_size if name in EMBEDDINGS else shape[0]
            source.require(name, (rows, *shape[1:]))
        rows = max(source.shape(name)[0] for source in experts)
        parts.append(Part(Slot(copied, (rows, *shape[1:]), dtype), "average", name))
    return parts


def _of_layers(
    stock: StockMoE,
    config: Any,
    dense_config: Any,
    experts: Sequence[Checkpoint],
    shared: Checkpoint | None,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> list[Part]:
    parts: list[Part] = []
    for layer in range(dense_config.num_hidden_layers):
        dense = stock.dense_tensors(layer)
        sources: list[tuple[Checkpoint, Origin, Any]] = [
            (source, "expert", stock.expert_tensors(layer, i)) for i, source in enumerate(experts)
        ]
        if shared is not None:
            sources.append((shared, "shared", stock.shared_tensors(layer)))
        for index, (source, origin, names) in enumerate(sources):
            for kind, name, tensor in zip(dense._fields, names, dense, strict=True):
                source.require(tensor, shapes[tensor])
                slot = Slot(name, shapes[tensor], dtype)
                parts.append(Part(slot, origin, tensor, index, kind))
        width = dense_config.hidden_size
        router = Slot(stock.router_tensor(layer), (len(experts), width), dtype)
        parts.append(Part(router, "router", index=layer))
        if stock.has_shared and shared is None:
            few = config.shared_expert_intermediate_size
            empty = [(few, width), (few, width), (width, few)]
            for name, shape in zip(stock.shared_tensors(layer), empty, strict=True):
                parts.append(Part(Slot(name, shape, dtype), "zeros"))
        if stock.has_shared:
            gate = Slot(stock.shared_gate(layer), (1, width), dtype)
            parts.append(Part(gate, "shared gate", index=layer))
    return parts


def _notes(
    base: Checkpoint, sources: Sequence[Checkpoint], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    first = next(iter(shapes))
    notes = []
    for source in sources:
        if source.vocabulary is None or base.vocabulary is None:
            lacking = base if base.vocabulary is None else source
            notes.append(f"{source.role}: tokenizers were not compared, {lacking.role} has none")
        mine, other = (c.config.max_position_embeddings for c in (source, base))
        if mine != other:
            notes.append(f"{source.role} is for {mine} positions, the result for {other}")
        if first in source.names and (stored := source.dtype(first)) != base.dtype(first):
            notes.append(f"{source.role} is stored as {stored}, the base as {base.dtype(first)}")
    return notes
