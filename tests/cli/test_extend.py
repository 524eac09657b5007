"""`moduli extend`: what is written is the old model with more experts, and only they learnt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moduli.cli import main
from tests.cli import editing

Run = Callable[..., Any]
FAST = ["--max-steps", "6", "--batch-size", "8", "--max-length", "32", "--bf16", "False"]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> str:
    return editing.write_model(tmp_path_factory.mktemp("models") / "old")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return editing.task_options(tmp_path_factory.mktemp("texts"))


def tensors(directory: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model.safetensors")


def test_without_data_experts_are_added_and_nothing_is_trained(
    old: str, tmp_path: Path, run_json: Run
) -> None:
    out = tmp_path / "grown"
    options = ["--attention", "1", "--feed-forward", "3", "--start", "closed"]
    done = run_json("extend", "--json", "--model", old, "--out", str(out), *options)
    assert done["steps"] == 0
    assert done["report"]["attention"] == [5, 5]
    assert max(done["report"]["leak"]) < 0.01
    before, after = tensors(old), tensors(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[name][: len(t)]) for name, t in before.items())
    ids = torch.tensor([[2, 5, 6, 7]])
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (old, out)]
    with torch.no_grad():
        one, other = (model(ids).logits for model in models)
    assert models[1].config.n_mlp_experts == 8
    assert torch.allclose(one, other, atol=0.1)


def test_new_experts_learn_and_old_tensors_are_in_the_files_bit_for_bit(
    old: str, texts: list[str], tmp_path: Path, run_json: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--model", old, "--attention", "1", "--feed-forward", "2", *FAST, *texts]
    domains = ["--train-domain", "shop", "--replay-domain", "film", "--leakage", "1"]
    rate = ["--learning-rate", "0.03", "--start", "copy", "--noise", "0.01", "--rows", "0.001"]
    path = tmp_path / "grown"
    done = run_json("extend", "--json", *out, *domains, *rate, "--out", str(path))
    assert done["steps"] == 6
    assert done["train_domains"] == ["shop"]
    assert done["after"]["shop"]["loss"] < done["before"]["shop"]["loss"]
    before, after = tensors(old), tensors(path)
    assert all(torch.equal(t, after[name][: len(t)]) for name, t in before.items())
    assert done["unchanged_tensors"] == len(
        [n for n in before if "mask" not in n and "cum" not in n]
    )
    assert json.loads((path / "extension.json").read_text())["after"] == done["after"]
    again = run_json(
        "eval", "--json", "--dense", "--model", str(path), *texts, "--max-length", "32"
    )
    assert again["scores"] == done["after"]
    capsys.readouterr()
    assert main(["extend", *out, "--out", str(tmp_path / "shown")]) == 0
    captured = capsys.readouterr()
    assert max(map(len, captured.out.splitlines())) <= 80 + len(str(tmp_path))
    assert "perplexity" in captured.out
    assert "bit for" in captured.out
    assert "step 6/6" in captured.err


@pytest.mark.parametrize(
    ("replay", "where"), [([], "random vectors"), (["--replay-domain", "film"], "given inputs")]
)
def test_leakage_is_of_the_old_domain_or_of_nothing_that_is_learnt(
    old: str, texts: list[str], tmp_path: Path, run_json: Run, replay: list[str], where: str
) -> None:
    options = ["--model", old, "--attention", "1", *FAST, *texts, "--train-domain", "shop", *replay]
    done = run_json("extend", "--json", "--out", str(tmp_path / "grown"), *options)
    assert done["report"]["measured_on"] == where


def test_what_cannot_be_done_is_said_before_anything_is_written(
    old: str, texts: list[str], tmp_path: Path, fails: Run
) -> None:
    out = ["--out", str(tmp_path / "grown")]
    model = ["--model", old]
    assert "add 1 or more" in fails(2, "extend", *model, *out)
    assert "-2 attention" in fails(2, "extend", *model, *out, "--attention", "-2")
    assert "Did you mean 'film'" in fails(
        2, "extend", *model, *out, "--attention", "1", *texts, "--replay-domain", "fim"
    )
    leak = ["--attention", "1", "--leakage", "1"]
    assert "--replay-domain" in fails(2, "extend", *model, *out, *texts, *leak)
    assert "--data" in fails(2, "extend", *model, *out, "--attention", "1", "--rows", "1")
    lora = ["--attention", "1", "--trains", "lora"]
    assert "only new experts" in fails(2, "extend", *model, *out, *texts, *lora)
    assert "minilm is a bert model" in fails(
        3, "extend", "--model", "minilm", *out, "--attention", "1"
    )
    assert "no model './nowhere'" in fails(
        4, "extend", "--model", "./nowhere", *out, "--attention", "1"
    )
    assert not list(tmp_path.iterdir())
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert "not written by moduli" in fails(
        4, "extend", *model, "--out", str(mine), "--attention", "1"
    )
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_stopped_in_training_it_goes_on_to_the_same_weights(
    old: str, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moduli.study import extending

    options = ["--model", old, "--attention", "1", "--feed-forward", "1", *texts, *FAST]
    options += ["--train-domain", "shop", "--replay-domain", "film", "--leakage", "1"]
    options += ["--checkpoint-every", "2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(["extend", "--out", str(whole), *options]) == 0
    real = extending.finetune

    def interrupted(*args: Any, on_progress: Any, **more: Any) -> Any:
        def stop(progress: Any) -> None:
            if progress.step == 5:
                raise KeyboardInterrupt

        return real(*args, on_progress=stop, **more)

    monkeypatch.setattr(extending, "finetune", interrupted)
    assert main(["extend", "--out", str(stopped), *options]) == 130
    assert not stopped.exists()
    monkeypatch.undo()
    assert main(["extend", "--out", str(stopped), *options]) == 0
    assert json.loads((stopped / "extension.json").read_text())["resumed_from"] == 4
    one, two = tensors(stopped), tensors(whole)
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "stopped"}


def test_a_model_that_is_there_is_not_written_over(old: str, tmp_path: Path, fails: Run) -> None:
    out = ["--model", old, "--out", str(tmp_path / "grown"), "--attention", "1"]
    assert main(["extend", *out]) == 0
    assert "holds a model already (extension.json says which)" in fails(4, "extend", *out)


def test_a_tensor_that_would_have_changed_is_found(
    old: str, tmp_path: Path, fails: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moduli.models.moduleformer import grown

    def careless(model: Any) -> None:
        grown.settle(model)
        with torch.no_grad():
            model.transformer.h[1].mlpf.experts.down_proj[4, 0, 0] += 1e-7

    monkeypatch.setattr("moduli.study.extending.settle", careless)
    out = ["--out", str(tmp_path / "grown"), "--attention", "1"]
    line = fails(4, "extend", "--model", old, *out)
    assert "transformer.h.1.mlpf.experts.down_proj" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.network
def test_on_real_text_pretrained_grown_and_pruned_in_sequence(
    tmp_path: Path, run_json: Run
) -> None:
    """News from scratch, fiction by new experts alone, then without half of the experts."""
    length = ["--max-length", "64", "--bf16", "False"]
    texts = ["--data", "brown", "--domains", "news", "fiction", "--max-test", "3", *length]
    few = ["--max-train", "12", "--batch-size", "8"]
    news, both, half = (str(tmp_path / name) for name in ("news", "both", "half"))
    tiny = ["--config", "n_layer=2", "n_embd=64", "att_hidden=64", "ffd_hidden=64"]
    run_json(
        "pretrain", "--json", *texts, *few, *tiny, "--vocab-size", "512", "--max-steps", "60",
        "--train-domain", "news", "--out", news,
    )  # fmt: skip
    grown = run_json(
        "extend", "--json", "--model", news, "--out", both, "--attention", "2", "--feed-forward",
        "4", *texts, *few, "--max-steps", "60", "--learning-rate", "0.003", "--train-domain",
        "fiction", "--replay-domain", "news", "--leakage", "0.1",
    )  # fmt: skip
    assert grown["after"]["fiction"]["loss"] < grown["before"]["fiction"]["loss"]
    old, new = tensors(news), tensors(both)
    assert all(torch.equal(t, new[name][: len(t)]) for name, t in old.items())
    done = run_json("prune", "--json", "--model", both, "--out", half, *texts[:-2], "--keep", "0.5")
    assert done["before"] == grown["after"]
    assert done["report"]["parameters"][1] < done["report"]["parameters"][0]
