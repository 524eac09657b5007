"""A small labelled file in three domains, and a model tuned on it by the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moduli.cli import main
from tests.study.conftest import BAD, GOOD, THINGS

FAST = ("--max-steps", "4", "--batch-size", "16", "--max-length", "16", "--bf16", "False")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CSV file with the columns text, label, source, as --data takes it."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for source, things in THINGS.items():
            for thing in things:
                for label, words in (("bad", BAD), ("good", GOOD)):
                    for word in words:
                        writer.writerow([f"The {thing} was {word}", label, source])
    return f"csv:{path}"


@pytest.fixture(scope="session")
def task_options(data: str) -> list[str]:
    return ["--data", data, "--domain-column", "source"]


@pytest.fixture(scope="session")
def tuned(task_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that `moduli tune ... emoe` wrote."""
    out = tmp_path_factory.mktemp("tuned") / "model"
    method = ["emoe", "--num-experts", "16", "--top-k", "8", "--split", "contiguous"]
    status = main(["tune", "--model", "minilm", "--out", str(out), *task_options, *FAST, *method])
    assert status == 0
    return out


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command that has to succeed and return its stdout, parsed: nothing else is on it."""

    def run(*argv: str) -> Any:
        capsys.readouterr()
        status = main([*argv])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return json.loads(captured.out)

    return run


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that has to fail with a status and one line on stderr; returns the line."""

    def run(status: int, *argv: str) -> str:
        capsys.readouterr()
        assert main([*argv]) == status
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = [x for x in captured.err.splitlines() if x.startswith("moduli: error: ")]
        assert "Traceback" not in captured.err
        return line

    return run
