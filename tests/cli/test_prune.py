"""`moduli prune`: the use of experts is measured, the least used go, scores are told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from moduli.cli import main
from tests.cli import editing

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> str:
    return editing.write_model(tmp_path_factory.mktemp("models") / "old")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return editing.task_options(tmp_path_factory.mktemp("texts"))


def test_half_of_the_experts(
    old: str, texts: list[str], tmp_path: Path, run_json: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "half"
    done = run_json("prune", "--json", "--model", old, "--out", str(out), *texts, "--keep", "0.5")
    report = done["report"]
    assert report["uniform"]
    assert [len(router["kept"]) for router in report["routers"]] == [2, 3] * 2
    assert 0 < report["dropped_mass"] < 1
    assert done["before"].keys() == done["after"].keys() == set(editing.DOMAINS)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.config.n_att_experts, model.config.n_mlp_experts) == (2, 3)
    for path, when in ((old, "before"), (str(out), "after")):
        scores = run_json("eval", "--json", "--dense", "--model", path, *texts)
        assert scores["scores"] == done[when]
    assert json.loads((out / "pruning.json").read_text())["report"] == report
    capsys.readouterr()
    shown = ["--out", str(tmp_path / "shown"), "--keep", "3"]
    assert main(["prune", "--model", old, *shown, *texts]) == 0
    captured = capsys.readouterr()
    assert "feed-forward 1: 3 of 5 kept; dropped" in captured.out
    assert max(map(len, captured.out.splitlines())) <= 80 + len(str(tmp_path))
    assert "measuring the use of experts on film, shop" in captured.err
    assert re.search(r"^measuring: batch (\d+)/\1$", captured.err, re.M)


def test_domains_decide_what_is_measured(
    old: str, texts: list[str], tmp_path: Path, run_json: Run
) -> None:
    found = []
    for domain in editing.DOMAINS:
        out = ["--out", str(tmp_path / domain), "--domains", domain, "--keep", "0.5"]
        done = run_json("prune", "--json", "--model", old, *out, *texts)
        assert done["measured_on"] == [domain]
        assert list(done["after"]) == [domain]
        found.append(done["use"])
    assert found[0] != found[1]


def test_layers_of_their_own(old: str, texts: list[str], tmp_path: Path, run_json: Run) -> None:
    out = tmp_path / "small"
    options = ["--keep", "0.7", "--per-layer", "--by", "mass"]
    done = run_json("prune", "--json", "--model", old, "--out", str(out), *options, *texts)
    assert sum(len(router["kept"]) for router in done["report"]["routers"]) == 2 * 3 + 2 * 4
    assert done["report"]["by"] == "mass"
    AutoModelForCausalLM.from_pretrained(out)
    options = ["--threshold", "0.3"]
    done = run_json(
        "prune", "--json", "--model", old, "--out", str(tmp_path / "t"), *options, *texts
    )
    for router, use in zip(done["report"]["routers"], done["use"]["routers"], strict=True):
        assert router["kept"] == [e for e, f in enumerate(use["frequency"]) if f >= 0.3]


def test_what_cannot_be_done_is_said_before_anything_is_measured(
    old: str, texts: list[str], tmp_path: Path, fails: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moduli.study.pruning.expert_use", None)
    out = ["--out", str(tmp_path / "small"), *texts]
    line = fails(2, "prune", "--model", old, *out, "--keep", "0.1")
    assert "every token uses 2" in line
    assert "exactly one of keep and threshold" in fails(2, "prune", "--model", old, *out)
    line = fails(3, "prune", "--model", "minilm", *out, "--keep", "0.5")
    assert "minilm is a bert model; `moduli compare --pruned`" in line
    assert not list(tmp_path.iterdir())
    (tmp_path / "small").write_text("")
    line = fails(4, "prune", "--model", old, *out, "--keep", "0.5")
    assert "is not a directory" in line
