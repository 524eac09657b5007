"""The plan of a composition: every tensor of the result, its shape, and where it comes from.

It is made from configs and file headers alone, so that whatever does not fit is found, and said,
before anything is computed or written.

Letters: D width, F neurons, E experts, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch

from moduli.errors import ModelError
from moduli.surgery.compose.recipe import DTYPES, Recipe
from moduli.surgery.compose.sources import Checkpoint, check_fits
from moduli.surgery.compose.write import Slot
from moduli.surgery.stock import StockMoE, stock_for

Origin = Literal["base", "average", "expert", "shared", "router", "shared gate", "zeros"]
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Part:
    """One tensor of the result.

    Attributes:
        slot: its name, shape and dtype in the result.
        origin: where it comes from.
        tensor: its name in the source; empty for routers and zeros.
        index: which expert, or which layer of a router.
        projection: of an expert: "gate", "up" or "down".
    """

    slot: Slot
    origin: Origin
    tensor: str = ""
    index: int = 0
    projection: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first weight is read.

    Attributes:
        recipe: what was asked for.
        stock: the MoE class.
        config: its config.
        base, experts, shared: the opened checkpoints.
        parts: all tensors of the result.
        tokenizer: the checkpoint whose tokenizer the result gets.
        notes: what to know about the sources.
    """

    recipe: Recipe
    stock: StockMoE
    config: Any
    base: Checkpoint
    experts: Sequence[Checkpoint]
    shared: Checkpoint | None
    parts: Sequence[Part]
    tokenizer: Checkpoint
    notes: Sequence[str]

    @property
    def total_parameters(self) -> int:
        return sum(prod(part.slot.shape) for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets."""
        experts = sum(prod(p.slot.shape) for p in self.parts if p.origin == "expert")
        idle = len(self.experts) - self.recipe.top_k
        return self.total_parameters - experts * idle // len(self.experts)

    @property
    def bytes(self) -> int:
        return sum(part.slot.bytes for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """For machines: totals, and one entry per group of tensors that differ by layer only."""
        return {
            "base": self.base.name,
            "experts": [expert.name for expert in self.experts],
            "shared": None if self.shared is None else self.shared.name,
            "architecture": self.stock.architecture,
            "model_type": self.stock.moe,
            "top_k": self.recipe.top_k,
            "rule": self.recipe.rule,
            "gate": self.recipe.gate,
            "others": self.recipe.others,
            "total_parameters": self.total_parameters,
            "active_parameters": self.active_parameters,
            "bytes": self.bytes,
            "tensors": [
                {"name": n, "count": c, "shape": list(s), "from": f, "bytes": b}
                for n, c, s, f, b in self.groups()
            ],
            "notes": list(self.notes),
        }

    def groups(self) -> list[tuple[str, int, tuple[int, ...], str, int]]:
        """(name with * for the layer, how many, shape, where from, bytes), in order."""
        found: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
        for part in self.parts:
            name = re.sub(r"\.layers\.\d+\.", ".layers.*.", part.slot.name)
            key = (name, part.slot.shape, self._from(part))
            found.setdefault(key, []).append(part.slot.bytes)
        return [(n, len(b), s, f, sum(b)) for (n, s, f), b in found.items()]

    def __str__(self) -> str:
        head = (
            f"{len(self.experts)} experts on {self.base.name} as {self.stock.architecture}, "
            f"{self.recipe.top_k} per token, weights {_RULES[self.recipe.rule]}"
        )
        rows = [
            (name, f"{count} x {list(shape)}", origin, _size(float(size)))
            for name, count, shape, origin, size in self.groups()
        ]
        columns = ("tensor", "shape", "from", "size")
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(4)]
        lines = [
            "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in [columns, *rows]
        ]
        total = (
            f"{self.total_parameters:,} parameters, {self.active_parameters:,} active per token, "
            f"{_size(float(self.bytes))}"
        )
        return "\n".join([head, *lines, total, *(f"Note: {note}" for note in self.notes)])

    def _from(self, part: Part) -> str:
        if part.origin == "base":
            return self.base.name
        if part.origin == "average":
            return f"average of {len(self.experts)}"
        if part.origin == "expert":
            return self.experts[part.index].name
        if part.origin == "shared" and self.shared is not None:
            return self.shared.name
        return {"router": f"gate: {self.recipe.gate}"}.get(part.origin, part.origin)


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
    tied = [e for e in experts if e.config.tie_word_embeddings != base.config.tie_word_embeddings]
    if recipe.others == "average" and tied:
        raise ModelError(
            f"{tied[0].role} has tie_word_embeddings={tied[0].config.tie_word_embeddings}, the "
            "base has not, so their output layers cannot be averaged; use others='base'"
        )
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


_RULES = {
    "renormalised": "renormalised over the chosen",
    "probabilities": "softmax over all experts",
}


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
