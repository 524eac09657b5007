"""`moduli compare` with arms of their own settings, several sources, and input that cannot work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import FAST

Run = Callable[..., Any]
EMOE = ["emoe", "--split", "contiguous", "--top-k", "8"]


@pytest.mark.slow
def test_arms_have_settings_of_their_own(
    task_options: list[str], tmp_path: Path, run_json: Run, fails: Run
) -> None:
    common = ["--json", "--model", "minilm", "--root", str(tmp_path), *task_options, *FAST]
    plan = ["--seeds", "0", "--train-domain", "film", "shop,food", "--pruned", "--cross"]
    lora = ["--trains", "lora", "--learning-rate", "1e-3", "--label", "mine"]
    study = [*common, *plan, "dense", "+", *EMOE, "+", *lora, "dense"]
    line = fails(2, "compare", "--report-only", *study)
    assert "no finished run" in line
    found = run_json("compare", *study)
    assert [row["label"] for row in found["tables"][0]["rows"]] == [
        "dense",
        "dense (split by emoe)",
        "emoe",
        "emoe (merged)",
        "emoe (pruned)",
        "mine",
    ]
    specs = [run["spec"] for run in found["runs"].values()]
    assert {tuple(spec["train_domains"]) for spec in specs} == {("film",), ("shop", "food")}
    assert {spec["settings"]["trains"] for spec in specs} == {"all", "lora"}
    again = run_json("compare", "--report-only", *study)
    assert again["tables"] == found["tables"]
    report = Path(again["report"]).read_text()
    assert all(key in report for key in found["runs"])


@pytest.mark.parametrize(
    ("status", "words", "match"),
    [
        (2, ["--train-domain", "films", "dense"], "'film'"),
        (2, ["dense", "+", "emo"], "'emoe'"),
        (2, ["dense", "+", "--label", "dense", *EMOE], "called 'dense'"),
        (2, ["--fractions", "2", "dense"], "fraction is 2"),
        (2, ["--select", "oracel", "dense"], "Did you mean 'oracle'"),
        (2, ["dense", "+", "--trains", "some", "dense"], "all, head, lora or last:N"),
        (
            2,
            ["--validation-size", "0", "--learning-rates", "1e-4", "2e-4", "dense"],
            "needs validation splits",
        ),
        (5, ["--more-data", "csv:/nowhere.csv", "dense"], "/nowhere.csv"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    status: int, words: list[str], match: str, task_options: list[str], tmp_path: Path, fails: Run
) -> None:
    root = tmp_path / "root"
    given = ["--model", "minilm", "--root", str(root), *task_options, *FAST]
    assert match in fails(status, "compare", *given, *words)
    assert not root.exists()
