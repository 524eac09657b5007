"""Intervals are those of the textbook, and nothing is claimed where they cover zero."""

import random

import pytest
from scipy.stats import ttest_rel

from moduli.study.statistics import paired_difference, summarise
from moduli.study.wording import claim, points
from moduli.training.metrics import CLASS_METRICS, LOSS

ACCURACY = CLASS_METRICS[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_is_that_of_the_paired_t_test(seed: int) -> None:
    draw = random.Random(seed)
    values, other = ([draw.random() for _ in range(3 + seed)] for _ in range(2))
    d = paired_difference(dict(enumerate(values)), dict(enumerate(other)))
    assert d is not None
    assert d.interval is not None
    reference = ttest_rel(values, other)
    interval = reference.confidence_interval(0.95)
    assert d.interval == pytest.approx((interval.low, interval.high))
    assert (d.sign != 0) == (reference.pvalue < 0.05)


def test_pairs_are_made_by_seed_and_what_has_no_partner_is_left_out() -> None:
    d = paired_difference({2: 0.5, 0: 0.9, 7: 0.1}, {0: 0.8, 2: 0.3, 5: 0.4})
    assert d is not None
    assert d.seeds == (0, 2)
    assert d.values == pytest.approx((0.1, 0.2))
    assert paired_difference({1: 0.5}, {2: 0.5}) is None


@pytest.mark.parametrize("values", [[0.1], [0.1, 0.1, 0.1]])
def test_without_a_spread_there_is_no_interval_and_no_claim(values: list[float]) -> None:
    d = paired_difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))
    assert d is not None
    assert d.interval is None
    assert d.bootstrap is None
    assert d.sign == 0
    assert "too little for an interval" in claim("a", "b", "in-domain", d, ACCURACY)


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


def test_a_lower_loss_is_said_to_be_better() -> None:
    d = paired_difference({0: -0.2, 1: -0.21, 2: -0.22}, dict.fromkeys(range(3), 0.0))
    assert d is not None
    said = claim("a", "b", "in-domain", d, LOSS)
    assert said.startswith("a did better than b in-domain: its loss was lower by 0.210 (95 %")
    assert "points" not in said


def test_summary_is_the_sample_mean_and_deviation() -> None:
    summary = summarise([1.0, 2.0, 3.0, 4.0])
    assert (summary.n, summary.mean) == (4, 2.5)
    assert summary.sd == pytest.approx((5 / 3) ** 0.5)
    assert summarise([1.0]).sd is None


def test_a_small_difference_keeps_its_sign() -> None:
    """An interval from -0.0002 covers zero, and "0.0 to" would not show it."""
    assert [points(x) for x in (-0.0002, 0.0, 0.0002, 0.0123)] == ["−0.0", "0.0", "+0.0", "+1.2"]
