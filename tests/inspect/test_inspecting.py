"""Inspecting models on data: the real encoder, and tiny models of every kind."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import moduli
from moduli.errors import ConfigError, DataError, ModelError
from moduli.inspect.activations import evenly
from moduli.inspect.inspecting import inspect_model
from moduli.inspect.record import Inspection
from moduli.surgery.modular import routed_layers
from tests import families
from tests.study.conftest import make_task

EXPERTS = 16


@pytest.fixture(scope="module")
def encoder(minilm_path: Path) -> tuple[Any, Any]:
    """The real encoder with the FFNs of two layers split, and its tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path, num_labels=2)
    moduli.convert(model, moduli.EMoE(num_experts=EXPERTS, top_k=4, layers="last:2"))
    return model.eval(), AutoTokenizer.from_pretrained(minilm_path)


@pytest.fixture(scope="module")
def found(encoder: tuple[Any, Any]) -> Inspection:
    model, tokenizer = encoder
    return inspect_model(
        model, tokenizer, make_task(), max_length=16, texts=[{"text": "The unbelievable plot"}]
    )


def test_shares_add_up(found: Inspection) -> None:
    assert found.domains == ("shop", "film", "food")
    assert found.classes == ("bad", "good")
    assert len(found.layers) == 2
    for layer in found.layers:
        assert (layer.num_experts, layer.top_k, layer.active) == (EXPERTS, 4, 4.0)
        for shares in (layer.load, layer.mass, *layer.by_domain.values(), *layer.by_class.values()):
            assert sum(shares) == pytest.approx(1)
            assert len(shares) == EXPERTS
        assert set(layer.by_domain) == set(found.domains)
        assert set(layer.by_class) == set(found.classes)
        assert layer.load == layer.mass  # EMoE adds experts with weight 1
        assert 0 < layer.padding < 0.5
        assert layer.coselection is not None
        chosen = [layer.coselection[e][e] for e in range(EXPERTS)]
        assert sum(chosen) == pytest.approx(4)
        assert chosen == pytest.approx([4 * share for share in layer.load])
        assert layer.quality is not None
        assert 0 < layer.quality["share"] < 1
        assert layer.duplicates == ()
        assert layer.entropy is not None
        assert 0 < layer.entropy <= 1
    assert found.overlap[0][0] == pytest.approx(1)
    assert found.overlap[0][1] == found.overlap[1][0]
    (_, by_chance), _ = found.overlap_by_chance
    assert by_chance is not None
    assert 0 < by_chance < 1


def test_tokens_are_those_of_the_texts(found: Inspection, encoder: tuple[Any, Any]) -> None:
    _, tokenizer = encoder
    task = make_task()
    texts = [row["text"] for splits in task.domains.values() for row in splits.test or ()]
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=16)["input_ids"]]
    assert {layer.tokens for layer in found.layers} == {sum(lengths)}


def test_a_text_is_followed(found: Inspection) -> None:
    (trace,) = found.tokens
    assert trace.pieces[0] == "[CLS]"
    assert "".join(trace.pieces[2:-1]).replace("##", "").replace(" ", "") == "unbelievableplot"
    for layer in found.layers:
        assert [len(experts) for experts in trace.experts[layer.name]] == [4] * len(trace.pieces)
        assert {w for row in trace.weights[layer.name] for w in row} == {1.0}


def test_activation_pattern(found: Inspection, encoder: tuple[Any, Any]) -> None:
    layers = routed_layers(encoder[0])
    for pattern in found.activations:
        assert pattern.sizes == layers[pattern.layer].sizes
        assert 0 < len(pattern.original) <= 320
        for one, other in zip(pattern.original, pattern.by_expert, strict=True):
            assert sum(one) == sum(other)  # the same neurons in another order
        # Clusters of alike keys gather what contiguous blocks scatter.
        assert _unevenness(pattern.by_expert) > _unevenness(pattern.original)


def _unevenness(rows: tuple[tuple[int, ...], ...]) -> float:
    return float(torch.tensor(rows).float().std(dim=1).mean())


def test_json_keeps_it(found: Inspection, tmp_path: Path) -> None:
    found.write(tmp_path / "inspection.json")
    read = Inspection.read(tmp_path / "inspection.json")
    assert read.to_dict() == found.to_dict()
    assert read.layers[0].load == pytest.approx(found.layers[0].load, rel=1e-4)


