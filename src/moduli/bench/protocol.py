"""How anything is timed: candidates take turns in rounds, in an order that is shuffled each time.

Two runs to warm up, samples of at least 30 ms, five rounds or more; the result is the median and
the minimum of the clean samples. One thread is timed by the CPU time of the process, which other
processes do not add to. More threads are timed by the wall, and a sample counts only if others
used at most a tenth of its interval. The clock is an argument, so that tests can run it by hand.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

WARMUP = 2
MIN_SECONDS = 0.03
# The system counts its own time in ticks of 10 ms; a tenth of the interval must be many of them.
MIN_SECONDS_SHARED = 0.25
MAX_OTHERS = 0.10
ENOUGH = 3
ROUNDS = 5


@dataclass(frozen=True)
class Reading:
    """The clocks at one moment, in seconds.

    Attributes:
        wall: of the wall.
        own: CPU time of this process, all threads together.
        busy: CPU time of everything on the machine, or None where that is not asked for.
    """

    wall: float
    own: float
    busy: float | None = None


@dataclass(frozen=True)
class Clock:
    """How a kind of run is timed.

    Attributes:
        read: the clocks now, after everything that was started has finished.
        counts: what a sample is: CPU time of the process, or time of the wall.
        min_seconds: length of a sample.
    """

    read: Callable[[], Reading]
    counts: Literal["cpu", "wall"] = "cpu"
    min_seconds: float = MIN_SECONDS

    @staticmethod
    def of(device: torch.device, threads: int) -> Clock:
        """The clock for runs on a device with so many threads."""
        if device.type != "cpu":
            return Clock(lambda: _after(device), "wall")
        if threads == 1:
            return Clock(lambda: Reading(time.perf_counter(), time.process_time()), "cpu")
        return Clock(_shared, "wall", MIN_SECONDS_SHARED)


@dataclass(frozen=True)
class Sample:
    """One interval: seconds per call, and what other processes used as a share of the interval."""

    seconds: float
    others: float | None = None

    @property
    def clean(self) -> bool:
        """Whether the sample counts."""
        return self.others is None or self.others <= MAX_OTHERS


@dataclass(frozen=True)
class Timing:
    """What the samples of a candidate say, in milliseconds per call.

    Attributes:
        median: of the clean samples; of all where none is clean.
        min: the same.
        clean: number of clean samples; fewer than three are no basis for a claim.
        samples: number of samples.
    """

    median: float
    min: float
    clean: int
    samples: int

    @staticmethod
    def of(samples: list[Sample], per_call: int = 1) -> Timing:
        """The timing of samples whose calls do the work `per_call` times."""
        clean = [s.seconds for s in samples if s.clean]
        used = clean or [s.seconds for s in samples]
        scale = 1000 / per_call
        return Timing(statistics.median(used) * scale, min(used) * scale, len(clean), len(samples))

    @property
    def enough(self) -> bool:
        """Whether enough samples are clean."""
        return self.clean >= ENOUGH


def measure(
    calls: Mapping[str, Callable[[], object]],
    clock: Clock,
    *,
    rounds: int = ROUNDS,
    rng: random.Random,
    per_call: int = 1,
) -> dict[str, Timing]:
    """Time all calls against each other.

    Args:
        calls: candidates by name.
        clock: see `Clock.of`.
        rounds: rounds; while some candidate has too few clean samples, up to three times as many.
        rng: shuffles the order of every round.
        per_call: how often a call does the work that is to be timed.

    Returns:
        The timing of every candidate.
    """
    sizes = {name: _size(call, clock) for name, call in calls.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    for done in range(1, 3 * rounds + 1):
        order = list(calls)
        rng.shuffle(order)
        for name in order:
            samples[name].append(_sample(calls[name], sizes[name], clock))
        if done >= rounds and all(sum(x.clean for x in s) >= ENOUGH for s in samples.values()):
            break
    return {name: Timing.of(found, per_call) for name, found in samples.items()}


def _size(call: Callable[[], object], clock: Clock) -> int:
    """Calls per sample; warms up on the way."""
    seconds = min(_interval(call, 1, clock)[0] for _ in range(WARMUP))
    # A first guess from single calls is rough for very short ones, so it is tried once.
    guess = max(1, math.ceil(clock.min_seconds / 4 / max(seconds, 1e-6)))
    if guess > 1:
        seconds = _interval(call, guess, clock)[0] / guess
    return max(1, math.ceil(clock.min_seconds / max(seconds, 1e-7)))


def _sample(call: Callable[[], object], size: int, clock: Clock) -> Sample:
    seconds, others = _interval(call, size, clock)
    return Sample(seconds / size, others)


def _interval(call: Callable[[], object], size: int, clock: Clock) -> tuple[float, float | None]:
    before = clock.read()
    for _ in range(size):
        call()
    after = clock.read()
    wall = after.wall - before.wall
    own = after.own - before.own
    others = None
    if clock.counts == "wall" and before.busy is not None and after.busy is not None:
        others = max(0.0, after.busy - before.busy - own) / max(wall, 1e-9)
    return (own if clock.counts == "cpu" else wall), others


def _shared() -> Reading:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Linux counts the time of guests twice: once more within user and nice.
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return Reading(time.perf_counter(), time.process_time(), sum(times) - idle - guests)


def _after(device: torch.device) -> Reading:
    torch.accelerator.synchronize(device)
    return Reading(time.perf_counter(), time.process_time())
