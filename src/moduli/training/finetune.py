"""Fine-tune a model: the stock `transformers.Trainer`, set up once and well.

There is no training loop here. What this file adds: settings that fit small encoders, inputs made
batch by batch, a checkpoint that is complete or not there, a stop on NaN and a soft Ctrl-C. What
differs between kinds of tasks is in `moduli.training.kinds`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from moduli.errors import ConfigError, DataError, TrainingError
from moduli.surgery.convert import require_same_layout
from moduli.training.auxiliary import adds_own_losses, loss_maker, with_stock_auxiliary
from moduli.training.batches import ShuffledByLength
from moduli.training.kinds.base import TaskKind, get_kind
from moduli.training.kinds.per_token import token_loss
from moduli.training.settings import FinetuneSettings
from moduli.training.trainable import expect_updates


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in training; `checkpoint` is where it can go on, or None if nothing was saved."""

    def __init__(self, checkpoint: Path | None) -> None:
        super().__init__("training was interrupted")
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished fine-tuning run says about itself; the model was trained in place."""

    steps: int
    seconds: float
    """Time of this call; after a resume without the time before it."""
    losses: tuple[float, ...]
    """The loss of every step; after a resume also of those before it."""
    resumed_from: int | None
    """The step of the checkpoint training went on from, or None."""


def finetune(
    model: nn.Module,
    tokenizer: Any,
    task_kind: str,
    train: Any,
    *,
    settings: FinetuneSettings,
    seed: int,
    out: Path | None = None,
    checkpoint_every: int | None = None,
    on_progress: Callable[[Any], None] | None = None,
    callbacks: Sequence[Any] = (),
) -> FinetuneResult:
    """Train `model` in place on `train`.

    Same model, data, settings, seed, machine and number of threads give the same weights, bit for
    bit, also across a kill and a resume.

    Args:
        model: a transformers model with the head of the task, dense or converted; what
            `moduli.training.trainable.prepare` returned, for other settings than trains="all".
        tokenizer: its tokenizer, image processor or feature extractor; texts are cut to
            `settings.max_length` and padded per batch.
        task_kind: "classification" or another kind (`moduli.training.kinds`).
        train: a sequence of rows (a `datasets.Dataset` or a list of dicts) with the columns of
            the kind: "text", "label" and, if a pair, "text_pair" for classification.
        settings: everything that shapes the result.
        seed: order of the data and dropout.
        out: directory for checkpoints. If one that is complete lies there, training goes on from
            it. None: no checkpoints.
        checkpoint_every: steps between checkpoints; None: one per epoch.
        on_progress: called with a `moduli.training.callbacks.Progress` after each step.
        callbacks: more callbacks for the Trainer.

    Raises:
        ConfigError: there is no such kind, labels of it cannot be smoothed, or less than a step
            between checkpoints.
        DataError: no rows, or rows without a column that the kind needs.
        CheckpointError: the checkpoint in `out` has its neurons in another order than the model.
        TrainingError: the loss or the gradient became infinite or NaN. The model keeps the weights
            of the step before; they are in `out/last-good`.
        Interrupted: Ctrl-C (a KeyboardInterrupt).
    """
    from moduli.training.callbacks import soft_interrupt

    kind = get_kind(task_kind)
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ConfigError(
            f"checkpoint_every is {checkpoint_every}; it is a number of steps, 1 or more, or None "
            "for one checkpoint per epoch."
        )
    if len(train) == 0:
        raise DataError("The training data has no rows; give at least one.")
    if missing := set(kind.columns) - set(train[0]):
        raise DataError(
            f"The training data has no column {' and '.join(sorted(map(repr, missing)))}; "
            f"its columns are {', '.join(sorted(train[0]))}."
        )
    maker = loss_maker(model)
    smoothing = maker.smooth_labels(settings.label_smoothing) if maker else nullcontext()
    with (
        tempfile.TemporaryDirectory(prefix="moduli-") as scratch,
        soft_interrupt() as stop,
        smoothing,
    ):
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        checkpoint = last_checkpoint(out) if out is not None else None
        resumed_from = None if checkpoint is None else _step_of(checkpoint)
        if checkpoint is not None and (checkpoint / "config.json").is_file():
            require_same_layout(model, checkpoint)
        trainer = _trainer(
            model,
            tokenizer,
            kind,
            train,
            settings=settings,
            seed=seed,
            directory=out or Path(scratch),
            save=out is not None,
            checkpoint_every=checkpoint_every,
            resumed_from=resumed_from,
            on_progress=on_progress,
            stop=stop,
            callbacks=callbacks,
        )
        if checkpoint is not None:
            expect_updates(model)
        try:
            result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except TrainingError as error:
            raise TrainingError(_advice(str(error), trainer, out)) from None
        finally:
            _without_autocast(model)
    if stop.is_set():
        raise Interrupted(last_checkpoint(out) if out is not None else None)
    history = trainer.state.log_history
    return FinetuneResult(
        steps=trainer.state.global_step,
        seconds=float(result.metrics["train_runtime"]),
        losses=tuple(float(entry["loss"]) for entry in history if "loss" in entry),
        resumed_from=resumed_from,
    )


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete Trainer checkpoint in `directory`; incomplete ones are deleted.

    The Trainer writes `trainer_state.json` last, so a checkpoint cut short by a kill has none, or
    one that is not JSON.
    """
    best = None
    for path in sorted(directory.glob("checkpoint-*"), key=_step_of):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path)
        else:
            best = path
    return best


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _trainer(
    model: Any,
    processor: Any,
    kind: TaskKind,
    train: Any,
    *,
    settings: FinetuneSettings,
    seed: int,
    directory: Path,
    save: bool,
    checkpoint_every: int | None,
    resumed_from: int | None,
    on_progress: Callable[[Any], None] | None,
    stop: threading.Event,
    callbacks: Sequence[Any],
) -> Any:
    from torch.utils.data import DataLoader, Dataset
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from moduli.training.callbacks import (
        KeepLayout,
        ReleaseGrowth,
        ReportProgress,
        StopOnNonFinite,
        StopWhenAsked,
    )

    strategy = "no" if not save else "epoch" if checkpoint_every is None else "steps"
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule.replace("-", "_"),
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        # The unfused step of a small encoder costs more than its forward pass: most parameters
        # are embedding rows.
        optim="adamw_torch_fused",
        # Said explicitly, because bf16 is refused on a CPU that the Trainer only fell back to.
        use_cpu=not torch.accelerator.is_available(),
        bf16=bool(settings.resolved().bf16),
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy=strategy,
        save_steps=checkpoint_every or 500,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    examples = kind.prepare(processor, train, settings.max_length)
    collate = kind.collator(model, processor, settings.max_length)
    order = ShuffledByLength(examples.lengths, settings.batch_size, seed)

    class GroupedTrainer(Trainer):
        """The stock Trainer with our order of the data, by the methods it offers for that."""

        def set_initial_training_values(self, *args: Any) -> Any:
            """No epoch is left of a run that has its steps; the stock Trainer makes one more."""
            values = super().set_initial_training_values(*args)
            return (0, *values[1:]) if values[-1] <= (resumed_from or 0) else values

        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(
                DataLoader(
                    cast("Dataset[Any]", examples.items),
                    batch_size=self._train_batch_size,
                    sampler=order,
                    collate_fn=collate,
                    pin_memory=torch.cuda.is_available(),
                )
            )

    # A loss made of the logits would lack what the model adds to its own.
    adds = kind.name == "language-modeling" and adds_own_losses(model)
    model_loss = loss_maker(model) is not None or adds
    loss = kind.loss
    if settings.label_smoothing:
        if loss is not token_loss:
            raise ConfigError(
                f"label_smoothing is {settings.label_smoothing}; it is for models from text to "
                f"text, and this is a task of {kind.name}. Leave it 0."
            )
        loss = partial(token_loss, label_smoothing=settings.label_smoothing)
    hooks = [StopOnNonFinite(), StopWhenAsked(stop, save=save), KeepLayout(), ReleaseGrowth()]
    trainer = GroupedTrainer(
        model=model,
        args=arguments,
        train_dataset=examples.items,
        data_collator=collate,
        processing_class=processor,
        callbacks=[*hooks, *callbacks],
        compute_loss_func=None if model_loss else with_stock_auxiliary(loss, model),
    )
    # The forward of a classifier takes **kwargs, from which the Trainer concludes that it divides
    # its loss by `num_items_in_batch`. It does not: it returns the mean of its batch. Without this
    # the gradients of accumulated batches would be added up instead of averaged. A kind that has
    # to divide by all labels of a step does so in its own loss, which gets that number either way,
    # and so do ModuleFormer and THOR in their own.
    trainer.model_accepts_loss_kwargs = model_loss
    trainer.remove_callback(PrinterCallback)
    if on_progress is not None:
        trainer.add_callback(ReportProgress(on_progress))
    return trainer


def _without_autocast(model: nn.Module) -> None:
    """Take away the wrapper by which Accelerate trains in bfloat16.

    It would stay, so that the model scored here was not the one that is saved and loaded.
    (Accelerate's own way to unwrap also strips what transformers has wrapped around a forward.)
    """
    before = model.__dict__.pop("_original_forward", None)
    if before is not None:
        del model.__dict__["forward"]
        if before.__func__ is not type(model).forward:
            model.forward = before


def _advice(what: str, trainer: Any, out: Path | None) -> str:
    if out is None:
        kept = "The model keeps the weights of the step before."
    else:
        trainer.save_model(str(out / "last-good"))
        kept = f"The weights of the step before are in {out / 'last-good'}."
        if (checkpoint := last_checkpoint(out)) is not None:
            kept += f" The last checkpoint is {checkpoint}."
    return f"{what}. Training stopped. {kept} Try a lower learning rate, or bf16 off."
