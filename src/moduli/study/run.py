"""Do one run: load, convert, tune, test, test after every edit, and write it all down at once.

Work in flight lives in a hidden directory beside the final one (`moduli.study.inflight`), with
the Trainer's checkpoints in it; a run that was killed goes on from the last of them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moduli.data.task import Task
from moduli.errors import CheckpointError
from moduli.study.environment import hardware, versions
from moduli.study.inflight import disk_named, disk_trouble, locked, partial_of, sweep
from moduli.study.records import (
    FAILED,
    INSPECTION,
    RECORD,
    Failure,
    RunRecord,
    read_record,
    write_json,
)
from moduli.study.sample import rows_to_show, sample_batches
from moduli.study.spec import RunSpec, plain
from moduli.study.testing import test
from moduli.study.watching import WINDOWS, Clocks, write_inspection
from moduli.training.images import scale_images
from moduli.training.kinds.base import get_kind
from moduli.training.translator import fresh_translator, require_learnt, size_of

Stage = Literal[
    "known", "started", "converted", "step", "evaluating", "finished", "failed", "elsewhere"
]


@dataclass(frozen=True)
class RunEvent:
    """Something to show: which run, what happened, and what belongs to it.

    `detail` is a `Progress` (stage "step"), a `ConversionReport` ("converted"), the name of what
    is evaluated ("evaluating"), a `RunRecord` ("known", "finished") or a `Failure` ("failed");
    "elsewhere": another process is working on it.
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
        CheckpointError: `target` exists and is not this run, or the disk is full or cannot be
            written to; then what is there is kept, and the next call goes on.
        BusyError: another process is working on it.
        Exception: whatever stopped the run; its reason is kept (see `failure_of`), and the next
            call starts the run again.
    """
    tell = on_event or (lambda event: None)
    target = target.absolute()
    if (record := finished(spec, target)) is not None:
        sweep(target)
        tell(RunEvent(spec, "known", record))
        return record
    partial = partial_of(target)
    with disk_named(target), locked(target):
        if (record := finished(spec, target)) is not None:
            shutil.rmtree(partial, ignore_errors=True)
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
            if disk_trouble(error, target) is None:  # which is not the run's fault
                failure = Failure(spec, type(error).__name__, str(error))
                write_json(partial / FAILED, {"error": failure.error, "message": failure.message})
                tell(RunEvent(spec, "failed", failure))
            raise
        os.rename(partial / "result", target)
        shutil.rmtree(partial)
    tell(RunEvent(spec, "finished", record))
    return record


def failure_of(spec: RunSpec, target: Path) -> Failure | None:
    """Why an earlier try of this run stopped, or None."""
    partial = partial_of(target.absolute())
    try:
        data = json.loads((partial / FAILED).read_text(encoding="utf-8"))
        failure = Failure(spec, data["error"], data["message"])
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None
    return failure if _same_spec(partial, spec) else None


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

    A new head is drawn from the run's seed, so methods with one seed start from one head; so are
    all weights of "translator:SIZE", whose tokenizer is learnt from the run's training rows.

    Raises:
        CheckpointError: no such model, or its weights are not safetensors.
        DataError: a translator would be tested in a language that it does not learn.
    """
    import torch
    import transformers

    from moduli.data import resolve_model

    path = resolve_model(spec.model)
    kind = get_kind(task.kind)
    transformers.set_seed(spec.seed)
    if (size := size_of(spec.model)) is not None:
        model, processor = fresh_translator(size, kind.name, training_rows(spec, task))
        parts = ((s.validation, s.test) for s in task.domains.values())
        require_learnt(processor, [part for pair in parts for part in pair if part is not None])
        return _placed(model), processor
    try:
        processor = kind.load_processor(path)
        model = getattr(transformers, kind.auto_class).from_pretrained(
            path, **kind.head(task.label_names), dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{spec.model!r} does not load as {kind.noun}: {_first_line(error)}"
        ) from error
    if spec.settings.image_size is not None:
        scale_images(model, processor, spec.settings.image_size)
    return _placed(model), processor


