"""Do one run: load, convert, tune, evaluate, merge, evaluate again, and write it all down at once.

Work in flight lives in a hidden directory beside the final one (`.NAME.partial`), with the
Trainer's checkpoints in it; a run that was killed goes on from the last of them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moduli.data.task import Task
from moduli.errors import CheckpointError, ConfigError
from moduli.study.environment import hardware, versions
from moduli.study.records import FAILED, RECORD, Failure, RunRecord, read_record, write_json
from moduli.study.sample import rows_to_show, sample_batches
from moduli.study.spec import RunSpec, plain
from moduli.training.kinds.base import Examples, Output, get_kind

Stage = Literal["known", "started", "converted", "step", "evaluating", "finished", "failed"]


@dataclass(frozen=True)
class RunEvent:
    """Something to show: which run, what happened, and what belongs to it.

    `detail` is a `Progress` (stage "step"), a `ConversionReport` ("converted"), the name of what
    is evaluated ("evaluating"), a `RunRecord` ("known", "finished") or a `Failure` ("failed").
    """

    spec: RunSpec
    stage: Stage
    detail: Any = None


Listener = Callable[[RunEvent], None]


def execute(
    spec: RunSpec,
    task: Task,
    target: Path,
    *,
    keep_model: bool = False,
    checkpoint_every: int | None = None,
    on_event: Listener | None = None,
) -> RunRecord:
    """The record of the run, done now or found in `target`.

    Args:
        spec: what to run.
        task: its task, loaded.
        target: directory of the run. It appears when the run is complete.
        keep_model: write the tuned model into `target` as well (an ordinary checkpoint, with
            what `moduli.load` needs to make it modular again).
        checkpoint_every: steps between checkpoints; None: one per epoch.
        on_event: called with `RunEvent`s.

    Raises:
        CheckpointError: `target` exists and is not this run.
        ConfigError: another process is working on it.
        Exception: whatever stopped the run; its reason is kept (see `failure_of`), and the next
            call starts the run again.
    """
    tell = on_event or (lambda event: None)
    if (record := finished(spec, target)) is not None:
        tell(RunEvent(spec, "known", record))
        return record
    target = target.absolute()
    partial = partial_of(target)
    with _locked(target):
        if (record := finished(spec, target)) is not None:
            tell(RunEvent(spec, "known", record))
            return record
        if not _same_spec(partial, spec) or (partial / FAILED).exists():
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        write_json(partial / "spec.json", spec.to_dict())
        tell(RunEvent(spec, "started"))
        try:
            record = _work(spec, task, partial, keep_model, checkpoint_every, tell)
        except Exception as error:
            failure = Failure(spec, type(error).__name__, str(error))
            write_json(partial / FAILED, {"error": failure.error, "message": failure.message})
            tell(RunEvent(spec, "failed", failure))
            raise
        os.rename(partial / "result", target)
        shutil.rmtree(partial)
    tell(RunEvent(spec, "finished", record))
    return record


def partial_of(target: Path) -> Path:
    """Where a run that is to appear at `target` is while it is in flight."""
    return target.parent / f".{target.name}.partial"


def failure_of(spec: RunSpec, target: Path) -> Failure | None:
    """Why an earlier try of this run stopped, or None."""
    partial = partial_of(target.absolute())
    try:
        data = json.loads((partial / FAILED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Failure(spec, data["error"], data["message"]) if _same_spec(partial, spec) else None


def finished(spec: RunSpec, target: Path) -> RunRecord | None:
    """The record in `target` if it is this run; None if nothing is there.

    Raises:
        CheckpointError: something else is there.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not (target / RECORD).is_file():
        raise CheckpointError(
            f"{target} exists and is not a run of moduli (it has no {RECORD}). "
            "Choose another directory, or move it away."
        )
    record = read_record(target)
    if record.spec.key != spec.key:
        raise CheckpointError(
            f"{target} holds another run ({_difference(record.spec, spec)}). "
            "Choose another directory, or delete it."
        )
    return record


