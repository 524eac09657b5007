"""Finding cases, running each through its adapter, and saying how it went."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from safetensors import SafetensorError

from tests.parity.case import Case, Check


@dataclass(frozen=True)
class Outcome:
    """One case: whether it passed, the largest error, and what went wrong."""

    title: str
    passed: bool
    largest: float
    tolerance: str
    problems: tuple[str, ...]

    def __str__(self) -> str:
        head = f"{self.title} {'PASS' if self.passed else 'FAIL'}"
        line = f"{head} largest error {self.largest:.2g} ({self.tolerance})"
        return line if self.passed else f"{line}: {'; '.join(self.problems)}"


def find_cases(folders: Iterable[Path]) -> list[Path]:
    """All case.json files below the folders, in name order."""
    return sorted({path for folder in folders for path in folder.rglob("case.json")})


def run_case(path: Path) -> Outcome:
    """Run one case; whatever goes wrong in it is an outcome, not an exception."""
    try:
        case = Case.read(path)
        title, tolerance = case.title, f"atol {case.atol:g}, rtol {case.rtol:g}"
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return Outcome(str(path.parent), False, 0.0, "unreadable", (f"{error!r}",))
    try:
        adapter = import_module(f"tests.parity.adapters.{case.system}")
    except ModuleNotFoundError:
        problem = f"there is no adapter for system {case.system!r}"
        return Outcome(title, False, 0.0, tolerance, (problem,))
    run = adapter.KINDS.get(case.kind)
    if run is None:
        known = ", ".join(sorted(adapter.KINDS))
        problem = f"no adapter for kind {case.kind!r} of {case.system}; there are {known}"
        return Outcome(title, False, 0.0, tolerance, (problem,))
    check = Check(case)
    try:
        run(case, check)
        check.finish()
    except Exception as error:  # a crash in one case must not hide the others
        check.problems.append(f"{type(error).__name__}: {error}")
    return Outcome(title, not check.problems, check.largest, tolerance, tuple(check.problems))


def titles(paths: Iterable[Path]) -> list[str]:
    """system/case of each path, for test names."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    return [f"{data['system']}/{data['case']}" for data in found]
