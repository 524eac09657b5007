"""How rows become batches: tokenised when needed, padded little, in an order that can be resumed.

B batch, S sequence
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

# Batches are cut from sorted runs of this many batches: enough that a batch holds texts of about
# one length, few enough that which texts meet in a batch still changes with every epoch.
SORTED_RUN = 8


def texts_of(rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[str] | None]:
    """The texts of rows, and their second texts if the rows have them."""
    texts: list[str] = []
    pairs: list[Any] = []
    for row in rows:
        texts.append(row["text"])
        pairs.append(row.get("text_pair"))
    return texts, (pairs if any(pair is not None for pair in pairs) else None)


def use_padding(model: nn.Module, tokenizer: Any) -> None:
    """Give a decoder's tokenizer a padding token: without one it cannot make a batch.

    The classification heads of decoders find a text's last token by the model's padding id.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = getattr(model, "config", None)
    if config is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def token_lengths(tokenizer: Any, rows: Iterable[dict[str, Any]], max_length: int) -> list[int]:
    """Length of every row in tokens, as it will be in a batch."""
    texts, pairs = texts_of(rows)
    lengths: list[int] = []
    for start in range(0, len(texts), 1000):
        part = slice(start, start + 1000)
        encoded = tokenizer(
            texts[part],
            None if pairs is None else pairs[part],
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )
        lengths += [len(ids) for ids in encoded["input_ids"]]
    return lengths


class CollateTexts:
    """Rows to one padded batch. The texts are tokenised here, so no tokenised copy is stored.

    Args:
        model: for its padding id.
        tokenizer: its tokenizer.
        max_length: longer texts are cut.
        labels: the labels of rows, if they have any.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_length: int,
        labels: Callable[[Any], Tensor],
    ) -> None:
        use_padding(model, tokenizer)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.labels = labels

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Input ids and mask `[B, S]` (S = the longest of the batch), and labels."""
        texts, pairs = texts_of(rows)
        batch: dict[str, Tensor] = dict(
            self.tokenizer(
                texts,
                pairs,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
        )
        if "label" in rows[0]:
            batch["labels"] = self.labels(rows)
        return batch


class ShuffledByLength(Sampler[int]):
    """A new random order for every epoch in which the texts of a batch have about one length.

    On short texts of mixed length this halves the padding, and with it the time. The order is a
    function of seed and epoch alone, so that a resumed run sees the batches it would have seen
    (the Trainer's own length grouping draws from the global random state, and does not).

    Args:
        lengths: length of each text, in tokens.
        batch_size: B.
        seed: any integer.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        run = self.batch_size * SORTED_RUN
        batches: list[list[int]] = []
        for start in range(0, len(order), run):
            chunk = sorted(order[start : start + run], key=lambda i: self.lengths[i])
            batches += [
                chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)
            ]
        # A short batch has to be the last one: the loader cuts the order into batches itself.
        batches.sort(key=len, reverse=True)
        full = sum(len(batch) == self.batch_size for batch in batches)
        for index in torch.randperm(full, generator=generator).tolist():
            yield from batches[index]
        for batch in batches[full:]:
            yield from batch
