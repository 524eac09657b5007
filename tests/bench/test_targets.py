"""Targets: every row of the table is there, and a row passes only by numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moduli.bench.cases import SETS, LayerCase, named
from moduli.bench.rows import Entry, LayerRow
from moduli.bench.targets import TARGETS, checks, met, target_of
from moduli.errors import UnknownNameError

CASE = LayerCase(tokens=4096, hidden=384, experts=64, top_k=8, mode="train")


def row(**changes: object) -> LayerRow:
    """Dense 80 ms, so that the floor is 10 ms; auto at 20 ms, the best backend at 40 ms."""
    b = 4096 * 8 * 24 * 4
    made = LayerRow(
        case=CASE,
        settings="tuned",
        device="cpu",
        entries=(
            Entry("auto", "kernel", 20.0, 19.0, 5, 5, saved_bytes=int(1.1 * b)),
            Entry("loop", "kernel", 19.0, 19.0, 5, 5, saved_bytes=int(1.1 * b)),
            Entry("native", "kernel", None, note="wrong"),
            Entry("dense", "dense", 90.0, 80.0, 5, 5),
            Entry("dense fused", "dense", 80.0, 80.0, 5, 5),
            Entry("transformers eager", "peer", 60.0, 50.0, 5, 5),
            Entry("transformers grouped_mm", "peer", 40.0, 39.0, 5, 5),
        ),
        choice="loop",
        router_ms=1.0,
        dense_share=1 / 8,
        machine_floor_ms=8.0,
        peak_gflops=100.0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def by_name(rows: LayerRow) -> dict[str, tuple[float | None, float, bool]]:
    return {check.what: (check.value, check.limit, check.met) for check in checks(rows)}


def test_a_row_is_held_against_its_target() -> None:
    found = by_name(row())
    assert found["floor"] == (pytest.approx(2.0), 2.3, True)
    assert found["peer"] == (pytest.approx(2.0), 1.8, True)
    assert found["dense"] == (pytest.approx(0.25), 1.05, True)
    assert found["regret"] == (pytest.approx(20 / 19), 1.10, True)
    assert found["saved"] == (pytest.approx(1.1, rel=1e-5), 1.2, True)
    assert found["router"] == (pytest.approx(1 / 21), 0.10, True)
    assert met([row()]) == (6, 6)


def test_what_is_missing_or_too_slow_meets_nothing() -> None:
    entries = row().entries
    slow = row(entries=(replace(entries[0], ms=24.0), *entries[1:]))
    assert [name for name, (_, _, fine) in by_name(slow).items() if not fine] == [
        "regret",
        "floor",
        "peer",
    ]
    absent = row(entries=(replace(entries[0], ms=None, note="wrong"), *entries[1:]))
    assert met([absent])[0] == 1  # the bytes it saves are known all the same


def test_the_compiled_kernel_has_a_target_of_its_own() -> None:
    entries = row().entries
    native = replace(entries[2], ms=25.0, note=None)
    forward = row(case=replace(CASE, mode="forward"), entries=(*entries[:2], native, *entries[3:]))
    assert by_name(forward)["compiled"] == (pytest.approx(2.5), 2.0, False)
    assert "compiled" not in by_name(row(case=replace(CASE, mode="forward")))


def test_other_shapes_are_held_against_our_own_kernels_and_dense() -> None:
    assert set(by_name(row(case=replace(CASE, spread="skewed")))) == {"regret", "dense"}
    owned = by_name(row(case=replace(CASE, owned=True), dense_share=1.0))
    assert set(owned) == {"regret", "peer"}
    assert owned["peer"] == (pytest.approx(2.0), 1.0, True)


def test_untuned_settings_have_no_target() -> None:
    assert checks(row(settings="defaults")) == []


def test_every_case_of_the_acceptance_set_has_a_target() -> None:
    cases = named("acceptance")
    assert len(set(cases)) == len(cases)
    assert all(target_of(case) is not None for case in cases)
    assert {case.threads for case in cases} == {1, 2}
    assert all(target.forward >= 1.2 for target in TARGETS)


@pytest.mark.parametrize("name", SETS)
def test_cases_of_a_set_differ_in_their_labels(name: str) -> None:
    labels = [case.label for case in named(name)]
    assert len(set(labels)) == len(labels)


def test_an_unknown_set_gets_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="'quick'"):
        named("quik")
