"""A tiny ModuleFormer directory and texts in two domains, for the commands that change experts."""

from __future__ import annotations

from pathlib import Path

from tests.models.moduleformer import small
from tests.training import tinykinds

DOMAINS = ("film", "shop")


def write_model(directory: Path) -> str:
    tokenizer = tinykinds.tokenizer()
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    model = small.build(vocab_size=len(tokenizer), gating_size=64, **special)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def task_options(directory: Path) -> list[str]:
    data = tinykinds.write_rows("language-modeling", directory)
    return ["--data", data, "--domain-column", "domain"]
