"""Fine-tuning: it learns, repeats bit for bit, resumes bit for bit, and averages over batches."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moduli.errors import ConfigError, DataError, TrainingError
from moduli.training.batches import ShuffledByLength
from moduli.training.callbacks import Progress
from moduli.training.evaluate import evaluate, predict
from moduli.training.finetune import finetune, last_checkpoint
from moduli.training.metrics import score
from moduli.training.settings import FinetuneSettings

Load = Callable[..., nn.Module]
Rows = list[dict[str, Any]]

FAST = FinetuneSettings(epochs=2, batch_size=16, bf16=False)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(
    fresh_model: Load, tokenizer: Any, rows: Rows
) -> tuple[nn.Module, list[Progress], tuple[float, ...]]:
    seen: list[Progress] = []
    model = fresh_model()
    result = finetune(
        model, tokenizer, "classification", rows, settings=FAST, seed=3, on_progress=seen.append
    )
    return model, seen, result.losses


def test_it_learns_and_reports_every_step(
    trained: tuple[nn.Module, list[Progress], tuple[float, ...]], tokenizer: Any, rows: Rows
) -> None:
    model, seen, losses = trained
    assert [p.step for p in seen] == list(range(1, 13))
    assert {p.steps for p in seen} == {12}
    assert tuple(p.loss for p in seen) == losses
    scores = evaluate(model, tokenizer, rows)
    assert scores.n == len(rows)
    assert scores.accuracy > 0.9


def test_a_model_trained_in_bfloat16_is_scored_as_it_is_saved(
    fresh_model: Load, tokenizer: Any, rows: Rows, tmp_path: Path
) -> None:
    """Training wraps its forward in autocast, which must not stay."""
    model = fresh_model()
    settings = dataclasses.replace(FAST, max_steps=2, bf16=True)
    finetune(model, tokenizer, "classification", rows, settings=settings, seed=3)
    assert "forward" not in model.__dict__
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(predict(model, tokenizer, rows), predict(loaded, tokenizer, rows))


def test_a_killed_run_resumes_to_the_same_bits(
    trained: tuple[nn.Module, list[Progress], tuple[float, ...]],
    fresh_model: Load,
    tokenizer: Any,
    rows: Rows,
    tmp_path: Path,
) -> None:
    class KilledError(Exception):
        pass

    def kill(progress: Progress) -> None:
        if progress.step == 9:
            raise KilledError

    def run(on_progress: Callable[[Progress], None] | None) -> tuple[nn.Module, Any]:
        model = fresh_model()
        result = finetune(
            model,
            tokenizer,
            "classification",
            rows,
            settings=FAST,
            seed=3,
            out=tmp_path,
            checkpoint_every=4,
            on_progress=on_progress,
        )
        return model, result

    with pytest.raises(KilledError):
        run(kill)
    # What a kill in the middle of writing leaves behind must not be resumed from.
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"global_st')
    model, result = run(None)

    assert result.resumed_from == 8
    assert not (tmp_path / "checkpoint-9").exists()
    reference, _, losses = trained
    assert result.losses == losses
    assert same(weights(model), weights(reference))


def test_a_run_with_all_its_steps_makes_no_more(
    fresh_model: Load, tokenizer: Any, rows: Rows, tmp_path: Path
) -> None:
    """Killed between training and what comes after it, in the middle of an epoch."""
    settings = dataclasses.replace(FAST, max_steps=2, schedule="inverse-sqrt")
    runs = []
    for _ in range(2):
        model = fresh_model()
        result = finetune(
            model, tokenizer, "classification", rows, settings=settings, seed=3, out=tmp_path,
            checkpoint_every=1,
        )  # fmt: skip
        runs.append((result.resumed_from, result.steps, result.losses, weights(model)))
    (first, *one, before), (second, *other, after) = runs
    assert (first, second) == (None, 2)
    assert one == other
    assert one[0] == 2
    assert same(before, after)


def test_accumulated_batches_step_like_one_large_batch(
    fresh_model: Load, tokenizer: Any, rows: Rows
) -> None:
    """Fails by a factor of two in the gradient if the Trainer trusts the model's **kwargs."""

    def after_one_step(batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
        # Without dropout, and below the clipping norm that would hide a factor.
        model = fresh_model()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = 0.0  # type: ignore[union-attr]
        settings = FinetuneSettings(
            max_steps=1,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=1e9,
            warmup=0.0,
            bf16=False,
        )
        gradients: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: gradients.__setitem__(name, p.grad.clone())
            )
        finetune(model, tokenizer, "classification", rows[:32], settings=settings, seed=0)
        return gradients

    large, small = after_one_step(32, 1), after_one_step(16, 2)
    for name, gradient in large.items():
        torch.testing.assert_close(small[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("how", ["gradient", "loss"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(
    how: str, fresh_model: Load, tokenizer: Any, rows: Rows, tmp_path: Path
) -> None:
    model = fresh_model()
    original = model.forward
    calls = 0
    before: dict[str, torch.Tensor] = {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        output = original(*args, **kwargs)
        if calls == 3:
            before.update(weights(model))
            poison = math.nan if how == "gradient" else math.inf
            output.loss = output.loss * poison if how == "gradient" else output.loss + poison
        return output

    model.forward = forward  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="step 3 of 12") as caught:
        finetune(
            model,
            tokenizer,
            "classification",
            rows,
            settings=FAST,
            seed=0,
            out=tmp_path,
            checkpoint_every=2,
        )
    message = str(caught.value)
    assert "learning rate" in message
    assert str(tmp_path / "last-good") in message
    assert str(tmp_path / "checkpoint-2") in message
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    if how == "gradient":
        assert same(weights(model), before)
        reloaded = type(model).from_pretrained(tmp_path / "last-good")  # type: ignore[attr-defined]
        assert same(weights(reloaded), before)


def test_predictions_keep_the_order_of_the_rows_and_do_not_need_labels(
    trained: tuple[nn.Module, list[Progress], tuple[float, ...]], tokenizer: Any, rows: Rows
) -> None:
    model = trained[0]
    texts = [{"text": row["text"]} for row in rows]
    together = predict(model, tokenizer, texts, batch_size=7)
    alone = torch.cat([predict(model, tokenizer, [row]) for row in texts[::10]])
    torch.testing.assert_close(together[::10], alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(together, predict(model, tokenizer, texts, batch_size=7))


def test_every_epoch_is_a_new_order_of_all_rows_in_batches_of_one_length() -> None:
    lengths = [(7 * i) % 50 for i in range(203)]
    order = ShuffledByLength(lengths, batch_size=8, seed=1)
    first, again = list(order), list(order)
    order.set_epoch(1)
    second = list(order)
    assert first == again
    assert first != second
    assert sorted(first) == sorted(second) == list(range(203))
    spread = [
        max(lengths[i] for i in first[s : s + 8]) - min(lengths[i] for i in first[s : s + 8])
        for s in range(0, 200, 8)
    ]
    assert sum(spread) / len(spread) < 20  # 44 for batches drawn at random


def test_scores_count_what_they_say() -> None:
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    scores = score(logits, torch.tensor([0, 0, 1, 1]))
    assert scores.accuracy == 0.75
    assert scores.balanced_accuracy == 0.75
    assert scores.macro_f1 == pytest.approx((0.8 + 2 / 3) / 2)
    assert scores.loss == pytest.approx(
        (3 * math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 4
    )
    json.dumps(scores.to_dict())


def test_a_label_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(DataError, match="2 classes"):
        score(torch.zeros(2, 2), torch.tensor([0, 2]))


@pytest.mark.parametrize(
    "bad",
    [{"epochs": 0}, {"learning_rate": -1.0}, {"batch_size": 0}, {"warmup": 1.0}, {"max_steps": 0}],
)
def test_settings_that_cannot_work_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        FinetuneSettings(**bad)


@pytest.mark.parametrize(
    ("rows_given", "match"), [([], "no rows"), ([{"sentence": "a", "label": 1}], "'text'")]
)
def test_data_that_cannot_be_trained_on_is_refused(
    rows_given: Rows, match: str, fresh_model: Load, tokenizer: Any
) -> None:
    with pytest.raises(DataError, match=match):
        finetune(fresh_model(), tokenizer, "classification", rows_given, settings=FAST, seed=0)
