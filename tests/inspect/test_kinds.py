"""Models of every kind of task can be inspected; three real ones besides the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moduli
from moduli.data import fetch, load_task
from moduli.data.kinds import KINDS
from moduli.inspect.inspecting import inspect_model
from moduli.inspect.record import Inspection
from moduli.surgery.modular import routed_layers
from moduli.training.kinds.base import get_kind
from tests.training import tinykinds

EMOE = moduli.EMoE(num_experts=8, top_k=2, layers="all", split="contiguous")
BY_CLASS = {
    "classification": {"bad", "good"},
    "token-classification": {"JUDGE", "O"},
    "image-classification": {"no", "yes"},
    "audio-classification": {"no", "yes"},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name: str, tmp_path: Path) -> None:
    kind = get_kind(name)
    directory = str(tinykinds.write_model(name, tmp_path / "model"))
    data = tinykinds.write_rows(name, tmp_path / "data")
    task = load_task(data, kind=name, domain_column="domain", test_size=0.4)
    model = getattr(transformers, kind.auto_class).from_pretrained(
        directory, **kind.head(task.label_names)
    )
    moduli.convert(model, EMOE)
    processor = kind.load_processor(directory)
    row = next(iter(next(iter(task.domains.values())).test or ()))
    found = inspect_model(model, processor, task, max_length=24, texts=[row])
    check(found, model, experts=8, top_k=2)
    assert found.domains == tuple(task.domains)
    for layer in found.layers:
        assert set(layer.by_class) == BY_CLASS.get(name, set())
    stacks = 2 if name in ("seq2seq", "translation") else 1
    assert len(found.tokens) == stacks
    assert sum(len(trace.experts) for trace in found.tokens) == len(found.layers)
    texts = kind.columns[0] in ("text", "tokens", "source")
    assert found.tokens[0].pieces[0].isdigit() != texts
    if stacks == 2:
        assert found.overlap[0][-1] is None  # encoder and decoder see different tokens


def check(found: Inspection, model: Any, *, experts: int, top_k: int) -> None:
    """What holds for every model of ours without capacity."""
    assert [layer.name for layer in found.layers] == list(routed_layers(model))
    for layer in found.layers:
        assert (layer.num_experts, layer.active) == (experts, top_k)
        assert sum(layer.load) == pytest.approx(1)
        assert layer.load == pytest.approx(layer.mass)
        assert 0 <= layer.padding < 1
        for shares in (*layer.by_domain.values(), *layer.by_class.values()):
            assert sum(shares) == pytest.approx(1)
    for i, row in enumerate(found.overlap):
        assert row[i] == pytest.approx(1)
    assert [pattern.layer for pattern in found.activations] == list(routed_layers(model))
    for pattern in found.activations:
        original, by_expert = torch.tensor(pattern.original), torch.tensor(pattern.by_expert)
        assert torch.equal(original.sum(1), by_expert.sum(1))
        assert bool((by_expert <= torch.tensor(pattern.sizes)).all())


@pytest.mark.slow
@pytest.mark.network
def test_real_vit_on_emoji() -> None:
    path = str(fetch("vit-s"))
    task = load_task("emoji", max_test=8)
    kind = get_kind(task.kind)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        path, **kind.head(task.label_names)
    )
    moduli.convert(model, moduli.EMoE(num_experts=16, top_k=4, layers="last:2"))
    found = inspect_model(model, kind.load_processor(path), task)
    check(found, model, experts=16, top_k=4)
    assert all(layer.padding == 0 for layer in found.layers)
    # Clustered keys fire together, so blocks of experts differ more than contiguous ones.
    for pattern in found.activations:
        spread = [
            torch.tensor(one).float().std(1).mean() for one in (pattern.original, pattern.by_expert)
        ]
        assert spread[1] > spread[0]


@pytest.mark.slow
@pytest.mark.network
def test_real_smollm2_on_texts() -> None:
    path = fetch("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    moduli.convert(model, moduli.EMoE(num_experts=16, top_k=4, layers="last:2", split="contiguous"))
    rows = [{"text": "The committee met again on Monday."}, {"text": "Le comité s'est réuni."}]
    found = inspect_model(model, tokenizer, rows, texts=rows)
    check(found, model, experts=16, top_k=4)
    assert "".join(found.tokens[0].pieces).strip() == rows[0]["text"]
