"""Runs that only pretend to work, for tests of what is around the work."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moduli.data.task import Task
from moduli.study import run as module
from moduli.study.plan import Plan
from moduli.study.records import RECORD, RunRecord, write_json
from moduli.study.spec import RunSpec
from tests.reliability.small_study import make_plan, shorter


class Pretended:
    """Stands for the work of a run: it writes a made record; `done` counts how often, by key."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: Counter[str] = Counter()
        monkeypatch.setattr(module, "_work", self)

    def __call__(self, spec: RunSpec, task: Task, partial: Path, *rest: Any) -> RunRecord:
        self.done[spec.key] += 1
        record = made_record(spec)
        (partial / "result").mkdir(exist_ok=True)
        write_json(partial / "result" / RECORD, record.to_dict())
        return record


def made_record(spec: RunSpec) -> RunRecord:
    """A record with made numbers."""
    scores = {"shop": {"accuracy": 0.5, "n": 8}}
    clocks = {"train": 1.0}
    return RunRecord(
        *(spec, "classification", scores, scores, {}, None, {}, 3, 0.7, clocks, clocks, {})
    )


def pretended_plan(directory: Path) -> Plan:
    """Ten runs of a model that is a directory and no more."""
    directory.mkdir()
    return shorter(make_plan(directory, 1))
