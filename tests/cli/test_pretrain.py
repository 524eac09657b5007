"""`moduli pretrain`: an ordinary directory, the same one after an interruption, clear refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from moduli.cli import main
from moduli.data.task import Task
from moduli.errors import ConfigError
from moduli.study.language import as_texts
from tests.cli.texts import FAST, TINY, write_texts

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a small file of texts in two domains."""
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="module")
def trained(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that `moduli pretrain` wrote."""
    out = tmp_path_factory.mktemp("trained") / "model"
    assert main(["pretrain", "--out", str(out), *texts, *FAST, "--config", *TINY]) == 0
    return out


def test_plain_transformers_loads_it_and_it_has_learnt(trained: Path, texts: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert type(model).__name__ == "ModuleFormerForCausalLM"
    assert model.config.vocab_size == len(tokenizer)
    record = json.loads((trained / "pretraining.json").read_text())
    assert set(record["scores"]) == {"farm", "town"}
    for score in record["scores"].values():
        assert score["loss"] < 0.8 * math.log(len(tokenizer))
        assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
    assert not list(trained.parent.glob(".*"))


def test_bits_per_byte_count_every_byte_of_a_text(trained: Path) -> None:
    from moduli.study.language import domain_scores

    model = AutoModelForCausalLM.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    text = "the old horse sleeps in the barn"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    nats = -logs.gather(1, ids[0, 1:, None]).sum()
    found = domain_scores(model, tokenizer, Dataset.from_dict({"text": [text]}), 64)
    assert found["bits_per_byte"] == pytest.approx(
        float(nats) / math.log(2) / len(text.encode()), rel=1e-5
    )


def test_load_of_every_router_sums_to_one(trained: Path) -> None:
    record = json.loads((trained / "pretraining.json").read_text())
    assert list(record["load"]) == ["0.attention", "0.ffn", "1.attention", "1.ffn"]
    for name, load in record["load"].items():
        assert len(load) == (4 if name.endswith("attention") else 6)
        assert sum(load) == pytest.approx(1)


def test_other_commands_read_as_much_at_once_as_training_did(
    trained: Path, texts: list[str], run_json: Run
) -> None:
    record = json.loads((trained / "pretraining.json").read_text())
    found = run_json("eval", "--json", "--model", str(trained), *texts)["scores"]
    for name, score in found.items():
        assert score["loss"] == pytest.approx(record["scores"][name]["loss"])
        assert score["n"] == record["scores"][name]["n"]


def test_a_named_task_of_another_kind_is_read_as_texts(trained: Path, run_json: Run) -> None:
    few = ["--domains", "amazon", "--max-test", "4"]
    found = run_json("eval", "--json", "--model", str(trained), "--data", "sentiment", *few)
    assert set(found["scores"]["amazon"]) == {"n", "loss", "perplexity", "accuracy"}
    with pytest.raises(ConfigError, match=r"'tagged' is a task of token-class.* has none"):
        as_texts(Task("tagged", "token-classification", ("noun",), {}))


def test_the_same_command_again_finds_the_finished_run(
    trained: Path, texts: list[str], run_json: Run
) -> None:
    before = (trained / "model.safetensors").stat().st_mtime_ns
    again = ["pretrain", "--json", "--out", str(trained), *texts, *FAST, "--config", *TINY]
    result = run_json(*again)
    assert result["directory"] == str(trained)
    assert (trained / "model.safetensors").stat().st_mtime_ns == before


def test_another_run_does_not_overwrite_it(trained: Path, texts: list[str], fails: Run) -> None:
    other = ["--seed", "1", "--config", *TINY]
    assert "seed differs" in fails(4, "pretrain", "--out", str(trained), *texts, *FAST, *other)


def test_an_interrupted_run_goes_on_to_the_same_weights(
    trained: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moduli.training import finetune

    out = tmp_path / "model"
    command = ["pretrain", "--out", str(out), *texts, *FAST, "--config", *TINY]
    command += ["--checkpoint-every", "5"]
    real = finetune.finetune

    def interrupted(*args: Any, on_progress: Any, **more: Any) -> Any:
        def stop(progress: Any) -> None:
            if progress.step == 8:
                raise KeyboardInterrupt

        return real(*args, on_progress=stop, **more)

    monkeypatch.setattr(finetune, "finetune", interrupted)
    assert main(command) == 130
    assert not out.exists()
    monkeypatch.undo()
    assert main(command) == 0
    assert json.loads((out / "pretraining.json").read_text())["resumed_from"] == 5
    one, two = (AutoModelForCausalLM.from_pretrained(d).state_dict() for d in (out, trained))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_one_domain_to_train_on_and_a_dense_model(
    texts: list[str], tmp_path: Path, run_json: Run
) -> None:
    out = ["--out", str(tmp_path / "dense"), "--architecture", "dense", "--train-domain", "farm"]
    found = run_json("pretrain", "--json", *out, *texts, *FAST, "--config", *TINY)
    scores = found["scores"]
    assert scores["farm"]["loss"] < scores["town"]["loss"]
    assert found["load"] == {}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config.model_type == "llama"


@pytest.mark.parametrize(
    ("status", "options", "said"),
    [
        (2, ["--config", "n_layers=2"], "'n_layer'"),
        (2, ["--config", "n_layer"], "NAME=VALUE"),
        (2, ["--config", "k_att=20"], "k_att is 20"),
        (2, ["--config", "vocab_size=500"], "--vocab-size"),
        (2, ["--architecture", "dense", "--config", "gate_type=gmm"], "has no use for"),
        (2, ["--vocab-size", "100"], "258"),
        (2, ["--architecture", "dense", "--config", "n_embd=0"], "n_embd is 0"),
        (2, ["--architecture", "dense", "--config", "n_embd=abc"], "n_embd is 'abc'"),
        (2, ["--checkpoint-every", "0"], "checkpoint_every is 0"),
        (2, ["--train-domain", "sea"], "farm, town"),
    ],
)
def test_what_cannot_work_is_said(
    status: int, options: list[str], said: str, texts: list[str], tmp_path: Path, fails: Run
) -> None:
    out = tmp_path / "out"
    assert said in fails(status, "pretrain", "--out", str(out), *texts, *options)
    assert not out.exists()


def test_a_directory_that_is_not_ours_is_left_alone(
    texts: list[str], tmp_path: Path, fails: Run
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "pretraining.json" in fails(4, "pretrain", "--out", str(tmp_path), *texts)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "pretraining.json").write_text("{}")
    assert "not a model that was" in fails(4, "pretrain", "--out", str(tmp_path), *texts)