def test_order_of_rows_does_not_matter(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    rows = [row for splits in make_task().domains.values() for row in splits.test or ()]
    one, other = (
        inspect_model(model, tokenizer, some, max_length=16, activations=False)
        for some in (rows, rows[::-1])
    )
    for a, b in zip(one.layers, other.layers, strict=True):
        assert (a.tokens, a.load, a.coselection) == (b.tokens, b.load, b.coselection)
        assert a.entropy == pytest.approx(b.entropy)


def test_padding_is_never_counted(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    short, long = {"text": "good"}, {"text": "The story was long , very long and superb"}
    together = inspect_model(model, tokenizer, [short, long], max_length=16)
    alone = [inspect_model(model, tokenizer, [row], max_length=16) for row in (short, long)]
    for layer, *parts in zip(together.layers, *(one.layers for one in alone), strict=True):
        tokens = [part.tokens for part in parts]
        assert layer.tokens == sum(tokens)
        assert layer.padding > 0
        assert [part.padding for part in parts] == [0, 0]
        load = torch.tensor([part.load for part in parts]) * torch.tensor(tokens)[:, None]
        assert layer.load == pytest.approx((load.sum(0) / sum(tokens)).tolist(), abs=1e-6)


def test_the_model_is_as_before(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    model.train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inspect_model(model, tokenizer, [{"text": "good"}])
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_splits_and_rows_are_limited(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    options: dict[str, Any] = {"max_length": 16, "activations": False, "coselection": False}
    few = inspect_model(model, tokenizer, make_task(), max_rows=1, split="all", **options)
    assert few.layers[0].tokens < 3 * 16
    assert few.layers[0].coselection is None
    assert few.activations == ()
    alone = inspect_model(model, tokenizer, texts=[{"text": "good"}])
    assert (alone.layers, len(alone.tokens)) == ((), 1)
    assert inspect_model(model, tokenizer, [], texts=[{"text": "good"}]) == alone


def test_bad_input(encoder: tuple[Any, Any], minilm_path: Path) -> None:
    model, tokenizer = encoder
    with pytest.raises(ConfigError, match="no split 'dev'"):
        inspect_model(model, tokenizer, make_task(), split="dev")
    with pytest.raises(ConfigError, match="max_rows is 0"):
        inspect_model(model, tokenizer, make_task(), max_rows=0)
    with pytest.raises(DataError, match="nothing to run"):
        inspect_model(model, tokenizer)
    unsplit = {
        name: dataclasses.replace(splits, test=None, validation=None)
        for name, splits in make_task().domains.items()
    }
    only_train = dataclasses.replace(make_task(), domains=unsplit)
    with pytest.raises(DataError, match="rows in its test split; there is train, or all"):
        inspect_model(model, tokenizer, only_train)
    with pytest.raises(ModelError, match=r"leave `moduli\.dense`"), moduli.dense(model):
        inspect_model(model, tokenizer, [{"text": "good"}])
    bare = AutoModel.from_pretrained(minilm_path)
    with pytest.raises(ModelError, match="no experts to look at"):
        inspect_model(bare, tokenizer, [{"text": "good"}])
    moduli.convert(bare, moduli.EMoE(num_experts=4, top_k=2, split="contiguous"))
    with pytest.raises(ConfigError, match="give kind="):
        inspect_model(bare, tokenizer, [{"text": "good"}])
    assert inspect_model(bare, tokenizer, [{"text": "good"}], kind="classification").layers


@pytest.mark.parametrize("name", families.MOE)
def test_stock_load_is_that_of_the_router_logits(name: str, minilm_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    model = families.moe(name, len(tokenizer))
    rows = [{"text": "a very long and winding story"}, {"text": "short"}]
    found = inspect_model(model, tokenizer, rows)
    expected = [torch.zeros(4), torch.zeros(4)]
    entropy = [0.0, 0.0]
    tokens = 0
    for row in rows:  # one by one, so that nothing is padding
        batch = tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False)
        tokens += batch["input_ids"].numel()
        with torch.no_grad():
            logits = model(**batch, output_router_logits=True).router_logits
        for i, one in enumerate(logits):
            expected[i] += torch.bincount(one.topk(2).indices.flatten(), minlength=4)
            entropy[i] += float(torch.special.entr(one.softmax(-1)).sum()) / math.log(4)
    for layer, counts, total in zip(found.layers, expected, entropy, strict=True):
        assert layer.tokens == tokens
        assert layer.load == pytest.approx((counts / counts.sum()).tolist())
        assert layer.entropy == pytest.approx(total / tokens, rel=1e-4)
        assert layer.quality is None


def test_places_are_evenly_spaced() -> None:
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(10, 5) == [0, 2, 4, 6, 8]
