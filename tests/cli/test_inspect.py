"""`moduli inspect` on the real encoder and on an MoE model of transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import moduli
from moduli.cli import main
from moduli.inspect.record import Inspection
from tests import families

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def split_model(minilm_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the real encoder, two of its layers split."""
    names = {0: "bad", 1: "good"}
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path, id2label=names)
    moduli.convert(model, moduli.EMoE(num_experts=16, top_k=4, layers="last:2", split="contiguous"))
    directory = tmp_path_factory.mktemp("split") / "model"
    moduli.save(model, directory, AutoTokenizer.from_pretrained(minilm_path))
    return str(directory)


def test_tables_fit_80_columns(
    split_model: str,
    task_options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = tmp_path / "new" / "page.html"
    more = ["--text", "The unbelievable plot", "--html", str(page)]
    assert main(["inspect", "--model", split_model, *task_options, *more]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for name in ("layer 4", "layer 5"):
        assert re.search(rf"^{name} +16 +4 ", out, re.M)
        assert re.search(rf"^{name}: \[CLS\]:\d+ the:\d+ un", out, re.M)
    assert re.search(r"^shop +layer \d +\d+ +\d+\.\d% +\d+\.\d%$", out, re.M)
    assert re.search(r"^layer \s+most like\s+overlap\s+by chance$", out, re.M)
    assert re.search(r"^layer 4 +layer 5 +0\.\d{3} +0\.\d{3}$", out, re.M)
    assert f"page: {page}" in out.replace("\n", "")
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "moduli inspect" in html


def test_json_is_the_record(split_model: str, task_options: list[str], run_json: Run) -> None:
    few = ["--max-rows", "3", "--split", "all"]
    result = run_json("inspect", "--json", "--model", split_model, *few, *task_options)
    found = Inspection.from_dict(result["inspection"])
    assert result["model"] == split_model
    assert set(found.domains) == {"shop", "film", "food"}
    assert found.classes == ("bad", "good")
    assert [layer.num_experts for layer in found.layers] == [16, 16]
    assert json.dumps(found.to_dict()) == json.dumps(result["inspection"])


def test_stock_models(minilm_path: Path, data: str, tmp_path: Path, run_json: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    families.moe("olmoe", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["inspect", "--json", "--model", str(tmp_path), "--data", data, "--max-rows", "4"]
    as_texts = run_json(*command, "--text", "good")["inspection"]
    as_classes = run_json(*command, "--kind", "classification")["inspection"]
    assert [layer["num_experts"] for layer in as_texts["layers"]] == [4, 4]
    assert (as_texts["classes"], as_classes["classes"]) == ([], ["bad", "good"])
    assert len(as_texts["tokens"]) == 1


def test_bad_input(split_model: str, task_options: list[str], tmp_path: Path, fails: Run) -> None:
    dense = fails(3, "inspect", "--model", "minilm", "--data", "csv:nowhere.csv")
    assert "no experts to look at; moduli.convert(model, method) or `moduli tune`" in dense
    assert "nowhere" in fails(5, "inspect", "--model", split_model, "--data", "csv:nowhere.csv")
    mine = ["inspect", "--model", split_model, *task_options]
    assert "max_rows is 0" in fails(2, *mine, "--max-rows", "0")
    assert "not both" in fails(2, *mine, "--text", "a", "--file", "b.png")
    assert "give it texts, with --text" in fails(2, *mine, "--file", "b.png")
    assert "No model" in fails(4, "inspect", "--model", str(tmp_path / "x"), *task_options)
    (tmp_path / "file").touch()
    page = str(tmp_path / "file" / "page.html")
    assert "could not write" in fails(4, *mine, "--max-rows", "2", "--html", page)
