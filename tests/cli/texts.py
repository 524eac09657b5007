"""A small file of texts in two domains, and a model small enough to learn them in seconds."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

WORDS = {
    "farm": (("old", "young", "brown"), ("horse", "cow", "goat"), ("barn", "field", "yard")),
    "town": (("tall", "busy", "grey"), ("clerk", "baker", "judge"), ("shop", "street", "court")),
}
FAST = ("--vocab-size", "320", "--max-steps", "30", "--batch-size", "8", "--max-length", "32")
FAST = (*FAST, "--bf16", "False", "--learning-rate", "1e-2")
TINY = ("n_layer=2", "n_embd=32", "att_hidden=32", "ffd_hidden=24", "gating_size=16")
TINY = (*TINY, "n_att_experts=4", "n_mlp_experts=6")


def write_texts(path: Path) -> list[str]:
    """Write them, and return the options by which commands read them."""
    with path.open("w", encoding="utf-8") as file:
        for domain, words in WORDS.items():
            for how, who, where in product(*words):
                text = f"The {how} {who} sleeps in the {where}. The {who} is {how}."
                file.write(json.dumps({"text": text, "place": domain}) + "\n")
    return ["--data", f"jsonl:{path}", "--domain-column", "place"]
