"""Each kind of task trains on what it should: every token once, no batch weighing more than it is
large, no peeking, labels where they belong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moduli.data import load_task
from moduli.data.kinds import KINDS
from moduli.errors import ConfigError, DataError, ModelError, UnknownNameError
from moduli.training.evaluate import evaluate, outputs_of
from moduli.training.finetune import finetune
from moduli.training.kinds.base import get_kind
from moduli.training.settings import FinetuneSettings
from tests.training import tinykinds

GOOD = "the camera was great"


def load(kind: str, root: Path) -> tuple[Any, Any, Any]:
    """A model with a new head, its processor, and the rows of the training split."""
    task = load_task(tinykinds.write_rows(kind, root / "data"), kind=kind)
    path = str(tinykinds.write_model(kind, root / "base"))
    record = get_kind(kind)
    transformers.set_seed(0)
    auto = getattr(transformers, record.auto_class)
    model = auto.from_pretrained(path, **record.head(task.label_names))
    return model, record.load_processor(path), task.domains["all"].train


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_step_like_one_large_batch(kind: str, tmp_path: Path) -> None:
    """Also where micro-batches differ in how many tokens they hold."""

    def gradients(batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
        model, processor, train = load(kind, tmp_path / str(accumulation))
        settings = FinetuneSettings(
            max_steps=1,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=1e9,  # clipping would hide a factor
            warmup=0.0,
            bf16=False,
        )
        found: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: found.__setitem__(name, p.grad.clone())
            )
        rows = [train[i] for i in range(16)]
        finetune(model, processor, kind, rows, settings=settings, seed=0)
        return found

    large, small = gradients(16, 1), gradients(4, 4)
    assert large.keys() == small.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in large.values())
    for name, gradient in large.items():
        torch.testing.assert_close(small[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind: str, tmp_path: Path) -> None:
    model, processor, train = load(kind, tmp_path)
    rows = [train[i] for i in range(16)]
    primary = get_kind(kind).primary
    settings = FinetuneSettings(
        max_steps=40, batch_size=8, learning_rate=1e-2, warmup=0.1, bf16=False
    )
    before = evaluate(model, processor, rows, kind=kind).to_dict()
    result = finetune(model, processor, kind, rows, settings=settings, seed=0)
    after = evaluate(model, processor, rows, kind=kind).to_dict()
    assert sum(result.losses[-5:]) < 0.9 * sum(result.losses[:5])
    if primary.higher_is_better:
        assert after[primary.name] >= before[primary.name]
    else:
        assert after[primary.name] < before[primary.name]


def test_the_kinds_of_data_and_of_training_are_the_same() -> None:
    for name, data in KINDS.items():
        kind = get_kind(name)
        assert kind.name == name
        needed = {cell.name for cell in data.columns} - {"text_pair"}
        assert set(kind.columns) == needed
        assert kind.metric(kind.primary.name) == kind.primary
        with pytest.raises(UnknownNameError, match="no metric 'acuracy'"):
            kind.metric("acuracy")
    with pytest.raises(ConfigError, match="Did you mean 'regression'"):
        get_kind("regresion")


def test_every_token_is_predicted_once_and_from_its_own_text_only(tmp_path: Path) -> None:
    model, tokenizer, _ = load("language-modeling", tmp_path)
    texts = ["the camera was great and very truly great and broken", "the plot was awful", "was"]
    rows = [{"text": text} for text in texts]
    kind = get_kind("language-modeling")
    examples, outputs = outputs_of(kind, model, tokenizer, rows, max_length=5)
    assert max(examples.lengths) == 5
    for number, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        targets = [
            o["target"] for at, o in zip(examples.origin, outputs, strict=True) if at == number
        ]
        assert torch.cat(targets).tolist() == ids[1:]
    # What the model is asked in a window is what plain transformers answers to that window alone.
    with torch.no_grad():
        window = torch.tensor([tokenizer(texts[1])["input_ids"][:5]])
        loss = model(input_ids=window, labels=window).loss
    at = list(examples.origin).index(1)
    torch.testing.assert_close(outputs[at]["nll"].mean(), loss, rtol=1e-4, atol=1e-5)


def test_perplexity_is_the_exponential_of_the_loss_per_token(tmp_path: Path) -> None:
    model, tokenizer, train = load("language-modeling", tmp_path)
    rows = [train[i] for i in range(7)]
    scores = evaluate(model, tokenizer, rows, kind="language-modeling").to_dict()
    total, count = 0.0, 0
    for row in rows:
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        total, count = total + float(loss) * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert scores["n"] == count
    assert scores["loss"] == pytest.approx(total / count, rel=1e-4)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))


def test_an_encoder_that_sees_the_answer_is_no_language_model(tmp_path: Path) -> None:
    path = str(tinykinds.write_model("classification", tmp_path))
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    with pytest.raises(ModelError, match="to the right"):
        evaluate(model, tokenizer, [{"text": GOOD}], kind="language-modeling")


def test_the_first_piece_of_a_word_carries_its_tag_and_no_word_is_lost(tmp_path: Path) -> None:
    model, tokenizer, _ = load("token-classification", tmp_path)
    kind = get_kind("token-classification")
    words = ["the", "xyz", "\u200b", *["camera", "qq"] * 5, "a" * 30, "was"]
    tags = [i % 2 for i in range(len(words))]
    rows = [{"tokens": words, "tags": tags}, {"tokens": ["was"], "tags": [1]}]
    examples, outputs = outputs_of(kind, model, tokenizer, rows, max_length=8)
    first = [o["target"] for at, o in zip(examples.origin, outputs, strict=True) if at == 0]
    assert len(first) > 3  # it did not fit into one window
    assert torch.cat(first).tolist() == tags
    batch = kind.collator(model, tokenizer, 16)([{"tokens": ["xyz", "was"], "tags": [1, 0]}])
    pieces = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert pieces == ["[BOS]", "x", "##y", "##z", "was", "[EOS]"]
    assert batch["labels"][0].tolist() == [-100, 1, -100, -100, 0, -100]


def test_the_decoder_never_sees_the_token_it_is_to_write(tmp_path: Path) -> None:
    model, tokenizer, _ = load("seq2seq", tmp_path)
    collate = get_kind("seq2seq").collator(model, tokenizer, 16)
    batch = collate([{"source": GOOD, "target": "camera great"}, {"source": GOOD, "target": ""}])
    start = model.config.decoder_start_token_id
    for inputs, labels in zip(batch["decoder_input_ids"], batch["labels"], strict=True):
        assert inputs[0] == start
        assert inputs[1:].tolist() == labels[:-1].clamp(min=0).tolist()
    assert (batch["labels"] == -100).any()


def test_multilabel_scores_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.metrics import f1_score

    model, tokenizer, train = load("multilabel", tmp_path)
    rows = [train[i] for i in range(12)]
    kind = get_kind("multilabel")
    examples, outputs = outputs_of(kind, model, tokenizer, rows)
    scores = kind.score(outputs, examples, rows).to_dict()
    predicted = torch.stack([o["logits"] for o in outputs]) > 0
    truth = torch.tensor([[label in row["label"] for label in range(3)] for row in rows])
    for average in ("micro", "macro"):
        expected = f1_score(truth, predicted, average=average, zero_division=0)
        assert scores[f"{average}_f1"] == pytest.approx(expected)
    assert scores["subset_accuracy"] == (truth == predicted).all(1).double().mean()
    with pytest.raises(DataError, match="has 3 labels"):
        evaluate(model, tokenizer, [{"text": GOOD, "label": [3]}], kind="multilabel")


def test_correlations_that_do_not_exist_are_not_numbers(tmp_path: Path) -> None:
    model, tokenizer, _ = load("regression", tmp_path)
    same = [{"text": GOOD, "label": 1.0}] * 3
    scores = evaluate(model, tokenizer, same, kind="regression").to_dict()
    assert math.isnan(scores["pearson"])
    assert math.isfinite(scores["mse"])


def test_missing_columns_are_named_per_kind(tmp_path: Path) -> None:
    model, tokenizer, _ = load("token-classification", tmp_path)
    with pytest.raises(DataError, match="'tags'"):
        finetune(
            model,
            tokenizer,
            "token-classification",
            [{"tokens": ["a"]}],
            settings=FinetuneSettings(max_steps=1),
            seed=0,
        )
