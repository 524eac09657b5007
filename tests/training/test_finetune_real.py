"""Kinds other than classification on real models: they learn, routed, and with an adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moduli
from moduli.data import fetch, load_task
from moduli.training.evaluate import evaluate
from moduli.training.finetune import finetune
from moduli.training.kinds.base import get_kind
from moduli.training.settings import FinetuneSettings

PEOPLE = ("Anna", "Mr Brown", "the teacher", "Ben", "the old man")
DOES = ("quickly opens", "sees", "never buys", "finds", "slowly paints")
THINGS = ("a door", "the red house", "two apples", "a small boat")
TAGS = {
    **dict.fromkeys(("Anna", "Mr", "Brown", "Ben"), "NAME"),
    **dict.fromkeys(("the", "a", "two"), "DET"),
    **dict.fromkeys(("teacher", "man", "door", "house", "apples", "boat"), "NOUN"),
    **dict.fromkeys(("opens", "sees", "buys", "finds", "paints"), "VERB"),
    **dict.fromkeys(("quickly", "never", "slowly"), "ADV"),
    **dict.fromkeys(("old", "red", "small"), "ADJ"),
}
NAMES = tuple(sorted(set(TAGS.values())))


def sentences() -> list[dict[str, Any]]:
    """100 sentences with a tag for every word."""
    found = []
    for person in PEOPLE:
        for does in DOES:
            for thing in THINGS:
                words = f"{person} {does} {thing}".split()
                tags = [NAMES.index(TAGS[word]) for word in words]
                found.append({"tokens": words, "tags": tags})
    return found


def test_minilm_learns_to_tag_words_with_experts(minilm_path: Path) -> None:
    rows = sentences()
    assert len(rows) == 100
    kind = get_kind("token-classification")
    transformers.set_seed(0)
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        minilm_path, **kind.head(NAMES)
    )
    tokenizer = kind.load_processor(str(minilm_path))
    moduli.convert(model, moduli.EMoE(num_experts=16, top_k=8, split="contiguous"))
    test = rows[::3]  # words in other company than in training
    train = [row for i, row in enumerate(rows) if i % 3]
    before = evaluate(model, tokenizer, test, kind=kind.name).to_dict()
    settings = FinetuneSettings(
        epochs=3, batch_size=10, learning_rate=3e-4, max_length=16, bf16=False
    )
    finetune(model, tokenizer, kind.name, train, settings=settings, seed=0)
    after = evaluate(model, tokenizer, test, kind=kind.name).to_dict()
    assert after["n"] == sum(len(row["tokens"]) for row in test)
    assert before["accuracy"] < 0.6 < 0.9 < after["accuracy"]


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_learns_a_language_by_an_adapter_on_experts() -> None:
    """Manual pages in German: a decoder of English, routed, trained by LoRA alone."""
    import peft

    path = str(fetch("smollm2"))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = get_kind("language-modeling").load_processor(path)
    moduli.convert(
        model, moduli.EMoE(num_experts=16, top_k=12, split="contiguous", layers="last:2")
    )
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]),
    )
    task = load_task("brown", max_train=8, max_test=2, domains=("religion", "romance"))
    train, test = task.domains["religion"].train, task.domains["religion"].test
    assert train is not None
    assert test is not None
    cut = [{"text": row["text"][:2000]} for row in train]
    held_out = [{"text": row["text"][:1000]} for row in test]
    kind = "language-modeling"
    before = evaluate(adapted, tokenizer, held_out, kind=kind, max_length=128).to_dict()
    settings = FinetuneSettings(
        max_steps=6,
        batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_length=128,
        bf16=False,
    )
    result = finetune(adapted, tokenizer, kind, cut, settings=settings, seed=0)
    after = evaluate(adapted, tokenizer, held_out, kind=kind, max_length=128).to_dict()
    assert result.steps == 6
    assert 1.0 < after["loss"] < before["loss"] < 6.0
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))


@pytest.mark.slow
@pytest.mark.network
def test_vit_learns_groups_of_emoji_with_experts() -> None:
    """Animals and symbols in one style, tested on concepts it has not seen."""
    path = str(fetch("vit-s"))
    kind = get_kind("image-classification")
    task = load_task("emoji", domains=("noto",))
    number = {task.label_names.index(n): i for i, n in enumerate(("Animals & Nature", "Symbols"))}
    splits = task.domains["noto"]
    assert splits.train is not None
    assert splits.test is not None
    train, test = (
        [{**row, "label": number[row["label"]]} for row in part if row["label"] in number][:48]
        for part in (splits.train, splits.test)
    )
    transformers.set_seed(0)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        path, **kind.head(("animals", "symbols"))
    )
    moduli.convert(
        model, moduli.EMoE(num_experts=16, top_k=12, split="contiguous", layers="last:2")
    )
    processor = kind.load_processor(path)
    settings = FinetuneSettings(max_steps=10, batch_size=4, learning_rate=2e-5, bf16=False)
    before = evaluate(model, processor, test, kind=kind.name).to_dict()
    finetune(model, processor, kind.name, train, settings=settings, seed=0)
    after = evaluate(model, processor, test, kind=kind.name).to_dict()
    assert after["n"] == len(test)
    assert after["loss"] < before["loss"]
    assert after["balanced_accuracy"] > 0.55
