"""How long a study will take, before it starts.

Where an arm has finished runs, their times say it: training scaled by the rows that a run trains
on, evaluation and inspection by those it scores and looks at, the median over runs that were not
interrupted. Where it has none, it is tried: the model is loaded and converted, a few steps are
done and a few rows are scored.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moduli.data.task import Task
from moduli.errors import ModuliError
from moduli.study.compare import Study
from moduli.study.plan import Planned, Unit
from moduli.study.records import RunRecord
from moduli.study.run import load_model, training_rows
from moduli.study.sample import rows_to_show, sample_batches
from moduli.study.spec import RunSpec
from moduli.study.testing import ROWS_TO_COUNT
from moduli.study.watching import INSPECTED_ROWS
from moduli.study.wording import duration
from moduli.training.kinds.base import get_kind

STEPS = 3
"""Training steps of a trial. The first is not counted: it pays for things that happen once."""
ROWS = 64
"""Rows that a trial scores."""


@dataclass(frozen=True)
class ArmEstimate:
    """One arm: what is left of it.

    Attributes:
        label: what it is called.
        finished: runs that are there.
        left: runs that are not.
        seconds: that those will take; None if a trial of it failed.
        tried: whether it was tried, rather than read from finished runs.
    """

    label: str
    finished: int
    left: int
    seconds: float | None
    tried: bool


@dataclass(frozen=True)
class Estimate:
    """How long the rest of a study takes on this machine, in one process."""

    arms: tuple[ArmEstimate, ...]

    @property
    def seconds(self) -> float:
        """Of all that is left, as far as it is known."""
        return sum(arm.seconds or 0.0 for arm in self.arms)

    @property
    def finished(self) -> int:
        """Runs that are there."""
        return sum(arm.finished for arm in self.arms)

    @property
    def left(self) -> int:
        """Runs that are not."""
        return sum(arm.left for arm in self.arms)

    @property
    def sentence(self) -> str:
        """For people: "about 25 min (12 of 48 runs are finished)"."""
        total = self.finished + self.left
        if self.left == 0:
            return f"nothing is left to do (all {total} runs are finished)"
        text = f"about {duration(self.seconds)} ({self.finished} of {total} runs are finished)"
        unknown = [arm.label for arm in self.arms if arm.seconds is None]
        if not unknown:
            return text
        return f"{text}, not counting {' and '.join(unknown)}, which could not be tried"


@dataclass(frozen=True)
class Work:
    """What the time of a run depends on: rows trained on (each epoch anew) and rows scored.

    Rows on which experts are looked at or counted are among those scored: it is a forward pass too.
    """

    trained: int
    scored: int


@dataclass(frozen=True)
class Pace:
    """Seconds per row trained on, per row scored, and once per run."""

    train: float
    score: float
    once: float

    def of(self, work: Work) -> float:
        """Seconds of a run."""
        return self.train * work.trained + self.score * work.scored + self.once


def estimate(study: Study, tasks: Sequence[Task], *, retry_failed: bool = False) -> Estimate:
    """Seconds that the rest of a study will take, arm by arm.

    Args:
        study: as `moduli.study.compare.collect` returns it.
        tasks: those of its plan, loaded.
        retry_failed: whether what failed is tried again; else it is not left to do.
    """
    failed = set() if retry_failed else {failure.spec.key for failure in study.failures}
    arms = []
    for number, label in enumerate(study.plan.labels):
        runs = [run for run in study.runs if run.arm == number and run.spec.key not in failed]
        left = [run for run in runs if run.spec.key not in study.records]
        known = study.finished(number)
        # The clocks of a resumed run have not seen all of it.
        whole = [run for run in known if run[1].environment.get("resumed_from") is None]
        seconds: float | None = 0.0
        if left:
            seconds = _of_records(left, whole, tasks) if whole else _of_trial(left, tasks)
        arms.append(ArmEstimate(label, len(known), len(left), seconds, bool(left and not whole)))
    return Estimate(tuple(arms))


def work_of(spec: RunSpec, task: Task) -> Work:
    """How many rows a run trains on and scores, all epochs, edits and inspections together."""
    parts = [task.domains[name].train for name in spec.train_domains]
    rows = sum(math.ceil(spec.fraction * len(part)) for part in parts if part is not None)
    settings = spec.settings
    per_step = settings.batch_size * settings.gradient_accumulation_steps
    trained = settings.epochs * rows
    if settings.max_steps is not None:
        trained = settings.max_steps * min(per_step, rows)
    splits = task.domains.values()
    validation = sum(len(s.validation) for s in splits if s.validation is not None)
    tests = [len(s.test) for s in splits if s.test is not None]
    scored = validation + sum(tests) * (1 + len(spec.edits))
    method = spec.method.build()
    if method.modular and method.routes:
        scored += sum(min(INSPECTED_ROWS, count) for count in tests)
    scored += min(ROWS_TO_COUNT, rows) * sum(edit.name == "pruned" for edit in spec.edits)
    return Work(trained, scored)


def _of_records(
    left: Sequence[Planned], known: Sequence[tuple[Planned, RunRecord]], tasks: Sequence[Task]
) -> float:
    """From finished runs of the arm: of the same unit if there are any, else of all."""
    paces: dict[Unit, list[Pace]] = {}
    for run, record in known:
        paces.setdefault(run.unit, []).append(
            _pace(record, work_of(run.spec, tasks[run.unit.task]))
        )
    everything = [pace for found in paces.values() for pace in found]
    return sum(
        _median(paces.get(run.unit, everything)).of(work_of(run.spec, tasks[run.unit.task]))
        for run in left
    )


def _pace(record: RunRecord, work: Work) -> Pace:
    seconds = dict(record.seconds)
    train = seconds.pop("train", 0.0)
    score = seconds.pop("evaluate", 0.0) + seconds.pop("inspect", 0.0)
    return Pace(train / max(1, work.trained), score / max(1, work.scored), sum(seconds.values()))


def _median(paces: Sequence[Pace]) -> Pace:
    return Pace(
        *(
            statistics.median(getattr(pace, field.name) for pace in paces)
            for field in dataclasses.fields(Pace)
        )
    )


def _of_trial(left: Sequence[Planned], tasks: Sequence[Task]) -> float | None:
    """From a trial of the first run of the arm; None if it fails, as the run itself will."""
    first = left[0]
    try:
        pace = try_out(first.spec, tasks[first.unit.task])
    except (ModuliError, ValueError, RuntimeError):
        return None
    return sum(pace.of(work_of(run.spec, tasks[run.unit.task])) for run in left)


def try_out(spec: RunSpec, task: Task) -> Pace:
    """The pace of a run, by doing its first steps and scoring a few rows."""
    import moduli
    from moduli.training.evaluate import outputs_of
    from moduli.training.finetune import finetune
    from moduli.training.trainable import finish, prepare

    clock = time.perf_counter
    kind = get_kind(task.kind)
    length = spec.settings.max_length
    per_step = spec.settings.batch_size * spec.settings.gradient_accumulation_steps
    start = clock()
    model, processor = load_model(spec, task)
    rows = training_rows(spec, task)
    method = spec.method.build()
    batches = sample_batches(
        method, model, processor, kind, rows, count=rows_to_show(method), max_length=length
    )
    moduli.convert(model, method, batch=batches)
    once = clock() - start

    tuning = prepare(model, spec.settings)
    times = [clock()]
    few = _spread(rows, STEPS * per_step)
    finetune(
        tuning,
        processor,
        task.kind,
        few,
        settings=dataclasses.replace(spec.settings, max_steps=STEPS),
        seed=spec.seed,
        on_progress=lambda progress: times.append(clock()),
    )
    model = finish(tuning)
    first, *steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    step = statistics.mean(steps)
    once += max(0.0, first - step)

    tests = [s.test for s in task.domains.values() if s.test is not None]
    start, scored = clock(), 0
    for split in tests[:1]:
        some = _spread(split, ROWS)
        outputs_of(kind, model, processor, some, max_length=length)
        scored = len(some)
    return Pace(step / min(per_step, len(few)), (clock() - start) / max(1, scored), once)


def _spread(rows: Any, count: int) -> Any:
    """At most `count` of the rows, from all over the table."""
    step = max(1, len(rows) // count)
    return rows.select(range(0, len(rows), step)[:count])