def _placed(model: Any) -> Any:
    """The model on the accelerator, if there is one."""
    import torch

    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model


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
    from moduli.inspect.training import SelectionOverTraining
    from moduli.study.cost import PeakMemory, measure_cost
    from moduli.training.finetune import finetune
    from moduli.training.trainable import finish, prepare

    kind = get_kind(task.kind)
    clocks = Clocks()
    with clocks("load"):
        model, processor = load_model(spec, task)
    train = training_rows(spec, task)
    method = spec.method.build()
    with clocks("convert"):
        batches = sample_batches(
            method,
            model,
            processor,
            kind,
            train,
            count=rows_to_show(method),
            max_length=spec.settings.max_length,
        )
        conversion = moduli.convert(model, method, batch=batches)
        shown = {name: value for name, value in batches[0].items() if name != "labels"}
    tell(RunEvent(spec, "converted", conversion))
    tuning = prepare(model, spec.settings)
    cost = measure_cost(tuning, conversion, shown)
    with clocks("train"), watch_kernels() as in_training, PeakMemory() as memory:
        selection = (
            SelectionOverTraining(at_most=WINDOWS) if method.modular and method.routes else None
        )
        result = finetune(
            tuning,
            processor,
            task.kind,
            train,
            settings=spec.settings,
            seed=spec.seed,
            out=partial / "checkpoints",
            checkpoint_every=checkpoint_every,
            on_progress=lambda progress: tell(RunEvent(spec, "step", progress)),
            callbacks=() if selection is None else (selection,),
        )
        model = finish(tuning)

    shutil.rmtree(partial / "result", ignore_errors=True)
    if keep_model:
        moduli.save(model, partial / "result", processor)
    else:
        (partial / "result").mkdir()
    if selection is not None:
        tell(RunEvent(spec, "evaluating", "what experts do"))
        with clocks("inspect"):
            path = partial / "result" / INSPECTION
            write_inspection(spec, task, model, processor, selection, path)
    with clocks("evaluate"), watch_kernels() as in_evaluation:
        found = test(spec, task, model, processor, train, lambda what: _now(tell, spec, what))
    tail = result.losses[-max(1, len(result.losses) // 10) :]
    record = RunRecord(
        spec=spec,
        kind=kind.name,
        scores=found.scores,
        validation=found.validation,
        variants=found.variants,
        conversion=None if conversion is None else plain(conversion.to_dict()),
        cost=cost | {"peak_memory_bytes": memory.peak},
        steps=result.steps,
        final_loss=sum(tail) / len(tail),
        seconds=clocks.wall,
        cpu_seconds=clocks.cpu,
        environment={
            "versions": versions(),
            "metrics": kind.signatures(),
            "hardware": hardware(),
            "kernels": {"training": sorted(in_training), "evaluation": sorted(in_evaluation)},
            "resumed_from": result.resumed_from,
        },
    )
    write_json(partial / "result" / RECORD, record.to_dict())
    return record


def training_rows(spec: RunSpec, task: Task) -> Any:
    """The rows that a run trains on: the first of every source, mixed where there are several."""
    from datasets import concatenate_datasets

    parts = []
    for name in spec.train_domains:
        rows = task.domains[name].train
        assert rows is not None  # the plan saw to it
        parts.append(rows.select(range(math.ceil(spec.fraction * len(rows)))))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts).shuffle(seed=0)


def _now(tell: Listener, spec: RunSpec, what: str) -> None:
    tell(RunEvent(spec, "evaluating", what))


def _same_spec(partial: Path, spec: RunSpec) -> bool:
    try:
        data = json.loads((partial / "spec.json").read_text(encoding="utf-8"))
        return RunSpec.from_dict(data).key == spec.key
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _difference(old: RunSpec, new: RunSpec) -> str:
    if old.code != new.code:
        return f"of moduli {old.code}; this is {new.code}"
    a, b = old.to_dict(), new.to_dict()
    return ", ".join(sorted(key for key in a if a[key] != b[key])) + " differs"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
