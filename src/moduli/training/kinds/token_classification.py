"""A tag for every word of a sentence.

Words are cut into pieces by the tokenizer; the first piece of a word carries its tag and the
others none (-100). Sentences too long for the model are cut between words, so every word is
tagged once.

    M words
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moduli.errors import ModelError
from moduli.training.batches import use_padding
from moduli.training.kinds import per_class, per_token
from moduli.training.kinds.base import Examples, Output, TaskKind
from moduli.training.metrics import LOSS, Metric, Scores


@dataclass(frozen=True)
class TagScores(Scores):
    """`n` is the number of words; accuracy and macro-F1 (over the tags that occur) in [0, 1]."""

    accuracy: float
    macro_f1: float
    loss: float


def _load_tokenizer(path: str) -> Any:
    """A tokenizer that takes words: byte-level ones have to put the space before each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if getattr(tokenizer, "add_prefix_space", None) is False:
        tokenizer = AutoTokenizer.from_pretrained(path, add_prefix_space=True)
    return tokenizer


def _prepare(tokenizer: Any, rows: Any, max_length: int) -> Examples:
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} does not say which piece belongs to which word; tagging "
            "needs a fast tokenizer (a tokenizer.json)."
        )
    room = max_length - tokenizer.num_special_tokens_to_add()
    items, lengths, origin = [], [], []
    for number, row in enumerate(rows):
        words = list(row["tokens"])
        sizes = [0] * len(words)
        encoded = tokenizer(words, is_split_into_words=True, add_special_tokens=False)
        for word in encoded.word_ids():
            sizes[word] += 1
        # a word without pieces, such as a lone control character, still gets a tag
        words = [w if size else _stand_in(tokenizer) for w, size in zip(words, sizes, strict=True)]
        start = used = 0
        for i, size in enumerate([*(max(1, size) for size in sizes), room + 1]):
            if used + size > room and used:
                item = {"tokens": words[start:i]}
                if "tags" in row:
                    item["tags"] = list(row["tags"][start:i])
                items.append(item)
                lengths.append(min(used, room))
                origin.append(number)
                start, used = i, 0
            used += size
    return Examples(items, lengths, origin)


def _stand_in(tokenizer: Any) -> str:
    return str(tokenizer.unk_token or "?")


def _collator(model: Any, tokenizer: Any, max_length: int) -> Callable[[Any], dict[str, Tensor]]:
    use_padding(model, tokenizer)

    def collate(items: Any) -> dict[str, Tensor]:
        """Ids, mask and labels `[B, S]`; words without known tag are labelled 0 to be tagged."""
        encoded = tokenizer(
            [item["tokens"] for item in items],
            is_split_into_words=True,
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        batch: dict[str, Tensor] = dict(encoded)
        labels = batch["input_ids"].new_full(batch["input_ids"].shape, -100)
        for i, item in enumerate(items):
            last = None
            for position, word in enumerate(encoded.word_ids(i)):
                if word is not None and word != last:
                    labels[i, position] = int(item["tags"][word]) if "tags" in item else 0
                last = word
        return {**batch, "labels": labels}

    return collate


def _score(outputs: Sequence[Output], examples: Examples, rows: Any) -> TagScores:
    from sklearn.metrics import f1_score

    found = per_token.joined(outputs)
    truth, predicted = found["target"], found["predicted"]
    return TagScores(
        n=len(truth),
        accuracy=float((truth == predicted).double().mean()),
        macro_f1=float(
            f1_score(truth.numpy(), predicted.numpy(), average="macro", zero_division=0)
        ),
        loss=float(found["nll"].double().mean()),
    )


def _describe(
    model: Any, processor: Any, rows: Any, examples: Examples, outputs: Sequence[Output]
) -> list[dict[str, Any]]:
    names = per_class.class_names(model)
    tags: list[list[str]] = [[] for _ in rows]
    for row, output in zip(examples.origin, outputs, strict=True):
        tags[row] += [names[i] for i in output["predicted"].tolist()]
    return [
        {"tokens": list(row["tokens"]), "tags": found}
        for row, found in zip(rows, tags, strict=True)
    ]


KIND = TaskKind(
    name="token-classification",
    auto_class="AutoModelForTokenClassification",
    noun="a tagger of words",
    columns=("tokens", "tags"),
    metrics=(
        Metric("accuracy", "accuracy"),
        Metric(
            "macro_f1",
            "macro-F1",
            note="The mean of the F1 of the tags: rare tags count as much as common ones.",
        ),
        LOSS,
    ),
    load_processor=_load_tokenizer,
    head=per_class.named_head,
    prepare=_prepare,
    collator=_collator,
    reduction="tokens",
    score=_score,
    decide=lambda output: output["predicted"],
    describe=_describe,
    loss=per_token.token_loss,
    example=lambda text: {"tokens": text.split()},
)
