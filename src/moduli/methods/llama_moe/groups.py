"""The groups of data for which LLaMA-MoE measures the importance of neurons, one per expert.

Letters: D width, N rows of all batches, E experts.
Source: LLaMA-MoE (EMNLP 2024), section 3.1, which clusters a pretraining sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moduli.errors import ConfigError, DataError
from moduli.surgery.inputs import Batch
from moduli.surgery.partition import Sample, kmeans_groups


def data_groups(sample: Sample, num_experts: int, seed: int) -> list[Sequence[Batch]]:
    """Batches of every group: as they were given, or rows grouped by k-means.

    Rows stay apart, as batches of one, so that each weighs the same in its group whatever its
    length: the loss of a batch is a mean over it.

    Args:
        sample: as many batches as experts, or batches of texts.
        num_experts: E.
        seed: of k-means.

    Raises:
        ConfigError: another number of batches, and they are no texts.
        DataError: fewer rows than experts.
    """
    if len(sample.batches) == num_experts:
        return [[batch] for batch in sample.batches]
    if any("input_ids" not in batch for batch in sample.batches):
        raise ConfigError(
            f"split='importance' needs one group of data per expert: give {num_experts} batches, "
            f"each a group, not {len(sample.batches)}; only texts (input_ids) can be grouped by "
            "themselves"
        )
    rows = [row for batch in sample.batches for row in rows_of(batch)]
    if len(rows) < num_experts:
        raise DataError(
            f"{len(rows)} rows cannot make {num_experts} groups of data, one per expert; give more"
        )
    embedded = torch.stack([mean_embedding(sample.model, row) for row in rows])
    groups = kmeans_groups(embedded, num_experts, seed)
    return [
        [row for row, at in zip(rows, groups.tolist(), strict=True) if at == group]
        for group in range(num_experts)
    ]


def rows_of(batch: Batch) -> list[dict[str, Any]]:
    """Every row of a batch of texts as a batch of its own."""
    count = len(batch["input_ids"])

    def row(value: Any, i: int) -> Any:
        of_rows = isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
        return value[i : i + 1] if of_rows else value

    return [{name: row(value, i) for name, value in batch.items()} for i in range(count)]


@torch.no_grad()
def mean_embedding(model: nn.Module, row: Batch) -> Float[Tensor, " D"]:
    """Mean input embedding of the real tokens of a text."""
    lookup: Any = model
    embedded = lookup.get_input_embeddings()(row["input_ids"])[0].float()
    mask = row.get("attention_mask")
    mean: Tensor = (embedded if mask is None else embedded[mask[0].bool()]).mean(0)
    return mean
