"""The real encoder and a few dozen sentences, for tests that train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

GOOD = ("excellent", "great", "lovely", "superb", "reliable", "delightful")
BAD = ("terrible", "awful", "useless", "broken", "dreadful", "boring")
THINGS = ("camera", "phone", "film", "story", "speaker", "plot", "battery", "actor")


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """96 sentences of unequal length, half of them positive."""
    return [
        {"text": f"The {thing} is {word}" + " and I know it" * (i % 4) + ".", "label": label}
        for label, words in enumerate((BAD, GOOD))
        for i, word in enumerate(words)
        for thing in THINGS
    ]


@pytest.fixture(scope="session")
def tokenizer(minilm_path: Path) -> Any:
    """MiniLM's own tokenizer."""
    return AutoTokenizer.from_pretrained(minilm_path)


@pytest.fixture(scope="session")
def fresh_model(minilm_path: Path) -> Callable[..., nn.Module]:
    """MiniLM with a new head; the same one for the same seed."""

    def load(seed: int = 0) -> nn.Module:
        set_seed(seed)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            minilm_path, num_labels=2, dtype=torch.float32
        )
        return model

    return load
