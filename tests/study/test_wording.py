"""Sentences say what the interval carries, and no more."""

import dataclasses

import pytest

import moduli
from moduli.study.plan import Planned, arm
from moduli.study.statistics import paired_difference
from moduli.study.table import tabulate
from moduli.study.wording import adjusted, claim, claims, corrected_claim, points, power
from moduli.training.metrics import CLASS_METRICS, LOSS
from tests.study.fakes import emoe, made_study

ACCURACY = CLASS_METRICS[0]


@pytest.mark.parametrize(
    ("values", "why"),
    [([0.1], "1 seed; too little for an interval"), ([0.1] * 3, "equal in all, so no interval")],
)
def test_without_a_spread_nothing_is_claimed(values: list[float], why: str) -> None:
    d = paired_difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))
    assert d is not None
    assert why in claim("a", "b", "in-domain", d, ACCURACY)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.030, 0.031, 0.032], "a scored higher than b in-domain by 3.1 points"),
        ([-0.030, -0.031, -0.032], "a scored lower than b in-domain by 3.1 points"),
        ([0.05, 0.04, -0.01], "No difference between a and b was shown in-domain"),
    ],
)
def test_sentences_say_what_the_interval_carries(values: list[float], said: str) -> None:
    d = paired_difference(dict(enumerate(values)), dict.fromkeys(range(3), 0.0))
    assert d is not None
    assert claim("a", "b", "in-domain", d, ACCURACY).startswith(said)


def test_what_does_not_survive_correction_is_not_claimed() -> None:
    d = paired_difference({0: 0.030, 1: 0.031, 2: 0.032}, dict.fromkeys(range(3), 0.0))
    assert d is not None
    plain = claim("a", "b", "in-domain", d, ACCURACY)
    assert corrected_claim("a", "b", "in-domain", d, ACCURACY, d.p_t, 1) == plain
    held = corrected_claim("a", "b", "in-domain", d, ACCURACY, 0.02, 3)
    assert held.endswith("3 paired seeds; p = 0.020 corrected for 3 comparisons).")
    lost = corrected_claim("a", "b", "in-domain", d, ACCURACY, 0.2, 3)
    assert lost.endswith("but corrected for 3 comparisons this is not shown (p = 0.20).")


@pytest.mark.parametrize("methods", [3, 6])
def test_a_family_of_methods_is_corrected_in_few_and_in_many_sentences(methods: int) -> None:
    """Five seeds of which one method is better at p = 0.03 show nothing among several."""
    noise = (0.001, -0.001, 0.0, 0.002, -0.002)

    def score(run: Planned, domain: str) -> float:
        away = 0.0024 * (1 + 20 * noise[run.spec.seed]) if run.arm == 1 else 0.0
        jitter = noise[(run.spec.seed + run.arm) % 5]
        return 0.8 + away + (jitter if run.arm else 0.0)

    arms = (arm(moduli.Dense()), *(arm(emoe(top_k=k + 1)) for k in range(methods)))
    arms = tuple(dataclasses.replace(one, edits=()) for one in arms)
    table = tabulate(made_study(arms, seeds=range(5), score=score))
    first = table.rows[1].cells[0].difference
    assert first is not None
    assert first.sign == 1
    assert (adjusted(table, 0, "p_t")[1] or 0) > 0.05
    said = [claim for claim in claims(table) if f"{table.rows[1].label} " in claim.text]
    assert said
    for one in said:
        assert not one.text.startswith("Higher")
        assert "corrected p" in one.text or "this is not shown" in one.text
        assert set(table.rows[1].cells[0].compared) & set(one.runs)


def test_a_lower_loss_is_said_to_be_better() -> None:
    d = paired_difference({0: -0.2, 1: -0.21, 2: -0.22}, dict.fromkeys(range(3), 0.0))
    assert d is not None
    said = claim("a", "b", "in-domain", d, LOSS)
    assert said.startswith("a did better than b in-domain: its loss was lower by 0.210 (95 %")
    assert "points" not in said


def test_a_small_difference_keeps_its_sign() -> None:
    """An interval from -0.0002 covers zero, and "0.0 to" would not show it."""
    assert [points(x) for x in (-0.0002, 0.0, 0.0002, 0.0123)] == ["−0.0", "0.0", "+0.0", "+1.2"]


def test_power_counts_the_seeds_where_there_are_fewest() -> None:
    """In an unfinished study some sources have more seeds than others."""
    method = {("a", 0): 0.83, ("a", 1): 0.80, ("a", 2): 0.84, ("b", 0): 0.70}
    d = paired_difference(method, dict.fromkeys(method, 0.75))
    assert d is not None
    sentence = power(d, ACCURACY)
    assert sentence is not None
    assert sentence.endswith("seeds instead of 1.")


def test_power_does_not_promise_more_from_as_few_seeds() -> None:
    """One source that varies much more than the others: few degrees of freedom are left."""
    base = {(source, seed): 0.5 for source in "abcd" for seed in (0, 1)}
    found = {**base, ("a", 0): 0.8, ("a", 1): 0.4, ("b", 0): 0.51}
    d = paired_difference(found, base)
    assert d is not None
    text = power(d, ACCURACY)
    assert text is not None
    assert "resolves differences of about" in text
    assert "seeds instead" not in text
