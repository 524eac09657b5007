"""`moduli convert --data`: rows of a task are what errors are measured on and what methods see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moduli
from tests.training import tinykinds

Run = Callable[..., Any]
EXPERTS = ["--num-experts", "4", "--top-k", "2", "--layers", "all"]
MLP = ["moefication", *EXPERTS, "--select", "mlp", "--router-epochs", "1"]
COACTIVATION = ["moefication", *EXPERTS, "--split", "coactivation"]
IMPORTANCE = ["llama-moe", *EXPERTS, "--split", "importance"]


@pytest.fixture
def decoder(tmp_path: Path) -> str:
    return str(tinykinds.write_model("language-modeling", tmp_path / "decoder"))


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    data = tinykinds.write_rows("language-modeling", tmp_path / "texts")
    return ["--data", data, "--domain-column", "domain"]


@pytest.mark.parametrize("method", [MLP, COACTIVATION, IMPORTANCE], ids=lambda words: words[-1])
def test_methods_that_look_at_data_get_it_by_an_option(
    method: list[str], decoder: str, texts: list[str], tmp_path: Path, run_json: Run, fails: Run
) -> None:
    out = ["--model", decoder, "--out", str(tmp_path / "made")]
    assert "by --data TASK" in fails(2, "convert", *out, *method)
    assert not (tmp_path / "made").exists()
    done = run_json("convert", "--json", *out, *texts, "--examples", "20", *method)
    assert done["report"]["probe"] == "the given inputs"
    assert done["measured_on"] == "given inputs"
    assert moduli.is_modular(moduli.load(tmp_path / "made"))


def test_output_errors_are_those_of_the_domain_and_the_rows(
    decoder: str, texts: list[str], run_json: Run, fails: Run
) -> None:
    look = ["--model", decoder, "--dry-run"]
    method = ["emoe", *EXPERTS, "--split", "contiguous"]

    def errors(*options: str) -> list[float]:
        report = run_json("convert", "--json", *look, *options, *method)["report"]
        return [layer["error"] for layer in report["layers"]]

    film, shop = (errors(*texts, "--domain", domain) for domain in ("film", "shop"))
    assert len({*map(tuple, (errors(), film, shop, errors(*texts, "--examples", "3")))}) == 4
    assert errors(*texts) in (film, shop)
    assert "Did you mean 'film'" in fails(2, "convert", *look, *texts, "--domain", "fim", *method)
    assert "--data" in fails(2, "convert", *look, "--domain", "film", *method)
    assert "--examples is 0" in fails(2, "convert", *look, *texts, "--examples", "0", *method)


def test_a_tuned_classifier_is_shown_the_classes_it_knows(
    tuned: Path, task_options: list[str], tmp_path: Path, run_json: Run, fails: Run
) -> None:
    dense = str(tmp_path / "dense")
    run_json("merge", "--json", "--model", str(tuned), "--out", dense)
    method = ["llama-moe", "--num-experts", "4", "--top-k", "2", "--split", "importance"]
    out = ["--model", dense, "--out", str(tmp_path / "made")]
    done = run_json("convert", "--json", *out, *task_options, "--domain", "food", *method)
    assert done["report"]["method"] == "llama-moe"
    assert done["measured_on"] == "given inputs"
    bare = ["--model", "minilm", "--out", str(tmp_path / "bare"), *task_options]
    assert "labels" in fails(5, "convert", *bare, *method)


def test_what_is_written_does_not_depend_on_having_been_measured(
    decoder: str, texts: list[str], tmp_path: Path, run_json: Run
) -> None:
    config = Path(decoder) / "config.json"
    settings = json.loads(config.read_text()) | {"pad_token_id": None}
    config.write_text(json.dumps(settings))
    method = ["emoe", *EXPERTS, "--split", "contiguous"]
    plain, measured = tmp_path / "plain", tmp_path / "measured"
    run_json("convert", "--json", "--model", decoder, "--out", str(plain), *method)
    run_json("convert", "--json", "--model", decoder, "--out", str(measured), *texts, *method)
    assert (plain / "config.json").read_text() == (measured / "config.json").read_text()
    one, other = (moduli.load(path).state_dict() for path in (plain, measured))
    assert all(torch.equal(one[name], other[name]) for name in one)