def load_model(spec: RunSpec, task: Task) -> tuple[Any, Any]:
    """The pretrained model with a head for the task, and its processor.

    A new head is drawn from the run's seed, so methods with one seed start from one head.

    Raises:
        CheckpointError: no such model, or its weights are not safetensors.
    """
    import torch
    import transformers

    from moduli.data import resolve_model

    path = resolve_model(spec.model)
    kind = get_kind(task.kind)
    transformers.set_seed(spec.seed)
    try:
        processor = kind.load_processor(path)
        model = getattr(transformers, kind.auto_class).from_pretrained(
            path, **kind.head(task.label_names), dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{spec.model!r} does not load as {kind.noun}: {_first_line(error)}"
        ) from error
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model, processor


def _work(
    spec: RunSpec,
    task: Task,
    partial: Path,
    keep_model: bool,
    checkpoint_every: int | None,
    tell: Listener,
) -> RunRecord:
    import moduli
    from moduli.experts.kernels import watch_kernels
    from moduli.training.finetune import finetune, outputs_of

    clock = time.perf_counter
    start = clock()
    kind = get_kind(task.kind)
    length = spec.settings.max_length
    model, processor = load_model(spec, task)
    train = task.domains[spec.train_domain].train
    assert train is not None  # `choose_domain` saw to it
    method = spec.method.build()
    count = rows_to_show(method)
    batches = sample_batches(method, model, processor, kind, train, count=count, max_length=length)
    conversion = moduli.convert(model, method, batch=batches)
    tell(RunEvent(spec, "converted", conversion))
    converted = clock()
    with watch_kernels() as in_training:
        result = finetune(
            model,
            processor,
            task.kind,
            train,
            settings=spec.settings,
            seed=spec.seed,
            out=partial / "checkpoints",
            checkpoint_every=checkpoint_every,
            on_progress=lambda progress: tell(RunEvent(spec, "step", progress)),
        )
    trained = clock()

    shutil.rmtree(partial / "result", ignore_errors=True)
    if keep_model:
        moduli.save(model, partial / "result", processor)
    else:
        (partial / "result").mkdir()

    tests = {name: s.test for name, s in task.domains.items() if s.test is not None}

    def said_to(what: str) -> dict[str, tuple[Examples, list[Output]]]:
        found = {}
        for name, rows in tests.items():
            tell(RunEvent(spec, "evaluating", f"{name}{what}"))
            found[name] = outputs_of(kind, model, processor, rows, max_length=length)
        return found

    def score_all(
        found: dict[str, tuple[Examples, list[Output]]],
    ) -> dict[str, dict[str, int | float]]:
        return {
            name: kind.score(outputs, examples, tests[name]).to_dict()
            for name, (examples, outputs) in found.items()
        }

    validation = task.domains[spec.train_domain].validation
    chosen_by = None
    if validation is not None:
        tell(RunEvent(spec, "evaluating", "validation"))
        examples, said = outputs_of(kind, model, processor, validation, max_length=length)
        chosen_by = kind.score(said, examples, validation).to_dict()
    with watch_kernels() as in_evaluation:
        routed = said_to("")
    merged = changed = merge = None
    if moduli.is_modular(model):
        merge = moduli.merge(model).to_dict()
        dense = said_to(", merged")
        merged = score_all(dense)
        changed = {name: kind.changed(routed[name][1], dense[name][1]) for name in tests}
    tail = result.losses[-max(1, len(result.losses) // 10) :]
    record = RunRecord(
        spec=spec,
        scores=score_all(routed),
        validation=chosen_by,
        merged=merged,
        changed=changed,
        conversion=None if conversion is None else plain(conversion.to_dict()),
        merge=None if merge is None else plain(merge),
        steps=result.steps,
        final_loss=sum(tail) / len(tail),
        seconds={
            "convert": converted - start,
            "train": trained - converted,
            "evaluate": clock() - trained,
        },
        environment={
            "versions": versions(),
            "hardware": hardware(),
            "kernels": {"training": sorted(in_training), "evaluation": sorted(in_evaluation)},
        },
        kind=kind.name,
    )
    write_json(partial / "result" / RECORD, record.to_dict())
    return record


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"Another process is working on {target}. Wait for it, or choose another directory."
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _same_spec(partial: Path, spec: RunSpec) -> bool:
    try:
        data = json.loads((partial / "spec.json").read_text(encoding="utf-8"))
        return RunSpec.from_dict(data).key == spec.key
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _difference(old: RunSpec, new: RunSpec) -> str:
    a, b = old.to_dict(), new.to_dict()
    return ", ".join(sorted(key for key in a if a[key] != b[key])) + " differs"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
