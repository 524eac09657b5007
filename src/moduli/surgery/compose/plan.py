"""The plan of a composition as a record that prints itself: every tensor, and where it comes from.

Letters: D width, F neurons, E experts, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from moduli.surgery.compose.recipe import Recipe
from moduli.surgery.compose.sources import Checkpoint
from moduli.surgery.compose.write import Slot
from moduli.surgery.stock import StockMoE

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
