"""Run a plan: every method with every seed, finished runs from disk, the rest now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moduli.data.task import Task
from moduli.errors import ConfigError
from moduli.study.records import Failure, RunRecord
from moduli.study.run import Listener, RunEvent, execute, failure_of
from moduli.study.spec import MethodSpec, Plan, RunSpec
from moduli.training.kinds.base import TaskKind, get_kind


@dataclass(frozen=True)
class Study:
    """The runs of one plan: the table that statistics and report are functions of."""

    plan: Plan
    train_domain: str
    records: tuple[RunRecord, ...]
    failures: tuple[Failure, ...]

    @property
    def kind(self) -> TaskKind:
        """The kind of its task, by which its scores are read."""
        return get_kind(self.records[0].kind if self.records else "classification")

    def of(self, method: MethodSpec) -> dict[int, RunRecord]:
        """The finished runs of a method, by seed."""
        return {r.spec.seed: r for r in self.records if r.spec.method == method}


def compare(
    plan: Plan,
    task: Task,
    root: Path,
    *,
    keep_models: tuple[str, ...] = (),
    retry_failed: bool = False,
    checkpoint_every: int | None = None,
    on_event: Listener | None = None,
) -> Study:
    """Do what is left of `plan` under `root` and return all of it.

    Args:
        plan: methods, seeds, model, data and settings.
        task: `plan.task`, loaded with `plan.data`.
        root: directory of the study; one directory per run.
        keep_models: names of methods whose tuned models are kept with their runs.
        retry_failed: try again what failed before.
        checkpoint_every: steps between checkpoints; None: one per epoch.
        on_event: called with `RunEvent`s.

    Raises:
        ConfigError: no methods, no seeds, or one of them twice.
    """
    specs = check(plan, task)
    records: list[RunRecord] = []
    failures: list[Failure] = []
    for spec in specs:
        target = root / spec.key
        failure = None if retry_failed else failure_of(spec, target)
        if failure is None:
            try:
                record = execute(
                    spec,
                    task,
                    target,
                    keep_model=spec.method.name in keep_models,
                    checkpoint_every=checkpoint_every,
                    on_event=on_event,
                )
            except Exception:
                failure = failure_of(spec, target)
                if failure is None:  # not the run's fault: a directory that is not ours, a lock
                    raise
            else:
                records.append(record)
                continue
        elif on_event is not None:
            on_event(RunEvent(spec, "failed", failure))
        failures.append(failure)
    return Study(plan, specs[0].train_domain, tuple(records), tuple(failures))


def check(plan: Plan, task: Task) -> list[RunSpec]:
    """The runs of a plan that makes sense.

    Raises:
        ConfigError: no methods, no seeds, or one of them twice; a method's settings cannot work.
    """
    if not plan.methods or not plan.seeds:
        raise ConfigError("A comparison needs at least one method and one seed.")
    for what, values in (("seed", plan.seeds), ("method", plan.methods)):
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            shown = twice[0].name if isinstance(twice[0], MethodSpec) else twice[0]
            raise ConfigError(f"The {what} {shown} is given twice with the same settings.")
    for method in plan.methods:
        method.build()
    return plan.specs(task)


def best_by_validation(runs: Mapping[int, RunRecord]) -> RunRecord:
    """The run with the best validation score; then the lower loss; then the lower seed.

    The score is the first metric of the task's kind: accuracy for classification.

    Only the validation split of the training domain counts. Choosing by a test score would make
    that score useless as an estimate.

    Raises:
        ConfigError: no runs, or no validation split.
    """
    if not runs:
        raise ConfigError("There is no finished run to choose from.")

    def order(record: RunRecord) -> Any:
        if record.validation is None:
            raise ConfigError("The data has no validation split; give validation_size above 0.")
        return (*get_kind(record.kind).better(record.validation), record.spec.seed)

    return min(runs.values(), key=order)
