"""The protocol of timing, on clocks that are run by hand."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moduli.bench.protocol import (
    MIN_SECONDS,
    Clock,
    Reading,
    Sample,
    Timing,
    measure,
)


class FakeTime:
    """Time that passes only when work is done; others use CPU time beside it."""

    def __init__(self) -> None:
        self.wall = self.own = self.busy = 0.0
        self.calls: list[str] = []

    def work(self, name: str, seconds: float, others: float = 0.0) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.wall += seconds
            self.own += seconds
            self.busy += seconds * (1 + others)

        return call

    def clock(self, counts: str = "cpu") -> Clock:
        return Clock(lambda: Reading(self.wall, self.own, self.busy), counts)  # type: ignore[arg-type]


def test_median_and_minimum_are_of_the_calls_in_milliseconds() -> None:
    found = Timing.of([Sample(s) for s in (0.003, 0.001, 0.002)])
    assert (found.median, found.min, found.clean, found.samples) == (2.0, 1.0, 3, 3)
    assert Timing.of([Sample(0.008)], per_call=8).median == pytest.approx(1.0)


@given(st.lists(st.floats(0.0, 1.0), min_size=1), st.lists(st.floats(0.11, 1.0)))
def test_samples_that_others_disturb_do_not_count(clean: list[float], spoilt: list[float]) -> None:
    samples = [Sample(s, 0.0) for s in clean] + [Sample(s * 9, s) for s in spoilt]
    found, alone = Timing.of(samples), Timing.of(samples[: len(clean)])
    assert (found.median, found.min) == (alone.median, alone.min)
    assert (found.clean, found.samples) == (len(clean), len(clean) + len(spoilt))


def test_without_clean_samples_the_time_is_of_all_and_says_so() -> None:
    found = Timing.of([Sample(0.002, 0.5), Sample(0.004, 0.5), Sample(0.003, 0.5)])
    assert found.median == 3.0
    assert found.clean == 0
    assert not found.enough


def test_candidates_take_turns_in_an_order_that_changes() -> None:
    time = FakeTime()
    names = ("a", "b", "c")
    measure({name: time.work(name, 1.0) for name in names}, time.clock(), rng=random.Random(1))
    rounds = [tuple(time.calls[i : i + 3]) for i in range(6, len(time.calls), 3)]
    assert len(rounds) == 5  # after two calls each to warm up
    assert all(set(one) == set(names) for one in rounds)
    assert len(set(rounds)) > 1


def test_short_calls_are_repeated_until_a_sample_is_long_enough() -> None:
    time = FakeTime()
    found = measure(
        {"short": time.work("short", 1e-4), "long": time.work("long", 1.0)},
        time.clock(),
        rng=random.Random(0),
    )
    assert time.calls.count("short") * 1e-4 >= 5 * MIN_SECONDS
    assert time.calls.count("long") == 2 + 5
    assert found["short"].median == pytest.approx(0.1)
    assert found["long"].median == pytest.approx(1000.0)


def test_rounds_go_on_while_samples_are_disturbed_but_not_for_ever() -> None:
    time = FakeTime()
    disturbed = {"a": time.work("a", 1.0, others=0.5), "b": time.work("b", 1.0)}
    found = measure(disturbed, time.clock("wall"), rounds=5, rng=random.Random(0))
    assert found["a"].clean == 0
    assert found["a"].samples == found["b"].samples == 15


def test_own_threads_are_no_disturbance() -> None:
    time = FakeTime()

    def on_two_cores() -> None:
        time.wall += 1.0
        time.own += 2.0
        time.busy += 2.05

    found = measure({"a": on_two_cores}, time.clock("wall"), rng=random.Random(0))
    assert found["a"].clean == found["a"].samples == 5
    assert found["a"].median == pytest.approx(1000.0)


def test_one_thread_is_timed_by_its_cpu_time_and_more_by_the_wall() -> None:
    cpu = torch.device("cpu")
    assert Clock.of(cpu, 1).counts == "cpu"
    shared = Clock.of(cpu, 2)
    assert shared.counts == "wall"
    first = shared.read()
    total = sum(i * i for i in range(10**6))
    second = shared.read()
    assert total > 0
    assert second.wall > first.wall
    assert first.busy is not None
    assert second.busy is not None
    assert second.busy >= first.busy
