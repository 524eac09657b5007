"""The stock Trainer and `finetune` train THOR by its own loss, accumulated, and on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

import moduli
from moduli.data.kinds import KINDS
from moduli.errors import ConfigError, ModelError
from moduli.losses.consistency import consistency_loss_by_autograd
from moduli.methods.thor import last_step, start_step
from moduli.methods.thor.passes import Passes, StepRecord, passes_of
from moduli.methods.thor.plan import RoutingPlan
from moduli.training.evaluate import evaluate
from moduli.training.finetune import finetune
from moduli.training.settings import FinetuneSettings
from tests import tiny
from tests.methods.thor.models import assert_drawn_train, assert_same, build, gradients, parted
from tests.training.ddp_worker import Gradients, InOrder, arguments
from tests.training.test_finetune_kinds import load

OTHER_KINDS = ("regression", "language-modeling", "seq2seq")


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[RoutingPlan]:
    """The plan of every training forward, as it is drawn."""
    seen: list[RoutingPlan] = []
    before = Passes.before

    def spy(self: Passes, model: Any, args: Any, kwargs: Any) -> Any:
        result = before(self, model, args, kwargs)
        if self.chooser.plan is not None:
            seen.append(self.chooser.plan)
        return result

    monkeypatch.setattr(Passes, "before", spy)
    return seen


def text_rows() -> list[dict[str, torch.Tensor]]:
    """Texts to write; the second half has fewer labels."""
    rows = []
    for row in tiny.rows("llama", 4):
        labels = row["labels"].clone()
        labels[4 + len(rows) :] = -100
        rows.append({**row, "labels": labels})
    return rows


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_accumulated_batches_are_divided_by_all_labels_of_the_step(
    family: str, tmp_path: Path, plans: list[RoutingPlan]
) -> None:
    model = parted(build(family, alpha=2.0, pair="distinct"))
    rows = tiny.rows("bert", 4) if family == "bert" else text_rows()
    seen = Gradients()
    trainer = InOrder(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=rows,
        callbacks=[seen],
    )
    trainer.train()
    assert [(plan.step, plan.micro) for plan in plans] == [(0, 0), (0, 1)]
    logged = [entry["consistency"] for entry in trainer.state.log_history if "consistency" in entry]

    model.train().zero_grad(set_to_none=True)
    start_step(model, 0)
    shift = 1 if family == "llama" else 0
    items = sum(int((row["labels"].reshape(-1)[shift:] != -100).sum()) for row in rows)
    records: list[StepRecord] = []
    for part in (rows[:2], rows[2:]):
        model(**tiny.batch(part), num_items_in_batch=items).loss.backward()
        record = last_step(model)
        assert record is not None
        records.append(record)
    assert sum(record.count for record in records) == items
    (found,) = seen.steps
    assert_same(found, gradients(model), rtol=1e-4, atol=1e-6)
    apart = sum(float(record.disagreement) for record in records)
    assert logged == [pytest.approx(apart / items, rel=1e-4)]
    assert apart > 0


def test_a_resumed_run_draws_what_it_would_have_drawn(
    tmp_path: Path, plans: list[RoutingPlan]
) -> None:
    def train(steps: int, resume: Path | None) -> Any:
        model = build("bert")
        changes = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        settings = arguments(tmp_path, learning_rate=0.01, gradient_accumulation_steps=2, **changes)
        trainer = InOrder(model=model, args=settings, train_dataset=tiny.rows("bert", 16))
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return model

    whole = train(4, None)
    expected = list(plans)
    assert [(plan.step, plan.micro) for plan in expected] == [(s, m) for s in range(4)
                                                              for m in range(2)]  # fmt: skip
    plans.clear()
    resumed = train(4, tmp_path / "checkpoint-2")
    assert plans == expected[4:]
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor)


@pytest.mark.parametrize("which", ["label_smoothing_factor", "compute_loss_func"])
def test_a_trainer_that_makes_the_loss_itself_is_refused(which: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {}
    settings = arguments(tmp_path)
    if which == "label_smoothing_factor":
        settings = arguments(tmp_path, label_smoothing_factor=0.1)
    else:
        changes = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: None}
    trainer = Trainer(build("bert"), settings, train_dataset=tiny.rows("bert"), **changes)
    with pytest.raises(ConfigError, match=which):
        trainer.train()


def test_a_trainer_evaluates_a_model_that_takes_no_more_arguments(tmp_path: Path) -> None:
    """Even in the mode that runs the model several times."""
    model = parted(build("t5", inference="ensemble_prob"))
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in text_rows()]
    found = Trainer(model, arguments(tmp_path), eval_dataset=rows).evaluate()
    batch = tiny.batch(rows)
    with torch.no_grad():
        logits = model(**batch).logits
    made = consistency_loss_by_autograd([logits], batch["labels"], 0.0, reduction="token_mean")
    assert found["eval_loss"] == pytest.approx(float(made.total), rel=1e-5)


def test_a_trainer_goes_on_with_the_merged_model(tmp_path: Path) -> None:
    model, rows = build("bert"), tiny.rows("bert", 4)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows)
    before = trainer.model_accepts_loss_kwargs
    trainer.train()
    assert last_step(model) is not None
    moduli.merge(model)
    assert trainer.model_accepts_loss_kwargs == before
    trainer.train()


@pytest.mark.parametrize(
    "kind",
    ["classification", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHER_KINDS)],
)
def test_finetune(kind: str, tmp_path: Path) -> None:
    """The loss falls, over all labels of a step; evaluation and hand-back work as ever."""
    model, processor, train = load(kind, tmp_path)
    moduli.convert(model, moduli.THOR(layers="all", alpha=2.0))
    settings = FinetuneSettings(
        max_steps=20, batch_size=8, learning_rate=5e-3, gradient_accumulation_steps=2, bf16=False
    )
    rows = [train[i] for i in range(16)]
    result = finetune(model, processor, kind, rows, settings=settings, seed=0)
    assert sum(result.losses[-3:]) < 0.9 * sum(result.losses[:3])
    scores = evaluate(model, processor, rows, kind=kind)
    moduli.merge(model)
    assert evaluate(model, processor, rows, kind=kind) == scores


def test_finetune_refuses_several_labels(tmp_path: Path) -> None:
    assert "multilabel" in KINDS
    model, processor, train = load("multilabel", tmp_path)
    moduli.convert(model, moduli.THOR())
    rows = [train[i] for i in range(4)]
    settings = FinetuneSettings(max_steps=1, bf16=False)
    with pytest.raises(ModelError, match="no consistency loss for several labels"):
        finetune(model, processor, "multilabel", rows, settings=settings, seed=0)


class Smoothing(TrainerCallback):
    """Notes the label smoothing of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self.seen.append(passes_of(known["model"]).objective.label_smoothing)


