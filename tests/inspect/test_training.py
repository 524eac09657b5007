"""Selection over training: windows add up, padding and evaluation stay out, a resume is exact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from moduli.errors import CheckpointError, ConfigError, ModelError
from moduli.inspect.record import Selection
from moduli.inspect.training import SelectionOverTraining
from tests import families, tiny
from tests.inspect import models

ROWS = 24


def train(
    out: Path, callback: SelectionOverTraining, *, steps: int = 6, model: Any = None, **changes: Any
) -> Trainer:
    resume = changes.pop("resume", None)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        seed=3,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", **changes},
    )
    trainer = Trainer(
        model=models.split("bert") if model is None else model,
        args=arguments,
        train_dataset=tiny.rows("bert", ROWS),  # type: ignore[arg-type]
        eval_dataset=tiny.rows("bert", 4, seed=9),  # type: ignore[arg-type]
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_windows(tmp_path: Path) -> None:
    callback = SelectionOverTraining(every=4)
    model = train(tmp_path, callback).model
    found = callback.result()
    assert found.steps == (4, 6)
    assert len(found.shares) == tiny.LAYERS
    for rows in found.shares.values():
        assert [sum(row) for row in rows] == pytest.approx([1, 1])
    assert all(layer.shared.record is None for layer in _layers(model))
    assert Selection.from_dict({"steps": [4, 6], "shares": found.shares, "padding": False}) == found


def _layers(model: Any) -> list[Any]:
    from moduli.surgery.modular import routed_layers

    return list(routed_layers(model).values())


def test_counts_are_of_real_tokens_in_training(tmp_path: Path) -> None:
    real, every = (SelectionOverTraining(every=2, padding=padding) for padding in (False, True))
    train(tmp_path, real, eval_strategy="steps", eval_steps=1)
    train(tmp_path, every)
    tokens = sum(int(row["attention_mask"].sum()) for row in tiny.rows("bert", ROWS))
    positions = ROWS * len(tiny.rows("bert", 1)[0]["input_ids"])
    for callback, seen in ((real, tokens), (every, positions)):
        for windows in callback.windows.values():
            assert torch.tensor(windows).sum() == 2 * seen  # one epoch, two experts per token
    assert every.result().padding


@pytest.mark.parametrize(
    ("most", "steps"), [(1, (6,)), (4, (2, 4, 6)), (5, (2, 4, 6)), (9, range(1, 7))]
)
def test_windows_are_no_more_than_asked_for(
    tmp_path: Path, most: int, steps: Sequence[int]
) -> None:
    callback = SelectionOverTraining(at_most=most)
    train(tmp_path, callback)
    assert callback.result().steps == tuple(steps)


def test_what_a_capacity_drops_is_counted_when_asked(tmp_path: Path) -> None:
    kept, chosen = (SelectionOverTraining(every=2, dropped=dropped) for dropped in (False, True))
    for callback in (kept, chosen):
        train(tmp_path, callback, model=models.split("bert", capacity_factor=0.5))
    tokens = sum(int(row["attention_mask"].sum()) for row in tiny.rows("bert", ROWS))
    for layer, windows in chosen.windows.items():
        assert torch.tensor(windows).sum() == 2 * tokens
        assert torch.tensor(kept.windows[layer]).sum() < 2 * tokens


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_has_the_record_of_an_undisturbed_one(tmp_path: Path, restore: bool) -> None:
    whole = SelectionOverTraining(every=4)
    train(tmp_path / "whole", whole, steps=10)
    train(
        tmp_path / "cut",
        SelectionOverTraining(every=4),
        steps=10,
        save_strategy="steps",
        save_steps=3,
    )
    resumed = train(
        tmp_path / "cut",
        SelectionOverTraining(every=4),
        steps=10,
        resume=str(tmp_path / "cut" / "checkpoint-6"),
        save_strategy="steps",
        save_steps=3,
        restore_callback_states_from_checkpoint=restore,
    )
    (again,) = (
        callback
        for callback in resumed.callback_handler.callbacks
        if isinstance(callback, SelectionOverTraining)
    )
    assert again.result() == whole.result()


def test_a_checkpoint_without_record_is_gone_on_from(tmp_path: Path) -> None:
    class Other(SelectionOverTraining):
        """Of another name, so that the checkpoint holds nothing of ours."""

    train(tmp_path, Other(every=2), steps=4, save_strategy="steps", save_steps=2)
    callback = SelectionOverTraining(every=2)
    train(
        tmp_path,
        callback,
        steps=6,
        resume=str(tmp_path / "checkpoint-4"),
        save_strategy="steps",
        save_steps=2,
    )
    assert callback.result().steps == (6,)


def test_other_settings_are_refused_on_resume(tmp_path: Path) -> None:
    train(tmp_path, SelectionOverTraining(every=2), steps=4, save_strategy="steps", save_steps=2)
    with pytest.raises(CheckpointError, match=r"'every': 2.*this run has.*'every': 3"):
        train(
            tmp_path,
            SelectionOverTraining(every=3),
            steps=6,
            resume=str(tmp_path / "checkpoint-4"),
        )


def test_stock_models_are_recorded_too(tmp_path: Path) -> None:
    model: Any = families.moe("mixtral")
    callback = SelectionOverTraining(every=1)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    rows: Any = tiny.rows("llama", 8)
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
    assert callback.result().steps == (1, 2)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_use(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every is 0"):
        SelectionOverTraining(every=0)
    with pytest.raises(ConfigError, match="at_most is 0"):
        SelectionOverTraining(at_most=0)
    with pytest.raises(ModelError, match="no window"):
        SelectionOverTraining().result()
    with pytest.raises(ModelError, match="no experts to look at"):
        train(tmp_path, SelectionOverTraining(), model=tiny.build("bert"))
