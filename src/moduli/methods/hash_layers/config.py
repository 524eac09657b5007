"""Hash Layers: FFNs become E copies, and a fixed table says which of them a token goes to.

1. Every expert starts as a copy of the whole FFN, output bias included.
2. A table from token to expert is drawn once, per layer, and never learned.
3. The weight is 1: the layer starts at the dense function and costs what the dense layer costs.

Nothing can collapse, so that there is no auxiliary loss and no capacity. Letters: V vocabulary, E
experts.
Source: Hash Layers (arXiv 2106.04426).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moduli.errors import ConfigError, ModelError
from moduli.experts.bank import ExpertBank
from moduli.methods.base import DataMethod, Progress, settle
from moduli.routing import HashRouter, Router
from moduli.routing.hashed import balanced_table, random_table
from moduli.routing.names import require_known
from moduli.surgery.conversion import OwnedRecipe, restore_owned
from moduli.surgery.inputs import Batch
from moduli.surgery.layout import Layout
from moduli.surgery.locate import FFN, stacks
from moduli.surgery.owned import Own
from moduli.surgery.partition.observe import Sample
from moduli.surgery.routed import SeamOptions

Table = Literal["random", "balanced"]
MakeTable = Callable[[FFN], Tensor]


@dataclass(frozen=True)
class HashLayers(DataMethod):
    """Settings of Hash Layers.

    Attributes:
        num_experts: E.
        layers: "all", "last:2", "first:2", "every:2", a list of indices, or name patterns.
        table: "random", or "balanced": by how often tokens occur in the batches that
            `moduli.convert` is given.
        expert_dropout: dropout inside experts, in training.
        seed: of the tables.
    """

    name: ClassVar[str] = "hash-layers"
    summary: ClassVar[str] = "full copies of FFNs, the expert is read from a table of tokens (Hash)"
    top_k: ClassVar[int] = 1

    num_experts: int = 8
    layers: str | Sequence[int] | Sequence[str] = "every:2"
    table: Table = "random"
    expert_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self)
        require_known("table", self.table, Table)
        if not 0 <= self.expert_dropout < 1:
            raise ConfigError(
                f"expert_dropout is {self.expert_dropout}; it may be from 0 to below 1"
            )

    @property
    def borrows(self) -> bool:
        """Never: its experts are copies."""
        return False

    def recipe(self, progress: Progress | None, sample: Sample | None) -> OwnedRecipe:
        """Full copies behind tables for the vocabulary of the sample's model.

        Raises:
            ConfigError: there is no sample; a balanced table, and no batches to count tokens in.
        """
        if sample is None:
            raise ConfigError("the tables of hash-layers are made for the vocabulary of a model")
        given = sample

        def table(ffn: FFN) -> Tensor:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + ffn.index)
            vocabulary = _vocabulary(given.model, ffn)
            if self.table == "random":
                return random_table(vocabulary, self.num_experts, generator)
            counts = _counts(given.batches, _stack_of(given.model, ffn), vocabulary)
            return balanced_table(counts, self.num_experts, generator)

        def check(ffn: FFN) -> None:
            _require_ids(given.model, ffn)
            table(ffn)

        return self._recipe(table, check)

    def restore(self, model: nn.Module, layout: Layout, permuted: bool) -> None:
        """Give a model that was read from a checkpoint its experts again; tables are loaded."""

        def unknown(ffn: FFN) -> Tensor:
            return torch.zeros(_vocabulary(model, ffn), dtype=torch.long)

        restore_owned(model, layout, self._recipe(unknown, lambda ffn: None).own)

    def _recipe(self, table: MakeTable, check: Callable[[FFN], object]) -> OwnedRecipe:
        def router(ffn: FFN, bank: ExpertBank) -> Router:
            return HashRouter(table(ffn), self.num_experts)

        return OwnedRecipe(
            method=self.name,
            config=self.to_dict(),
            layers=self.layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            members=lambda ffn: ([torch.arange(ffn.width)] * self.num_experts, None),
            own=Own(router, SeamOptions(dropout=self.expert_dropout), "each", self.top_k),
            check=check,
        )


def _stack_of(model: nn.Module, ffn: FFN) -> str | None:
    """Name of the part of the model that an FFN belongs to and that gets inputs of its own."""
    names = [s for s in stacks(model) if not s or ffn.name.startswith(f"{s}.")]
    return max(names, key=len, default=None)


def _require_ids(model: nn.Module, ffn: FFN) -> None:
    name = _stack_of(model, ffn)
    part = None if name is None else stacks(model)[name]
    if part is None or "input_ids" not in inspect.signature(part.forward).parameters:
        raise ModelError(
            f"{ffn.name}: it does not see tokens of a vocabulary, so that no table can say which "
            "expert they have; choose layers of a text model, or moduli.Switch, whose router looks "
            "at vectors"
        )


def _vocabulary(model: nn.Module, ffn: FFN) -> int:
    """V, the rows of the input embeddings of the stack that an FFN is in."""
    part: Any = stacks(model)[_stack_of(model, ffn) or ""]
    return int(part.get_input_embeddings().weight.shape[0])


def _counts(batches: Sequence[Batch], stack: str | None, vocabulary: int) -> Int[Tensor, " V"]:
    """How often every token of the vocabulary occurs in what one stack of a model reads."""
    counts = torch.zeros(vocabulary, dtype=torch.long)
    decodes = stack is not None and stack.endswith("decoder")
    sources = ("decoder_input_ids", "labels") if decodes else ("input_ids",)
    masked = "decoder_attention_mask" if decodes else "attention_mask"
    for batch in batches:
        ids = next((batch[name] for name in sources if batch.get(name) is not None), None)
        if ids is None:
            continue
        real = ids >= 0  # labels have -100 where there is nothing to predict
        if batch.get(masked) is not None:
            real &= batch[masked].bool()
        counts += torch.bincount(ids[real].cpu().flatten(), minlength=vocabulary)
    if not counts.any():
        raise ConfigError(
            f"table='balanced' counts tokens, and the batches have no {' or '.join(sources)}; give "
            "moduli.convert some: batch=[...], or take table='random'"
        )
    return counts
