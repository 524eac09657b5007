"""Do one run of `plans.py`: its record, as plain values."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moduli.data import fetch, load_task
from moduli.data.task import Task
from moduli.study.language import KIND, domain_scores
from moduli.study.pretraining import PretrainSpec, plan, pretrain
from moduli.training.kinds.base import get_kind

if TYPE_CHECKING:
    from benchmarks.moduleformer.plans import Base, Run, Scale, Tuning

REPLAYED = 16
"""Batches of old text on which leakage is measured in turn."""


def execute(run: Run, models: Path) -> dict[str, Any]:
    """The record of a run; models from scratch are trained where they are missing.

    Args:
        run: of a plan.
        models: directory of the models from scratch.
    """
    if hasattr(run.arm, "architecture"):
        record = trained(run.arm, run.seed, run.scale, models)[1]
        return {name: record[name] for name in ("parameters", "active_parameters", "scores")}
    return tune(run.arm, run.seed, run.scale, models)


def task_of(text: str, scale: Scale) -> Task:
    """The texts of a plan: genres of Brown, or manual pages in two languages."""
    limits: dict[str, Any] = {"max_validation": 1, "max_test": scale.tested}
    if text == "brown":
        names = tuple(load_task("brown").domains)[: scale.domains]
        names = tuple(dict.fromkeys((*names, "learned")))
        return load_task("brown", domains=names, max_train=scale.rows, **limits)
    limits["max_test"] *= 10
    return load_task(
        f"parquet:{fetch('manpages') / 'manpages.parquet'}",
        kind=KIND, domain_column="language", group_column="page", domains=("de", "es"),
        max_train=10 * scale.rows, **limits,
    )  # fmt: skip


def trained(base: Base, seed: int, scale: Scale, models: Path) -> tuple[Path, dict[str, Any]]:
    """Directory and record of a model from scratch, trained now or found."""
    settings, vocab = _plans().pretraining(scale), _plans().VOCAB
    task = task_of(base.text, scale)
    spec: PretrainSpec = plan(
        task,
        architecture=base.architecture,  # type: ignore[arg-type]
        size="tiny",
        changes=base.changes,
        vocab_size=vocab,
        train_domains=base.learns,
        settings=settings,
        seed=seed,
    )
    return models / spec.key, pretrain(spec, task, models / spec.key)


def tune(arm: Tuning, seed: int, scale: Scale, models: Path) -> dict[str, Any]:
    """Train a model from scratch further, and score it, pruned or not.

    Returns:
        "before" and "kept", which has for every share of the experts that is kept the scores of
        every domain and the probability that pruning dropped.
    """
    from moduli.training.finetune import finetune
    from moduli.training.trainable import finish, prepare

    directory, base = trained(arm.base, seed, scale, models)
    task = task_of(arm.base.text, scale)
    settings = _plans().tuning(arm, scale)
    model, tokenizer = load(directory)
    if (
        model.config.model_type == "moduleformer"
    ):  # what a tuned model is asked for; the weight of pretraining is not kept
        model.config.aux_loss_weight = 0.0
        model.config.concentration_weight = arm.concentration
    rows = task.domains[arm.learns].train
    torch.manual_seed(seed)
    callbacks = []
    if arm.trains == "new":
        callbacks = [grow(model, tokenizer, task, arm, scale)]
    prepared = prepare(model, settings)
    trainable = sum(p.numel() for p in prepared.parameters() if p.requires_grad)
    finetune(prepared, tokenizer, KIND, rows, settings=settings, seed=seed, callbacks=callbacks)
    model = finish(prepared).eval()
    return {
        "trainable": trainable,
        "before": base["scores"],
        "kept": pruned_scores(model, tokenizer, task, arm, scale),
    }


def grow(model: Any, tokenizer: Any, task: Task, arm: Tuning, scale: Scale) -> Any:
    """Add experts, and return the callback that holds them back where old ones are at home."""
    from moduli.models.moduleformer.growing import extend
    from moduli.models.moduleformer.replay import KeepOld

    attention, feed_forward = _plans().NEW_EXPERTS
    extend(model, attention=attention, feed_forward=feed_forward)
    old = next(name for name in task.domains if name != arm.learns)
    batches = batches_of(model, tokenizer, task.domains[old].train, scale, REPLAYED)
    return KeepOld(batches, leakage_weight=arm.leakage)


def pruned_scores(
    model: Any, tokenizer: Any, task: Task, arm: Tuning, scale: Scale
) -> dict[str, Any]:
    """Scores by the share of experts that are kept, of those that the training text uses most."""
    from moduli.models.moduleformer.pruning import prune
    from moduli.models.moduleformer.usage import expert_use

    found: dict[str, Any] = {}
    use = None
    for keep in arm.keeps:
        kept, dropped = model, 0.0
        if keep < 1:
            if use is None:
                rows = task.domains[arm.learns].train
                use = expert_use(model, batches_of(model, tokenizer, rows, scale, REPLAYED))
            kept = copy.deepcopy(model)
            dropped = prune(kept, use, keep=keep).dropped_mass
        scores = {
            name: domain_scores(kept, tokenizer, splits.test, scale.length)
            for name, splits in task.domains.items()
        }
        found[str(keep)] = {"scores": scores, "dropped": dropped}
    return found


def speeds(arms: tuple[Base, ...], scale: Scale, models: Path) -> dict[str, dict[str, float]]:
    """Tokens per second over those of the first arm, measured in turns in this process.

    Returns:
        For every arm "training" (a step as models were trained, in their type of number and with
        the optimiser) and "reading" (a forward pass in float32, as they were tested).
    """
    from moduli.bench.protocol import Clock, measure

    settings = _plans().pretraining(scale)
    calls: dict[str, Callable[[], object]] = {}
    for arm in arms:
        directory, _ = trained(arm, scale.seeds[0], scale, models)
        model, tokenizer = load(directory)
        rows = task_of(arm.text, scale).domains["learned"].test
        batch = dict(batches_of(model, tokenizer, rows, scale, 1)[0])
        learner = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=settings.learning_rate, fused=True)
        step = partial(trains, learner, optimizer, batch, bf16=bool(settings.bf16))
        calls[f"training/{arm.label}"] = step
        calls[f"reading/{arm.label}"] = lambda m=model, b=batch: reads(m, b)
    clock = Clock.of(torch.device("cpu"), torch.get_num_threads())
    timings = measure(calls, clock, rounds=scale.rounds, rng=random.Random(0))
    found: dict[str, dict[str, float]] = {arm.label: {} for arm in arms}
    for name, timing in timings.items():
        what, label = name.split("/")
        found[label][what] = timings[f"{what}/{arms[0].label}"].median / timing.median
    return found


def trains(
    model: Any, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any], *, bf16: bool
) -> None:
    """One step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.train()(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def reads(model: Any, batch: Mapping[str, Any]) -> None:
    """One pass."""
    model.eval()(**{name: value for name, value in batch.items() if name != "labels"})


def load(directory: Path) -> tuple[Any, Any]:
    """A model that was trained, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def batches_of(
    model: Any, tokenizer: Any, rows: Any, scale: Scale, count: int
) -> list[dict[str, Any]]:
    """The first batches of a text, full ones, eight windows each."""
    kind = get_kind(KIND)
    examples = kind.prepare(tokenizer, rows, scale.length)
    collate = kind.collator(model, tokenizer, scale.length)
    full = [x for x in examples.items if len(x) == scale.length]
    return [collate(full[i : i + 8]) for i in range(0, len(full), 8)][:count]


def _plans() -> Any:
    """The plans beside this file, however it was started."""
    import importlib

    return importlib.import_module(f"{__package__}.plans" if __package__ else "plans")
