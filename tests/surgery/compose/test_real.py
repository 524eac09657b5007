"""SmolLM2 with two light fine-tunes, on Python and on film reviews, as one Mixtral."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moduli
from moduli.data import fetch, load_task
from moduli.surgery.compose import Source

LENGTH = 48


def code() -> list[str]:
    """Functions of the standard library, as text."""
    tree = ast.parse(inspect.getsource(textwrap) + inspect.getsource(copy) + inspect.getsource(ast))
    found = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    return [text for text in found if len(text) > 200][:48]


def reviews() -> list[str]:
    """Film reviews, several sentences to a text."""
    rows = load_task("sentiment", domains=("movie",)).domains["movie"].train
    texts = [row["text"] for row in rows]
    return [" ".join(texts[i : i + 4]) for i in range(0, 192, 4)]


def batch(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = len(ids) // LENGTH
    return torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)


def fine_tune(path: Path, ids: torch.Tensor, out: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    trained = [p for n, p in model.named_parameters() if ".mlp." in n]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    for rows in ids[:80].split(4):
        model(rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(out)
    return out


@torch.no_grad()
def loss(model: Any, ids: torch.Tensor) -> float:
    return float(model(ids, labels=ids).loss)


@pytest.mark.slow
@pytest.mark.network
def test_two_fine_tunes_of_smollm2(tmp_path: Path) -> None:
    base = fetch("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = {"code": code(), "reviews": reviews()}
    train = {name: batch(tokenizer, rows[:32]) for name, rows in texts.items()}
    test = {name: batch(tokenizer, rows[32:])[:24] for name, rows in texts.items()}
    experts = [
        Source(
            model=str(fine_tune(base, train[name], tmp_path / name)),
            positive_prompts=tuple(text[:200] for text in texts[name][:8]),
        )
        for name in texts
    ]
    report = moduli.compose(base, experts, tmp_path / "both", top_k=1, gate="ffn_input")
    assert max(report.dropped) == 0
    both = AutoModelForCausalLM.from_pretrained(tmp_path / "both", dtype=torch.float32).eval()
    assert type(both).__name__ == "MixtralForCausalLM"
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in (("base", base), *((n, tmp_path / n) for n in texts))
    }
    for name, ids in test.items():
        losses = {n: loss(model, ids) for n, model in models.items()} | {"both": loss(both, ids)}
        assert losses[name] < losses["base"], "the fine-tune learnt nothing"
        other = next(n for n in texts if n != name)
        assert losses["both"] < losses["base"]
        assert losses["both"] < losses[other]
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = both.generate(**ids, do_sample=False, max_new_tokens=12)
    assert "Paris" in tokenizer.decode(out[0])
