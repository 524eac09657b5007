"""The support table says what happens, cell by cell, and its page shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from moduli.errors import ModelError
from tests import families
from tests.support import table
from tests.support.checks import CHECKS, Result, methods, run_cell, run_check

EXPECTED = table.read()
CELLS = [(family, method) for family, row in EXPECTED.items() for method in row]
COMPILED = [cell for cell in CELLS if "compile" in EXPECTED[cell[0]][cell[1]]]
QUICK = ("emoe", "gmoe")


def found(family: str, method: str, *checks: str) -> dict[str, str]:
    return {name: str(r) for name, r in run_cell(family, method, checks).items()}


def expected(family: str, method: str, *checks: str) -> dict[str, str]:
    cell = EXPECTED[family][method]
    return {name: cell[name] for name in checks if name in cell}


def test_every_family_and_every_method_is_in_the_table() -> None:
    assert list(EXPECTED) == [*families.FAMILIES, *families.REFUSED]
    for family, row in EXPECTED.items():
        assert list(row) == methods(), f"{family}: run `make support`"


def test_no_cell_expects_a_failure() -> None:
    """What does not work is refused with a reason, or cannot apply."""
    for family, method in CELLS:
        cell = EXPECTED[family][method]
        assert list(cell) in (list(CHECKS), ["round trip"])
        for name, value in cell.items():
            status, _, reason = value.partition(": ")
            assert (status == "yes") is (reason == ""), (family, method, name)
            assert status in ("yes", "no", "n/a"), (family, method, name, value)


def test_the_page_shows_the_table() -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.with_table(page, EXPECTED) == page, "run `make support`"


@pytest.mark.parametrize(("family", "method"), [c for c in CELLS if c[1] in QUICK])
def test_round_trip(family: str, method: str) -> None:
    assert found(family, method, "round trip") == expected(family, method, "round trip")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), CELLS)
def test_what_is_not_compiled(family: str, method: str) -> None:
    checks = [name for name in CHECKS if name != "compile"]
    assert found(family, method, *checks) == expected(family, method, *checks)


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> Any:
    """Results of compiling, from one process: the compiler cannot trace our shape checks."""
    asked = [item for item in request.session.items if isinstance(item, pytest.Function)]
    names = {i.callspec.params["family"] for i in asked if "compiled" in i.fixturenames}
    command = [sys.executable, "-m", "tests.support", *sorted(names), "--checks", "compile"]
    done = subprocess.run(command, cwd=table.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), COMPILED)
def test_compiled(family: str, method: str, compiled: Any) -> None:
    assert compiled[family][method] == expected(family, method, "compile")


def test_a_property_that_does_not_hold_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any) -> None:
        raise AssertionError("tensors differ")

    def refused(model: Any) -> None:
        raise ModelError("a.b: weights are odd; load others")

    monkeypatch.setattr("moduli.merge", broken)
    failed = run_check("round trip", "bert", "emoe")
    assert failed == Result("FAILED", "AssertionError: tensors differ")
    monkeypatch.setattr("moduli.merge", refused)
    cell = run_cell("bert", "emoe")
    assert cell == {"round trip": Result("no", "weights are odd; load others")}
