"""What people use with a language model: a tokenizer by name, pipelines, an evaluation harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, pipeline

from tests.models.moduleformer import small

LETTERS = [*"abcdefghijklmnopqrstuvwxyz .,?!", "Ġ", "Ċ"]
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and the files of a byte-level tokenizer, as a published checkpoint has them."""
    path = tmp_path_factory.mktemp("whole")
    small.build().save_pretrained(path)
    words = [*LETTERS, "th", "the", "Ġthe", END]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n")
    return path


def test_a_tokenizer_by_the_files_of_gpt2(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert isinstance(tokenizer, GPT2Tokenizer)
    assert tokenizer.tokenize("on the sea") == ["o", "n", "Ġthe", "Ġ", "s", "e", "a"]
    assert tokenizer.decode(tokenizer("on the sea")["input_ids"]) == "on the sea"
    assert tokenizer.eos_token == END


def test_text_generation(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    write = pipeline("text-generation", model=str(directory), device="cpu")
    tokenizer = write.tokenizer
    tokenizer.pad_token = END
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    texts = ["on the sea", "the end"]
    found = write(texts, batch_size=2, return_full_text=False, **settings)
    model = AutoModelForCausalLM.from_pretrained(directory)
    for text, out in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")
        new = model.generate(**ids, pad_token_id=0, **settings)[0, ids["input_ids"].shape[1] :]
        assert out[0]["generated_text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert "not supported" not in caplog.text


def test_classification(directory: Path, tmp_path: Path) -> None:
    from moduli.models.moduleformer import ModuleFormerForSequenceClassification as Classifier

    model = small.build(auto=Classifier, num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = END
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    judge = pipeline("text-classification", model=str(tmp_path), device="cpu", top_k=None)
    texts = ["on the sea", "end"]
    for text, scores in zip(texts, judge(texts, batch_size=2), strict=True):
        with torch.no_grad():
            probs = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        for entry in scores:
            place = model.config.label2id[entry["label"]]
            assert entry["score"] == pytest.approx(float(probs[place]), abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_the_evaluation_harness_on_a_local_task(directory: Path, tmp_path: Path) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator", reason="lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"text": "on the ", "choices": ["sea", "end"], "right": i % 2} for i in range(6)] + [
        {"text": "the end ", "choices": ["of the sea", "a"], "right": 0}
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task: dict[str, Any] = {
        "task": "a_local_task",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    model, tokenizer = (
        kind.from_pretrained(directory) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    tokenizer.pad_token = END
    found = evaluator.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=64),
        tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip

    def likelihood(text: str, choice: str) -> float:
        start, ids = (
            len(tokenizer(text)["input_ids"]),
            tokenizer(text + choice, return_tensors="pt"),
        )
        scores = model(**ids).logits[0].log_softmax(-1)
        target = ids["input_ids"][0, start:]
        return float(scores[start - 1 : -1].gather(1, target[:, None]).sum())

    with torch.no_grad():
        best = [
            max((0, 1), key=lambda i: likelihood(row["text"], row["choices"][i])) for row in rows
        ]
    right = sum(b == row["right"] for b, row in zip(best, rows, strict=True)) / len(rows)
    assert found["results"]["a_local_task"]["acc,none"] == pytest.approx(right)
