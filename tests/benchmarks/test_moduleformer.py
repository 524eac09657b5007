"""ModuleFormer's three claims: plans that can run, records that are their own, their tables."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.moduleformer import plans, runs, study, tables
from moduli.study import environment
from moduli.training.architectures import count_parameters, fresh_config, fresh_model

TOKENS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SCORE = {"loss": 2.0, "n": 100, "bits_per_byte": 2.0}


@pytest.mark.parametrize("claim", plans.CLAIMS)
def test_every_run_has_a_record_of_its_own(claim: str) -> None:
    found = plans.runs(claim, plans.FULL)
    assert len(plans.FULL.seeds) >= 3
    assert len({run.name for run in found}) == len(found)
    assert len(found) == len(plans.CLAIMS[claim]) * len(plans.FULL.seeds)
    json.dumps([run.to_dict() for run in found])
    for run in found:
        if isinstance(run.arm, plans.Tuning):
            assert plans.tuning(run.arm, plans.FULL).max_steps == plans.FULL.tuning


@pytest.mark.parametrize("base", plans.WIDTHS, ids=lambda base: base.label)
def test_every_model_can_be_built(base: plans.Base) -> None:
    config = fresh_config(base.architecture, "tiny", base.changes, **TOKENS)  # type: ignore[arg-type]
    assert count_parameters(fresh_model(config, seed=0))["active_parameters"] > 0


def test_widths_are_on_both_sides_of_the_equal_one() -> None:
    def active(base: plans.Base) -> int:
        config = fresh_config(base.architecture, "tiny", base.changes, **TOKENS)  # type: ignore[arg-type]
        return count_parameters(fresh_model(config, seed=0))["active_parameters"]

    ours, equal, *others = map(active, plans.WIDTHS)
    assert equal == pytest.approx(ours, rel=0.01)
    assert min(others) < equal < max(others)


def test_arms_of_a_comparison_start_from_models_that_are_equally_old() -> None:
    for one, other in pairwise(plans.EXTENSIONS):
        assert one.base.learns == other.base.learns
        assert one.learns == other.learns != one.base.learns
    assert len({arm.base for arm in map(hashable, plans.SPECIALISATIONS)}) == 1


def hashable(arm: plans.Tuning) -> plans.Tuning:
    return replace(arm, base=arm.base.label)  # type: ignore[arg-type]


def test_bits_per_byte_are_pooled_over_bytes() -> None:
    double = {"loss": 2.0, "n": 300, "bits_per_byte": 3.0}
    byte_counts = [
        s["loss"] * s["n"] / 0.6931471805599453 / s["bits_per_byte"] for s in (SCORE, double)
    ]
    want = (2.0 * byte_counts[0] + 3.0 * byte_counts[1]) / sum(byte_counts)
    assert tables.pooled({"a": SCORE, "b": double}) == pytest.approx(want)


def made_up(arm: Any, seed: int) -> dict[str, Any]:
    """A record with numbers by which its place in a table can be told."""
    if isinstance(arm, plans.Base):
        scores = {"news": SCORE | {"bits_per_byte": 2.0 + 0.01 * seed}}
        return {"parameters": 2_000_000, "active_parameters": 1_000_000, "scores": scores}
    domains = ("de", "es") if arm in plans.EXTENSIONS else ("news", "learned")
    kept = {
        str(keep): {
            "scores": {d: SCORE | {"bits_per_byte": 3.0 - keep + 0.01 * seed} for d in domains},
            "dropped": 1 - keep,
        }
        for keep in arm.keeps
    }
    return {"trainable": 500_000, "before": dict.fromkeys(domains, SCORE), "kept": kept}


@pytest.mark.parametrize("claim", plans.CLAIMS)
def test_tables_have_a_row_for_every_arm(claim: str, tmp_path: Path) -> None:
    for run in plans.runs(claim, plans.FULL):
        path = tmp_path / claim / f"{run.name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"run": run.to_dict(), "found": made_up(run.arm, run.seed)}))
    text = tables.markdown(claim, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    arms = plans.CLAIMS[claim]
    each = len(plans.KEEPS) if claim == "specialisation" else 1
    assert len(rows) == 1 + each * len(arms)
    for arm in arms:
        assert sum(row.startswith(f"| {arm.label} |") for row in rows) == each
    assert len({row.count("|") for row in rows}) == 1
    assert "3 seeds" in text


def test_speeds_of_another_machine_are_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speed() -> study.Job:
        return study.jobs("efficiency", plans.FULL, tmp_path, tmp_path)[-1]

    path, spec, _ = speed()
    assert path.name == "speed.json"
    assert not study.known(path, spec)
    study.do(path, spec, lambda: {arm.label: {} for arm in plans.WIDTHS})
    assert study.known(*speed()[:2])
    assert "torch" in tables._measured_on(json.loads(path.read_text()))
    here = environment.hardware()
    monkeypatch.setattr(environment, "hardware", lambda: here | {"name": "another"})
    assert not study.known(*speed()[:2])


def test_records_are_those_of_the_plan() -> None:
    known = {
        f"{claim}/{run.name}.json": run
        for claim in plans.CLAIMS
        for run in plans.runs(claim, plans.FULL)
    }
    for path in tables.RESULTS.glob("*/*.json"):
        if path.name != "speed.json":
            run = known[path.relative_to(tables.RESULTS).as_posix()]
            record = json.loads(path.read_text(encoding="utf-8"))
            assert record["run"] == json.loads(json.dumps(run.to_dict()))


def test_tables_in_the_documentation_are_made_from_the_records() -> None:
    for page in tables.PAGES:
        text = (tables.ROOT / page).read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{page}: run python benchmarks/moduleformer/tables.py"


def kind_of(arm: plans.Base | plans.Tuning) -> tuple[Any, ...]:
    """What decides which code an arm needs."""
    if isinstance(arm, plans.Base):
        return (arm.architecture,)
    flags = bool(arm.leakage), bool(arm.concentration), arm.keeps
    return (arm.base.architecture, arm.trains, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("claim", plans.CLAIMS)
def test_a_short_run_of_every_kind_of_arm(claim: str, tmp_path: Path) -> None:
    kinds = {kind_of(run.arm): run for run in plans.runs(claim, plans.TRIAL)}
    for run in kinds.values():
        found = runs.execute(run, tmp_path)
        json.dumps(found)
        assert "scores" in found or set(found["kept"]) == {str(keep) for keep in run.arm.keeps}