def test_label_smoothing_of_a_run_is_that_of_its_loss_alone(tmp_path: Path) -> None:
    """Unless the method's own settings say otherwise, which hold for other runs, too."""
    model, processor, train = load("seq2seq", tmp_path)
    settings = FinetuneSettings(max_steps=1, label_smoothing=0.1, bf16=False)
    rows = [train[i] for i in range(2)]
    for given, used in ((None, 0.1), (0.3, 0.3)):
        moduli.convert(model, moduli.THOR(label_smoothing=given))
        own, noted = passes_of(model).objective, Smoothing()
        finetune(model, processor, "seq2seq", rows, settings=settings, seed=0, callbacks=[noted])
        assert noted.seen == [used]
        assert passes_of(model).objective == own
        moduli.merge(model)


def test_lora_trains_experts_in_full() -> None:
    from moduli.training.trainable import finish, prepare

    model = build("llama")
    prepared = prepare(model, FinetuneSettings(trains="lora"))
    batch = tiny.batch(tiny.rows("llama"))
    prepared.train()(**batch).loss.backward()
    trained = gradients(prepared)
    assert any("lora_B" in name for name in trained)
    assert_drawn_train(prepared, "modules_to_save.")
    back = finish(prepared.eval())
    assert torch.isfinite(back(**batch).logits).all()
    moduli.merge(back, exact=True)


def test_a_model_that_the_trainer_makes_itself_is_told_its_steps(tmp_path: Path) -> None:
    trainer = Trainer(
        model_init=lambda: build("bert"),
        args=arguments(tmp_path, max_steps=3, save_strategy="no"),
        train_dataset=tiny.rows("bert", 16),
    )
    trainer.train()
    record = last_step(trainer.model)
    assert record is not None
    assert (record.plan.step, record.plan.micro) == (2, 0)
