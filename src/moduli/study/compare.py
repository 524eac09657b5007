"""Run a plan: finished runs from disk, the rest now, several processes at once if there are any."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moduli.data.task import Task
from moduli.errors import ConfigError
from moduli.study.inflight import BusyError, partial_of
from moduli.study.plan import Plan, Planned, Unit
from moduli.study.records import FAILED, Failure, RunRecord
from moduli.study.run import Listener, RunEvent, execute, failure_of, finished
from moduli.training.kinds.base import TaskKind, get_kind

POLL_SECONDS = 2.0
"""How often runs of another process are looked at."""


@dataclass(frozen=True)
class Study:
    """The runs of one plan: the table that statistics and report are functions of."""

    plan: Plan
    runs: tuple[Planned, ...]
    records: Mapping[str, RunRecord]
    """Finished runs by key."""
    failures: tuple[Failure, ...]

    @property
    def kind(self) -> TaskKind:
        """The kind of its tasks, by which its scores are read."""
        return get_kind(next((r.kind for r in self.records.values()), "classification"))

    @property
    def units(self) -> list[Unit]:
        """What is averaged over, in the order of the plan."""
        return list(dict.fromkeys(run.unit for run in self.runs))

    def finished(self, arm: int, unit: Unit | None = None) -> list[tuple[Planned, RunRecord]]:
        """The finished runs of an arm, of one unit or of all, in the order of the plan."""
        return [
            (run, self.records[run.spec.key])
            for run in self.runs
            if run.arm == arm and unit in (None, run.unit) and run.spec.key in self.records
        ]


def compare(
    plan: Plan,
    tasks: Sequence[Task],
    root: Path,
    *,
    keep_models: tuple[str, ...] = (),
    retry_failed: bool = False,
    checkpoint_every: int | None = None,
    on_event: Listener | None = None,
) -> Study:
    """Do what is left of `plan` under `root` and return all of it.

    Several processes may do so at once: a run that is in the hands of another is left to it, and
    waited for at the end.

    Args:
        plan: what is compared.
        tasks: `plan.tasks`, loaded.
        root: directory of the study; one directory per run.
        keep_models: names of methods whose tuned models are kept with their runs.
        retry_failed: try again what had failed when this began; what fails meanwhile, here or in
            another process, is not tried once more.
        checkpoint_every: steps between checkpoints; None: one per epoch.
        on_event: called with `RunEvent`s.

    Raises:
        ConfigError: nothing to run, something twice, or settings that cannot work.
    """
    runs = plan.runs(tasks)
    records: dict[str, RunRecord] = {}
    failures: list[Failure] = []
    before = {run.spec.key: _noted(root / run.spec.key) for run in runs} if retry_failed else {}
    waiting = list(runs)
    while waiting:
        elsewhere = []
        for run in waiting:
            spec, target = run.spec, root / run.spec.key
            failure = failure_of(spec, target)
            if failure is not None and not (retry_failed and _noted(target) == before[spec.key]):
                _tell(on_event, RunEvent(spec, "failed", failure))
                failures.append(failure)
                continue
            try:
                records[spec.key] = execute(
                    spec,
                    tasks[run.unit.task],
                    target,
                    keep_model=spec.method.name in keep_models,
                    checkpoint_every=checkpoint_every,
                    on_event=on_event,
                )
            except BusyError:
                elsewhere.append(run)
            except Exception:
                failure = failure_of(spec, target)
                if failure is None:  # not the run's fault: a directory that is not ours
                    raise
                failures.append(failure)
        if elsewhere and len(elsewhere) == len(waiting):
            _tell(on_event, RunEvent(elsewhere[0].spec, "elsewhere"))
            time.sleep(POLL_SECONDS)
        waiting = elsewhere
    return Study(plan, tuple(runs), records, tuple(failures))


def collect(plan: Plan, tasks: Sequence[Task], root: Path) -> Study:
    """The study as far as it is finished, without running anything."""
    runs = plan.runs(tasks)
    records, failures = {}, []
    for run in runs:
        target = root / run.spec.key
        record = finished(run.spec, target)
        if record is not None:
            records[run.spec.key] = record
        elif (failure := failure_of(run.spec, target)) is not None:
            failures.append(failure)
    return Study(plan, tuple(runs), records, tuple(failures))


def best_by_validation(runs: Sequence[tuple[Planned, RunRecord]]) -> RunRecord:
    """The run with the best validation score; then the lower loss; then the lower seed.

    The score is the first metric of the task's kind: accuracy for classification. Only the
    validation splits of the domains that were trained on count. Choosing by a test score would
    make that score useless as an estimate.

    Raises:
        ConfigError: no runs, or no validation split.
    """
    if not runs:
        raise ConfigError("There is no finished run to choose from.")

    def order(record: RunRecord) -> Any:
        own = [record.validation.get(name) for name in record.spec.train_domains]
        scores = [score for score in own if score is not None]
        if not scores:
            raise ConfigError("The data has no validation split; give validation_size above 0.")
        keys = [get_kind(record.kind).better(score) for score in scores]
        return (*(sum(column) for column in zip(*keys, strict=True)), record.spec.seed)

    return min((record for _, record in runs), key=order)


def _noted(target: Path) -> tuple[int, int] | None:
    """What tells one note of a run's failure from the next; None if there is none."""
    try:
        note = (partial_of(target) / FAILED).stat()
    except OSError:
        return None
    return note.st_mtime_ns, note.st_ino


def _tell(on_event: Listener | None, event: RunEvent) -> None:
    if on_event is not None:
        on_event(event)
