"""Tiny sources on disk, and what composing them is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moduli.surgery.compose import Source
from tests.surgery.compose.tiny_sources import tiny_source

PROMPTS = (("w3 w4 w5", "w6"), ("w20 w21",), ("w40 w41 w42",))
TOKENS = torch.arange(3, 61).view(2, 29)
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a tiny checkpoint: `make("llama", seed)`; changes of its config as keywords."""

    def write(family: str, seed: int, **changes: Any) -> Path:
        name = "-".join([family, str(seed), *(f"{k}-{v}" for k, v in changes.items())])
        return tiny_source(tmp_path / name[:60], family, seed, **changes)

    return write


def with_prompts(folders: list[Path], **changes: Any) -> list[Source]:
    """A source for each folder, with prompts of its own."""
    return [
        Source(model=str(folder), positive_prompts=prompts, **changes)
        for folder, prompts in zip(folders, PROMPTS, strict=False)
    ]


def logits(folder: Path) -> torch.Tensor:
    """Of the model that plain transformers loads from a directory; every tensor has to fit."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, as they are in its files."""
    from safetensors.torch import load_file

    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
