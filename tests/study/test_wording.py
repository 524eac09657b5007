"""Sentences say what the interval carries, and no more."""

import pytest

from moduli.study.statistics import paired_difference
from moduli.study.wording import claim, points
from moduli.training.metrics import CLASS_METRICS, LOSS

ACCURACY = CLASS_METRICS[0]


@pytest.mark.parametrize("values", [[0.1], [0.1, 0.1, 0.1]])
def test_without_a_spread_nothing_is_claimed(values: list[float]) -> None:
    d = paired_difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))
    assert d is not None
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


def test_a_small_difference_keeps_its_sign() -> None:
    """An interval from -0.0002 covers zero, and "0.0 to" would not show it."""
    assert [points(x) for x in (-0.0002, 0.0, 0.0002, 0.0123)] == ["−0.0", "0.0", "+0.0", "+1.2"]
