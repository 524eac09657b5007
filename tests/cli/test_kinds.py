"""The command line on other kinds of tasks: tuned, evaluated and used without saying the kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moduli.cli import main
from tests.training import tinykinds

Run = Callable[..., Any]
FAST = ["--max-steps", "2", "--batch-size", "8", "--max-length", "16", "--bf16", "False"]
EMOE = ["emoe", "--num-experts", "8", "--top-k", "4", "--split", "contiguous"]


def tune(kind: str, root: Path, *options: str) -> tuple[list[str], Path]:
    """Arguments of a run on tiny data, without `--json`, and its directory."""
    data = tinykinds.write_rows(kind, root / "data")
    model = tinykinds.write_model(kind, root / "base")
    common = ["--data", data, "--domain-column", "domain", *options, *FAST]
    return ["tune", "--model", str(model), "--out", str(root / "run"), *common, *EMOE], root / "run"


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("regression", "mean"), ("token-classification", "macro-F1"), ("image-classification", "bal")],
)
def test_a_kind_is_guessed_said_and_carried_along(
    kind: str, shown: str, tmp_path: Path, run_json: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = tune(kind, tmp_path)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert f"Taken as {kind}: " in captured.err.replace("\n", " ")
    assert shown in captured.out
    assert max(map(len, captured.out.splitlines())) <= 80 + len(str(tmp_path))
    record = json.loads((out / "record.json").read_text())
    assert record["kind"] == kind
    data = arguments[arguments.index("--data") + 1]
    columns = ["--domain-column", "domain"]
    found = run_json("eval", "--json", "--model", str(out), "--data", data, *columns)
    assert found["scores"] == record["scores"]
    if kind == "image-classification":
        inputs = ["--file", *(str(tmp_path / "data" / f"{i}.png") for i in range(2))]
    else:
        inputs = ["--text", "the camera was great", "the plot was awful"]
    assert len(run_json("predict", "--json", "--model", str(out), *inputs)["predictions"]) == 2


def test_texts_are_learnt_when_asked_and_compared_by_their_loss(
    tmp_path: Path, run_json: Run, capsys: pytest.CaptureFixture[str], fails: Run
) -> None:
    arguments, _ = tune("language-modeling", tmp_path)
    assert "kind='language-modeling'" in fails(5, *arguments)
    common = arguments[arguments.index("--data") : -len(EMOE)]
    common += ["--kind", "language-modeling", "--seeds", "0", "1"]
    study = ["compare", "--model", arguments[2], "--root", str(tmp_path / "study")]
    result = run_json(*study, "--json", *common, "dense", "+", *EMOE)
    assert [table["metric"] for table in result["tables"]] == ["loss", "perplexity"]
    capsys.readouterr()
    assert main([*study, *common, "dense", "+", *EMOE]) == 0
    captured = capsys.readouterr()
    assert "loss per token (lower is better)" in captured.out
    assert "points" not in captured.out
    assert "in %" not in captured.out


def test_files_and_texts_are_not_taken_for_each_other(tmp_path: Path, fails: Run) -> None:
    model = str(tinykinds.write_model("image-classification", tmp_path))
    assert "with --file" in fails(2, "predict", "--model", model, "--text", "a cat")
    line = fails(5, "predict", "--model", model, "--file", str(tmp_path / "gone.png"))
    assert "gone.png" in line
    assert "one of the three" in fails(2, "predict", "--model", model)
