"""The auxiliary loss reaches what the stock Trainer minimises, exactly once, in every way it works.

What is expected is put together here: what the same training without an auxiliary loss gives,
plus weight times the sum over layers of E * sum_i f_i P_i, from the routings that layers record.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

import moduli
from moduli.errors import ModelError
from moduli.losses.balance import load_importance_loss
from moduli.surgery.modular import routed_layers
from tests import tiny
from tests.training.ddp_worker import Gradients, InOrder, arguments

Tensors = dict[str, torch.Tensor]
WEIGHT = 0.5


def routed(family: str = "bert", **settings: Any) -> Any:
    """A tiny model, all of its layers routed, with a loss that is large enough to see."""
    defaults = {"gate": "linear", "aux": "switch", "aux_weight": WEIGHT}
    model = tiny.build(family)
    settings = {"num_experts": 6, "top_k": 2, "layers": "all", **defaults, **settings}
    moduli.convert(model, moduli.EMoE(**settings))
    return model


def watched(model: Any, inputs: Tensors) -> tuple[Any, list[Any]]:
    """Output of a training forward without labels, and the routing of every layer."""
    seen: list[Any] = []
    shared = next(iter(routed_layers(model).values())).shared
    shared.record = lambda name, routing, real: seen.append((routing, real))
    try:
        output = model.train()(**{k: v for k, v in inputs.items() if k != "labels"})
    finally:
        shared.record = None
    return output, seen


def switch_by_hand(seen: list[Any]) -> torch.Tensor:
    total = torch.zeros(())
    for routing, real in seen:
        keep = slice(None) if real is None else real
        scores, experts = routing.scores[keep], routing.experts[keep]
        count = scores.shape[1]
        share = torch.stack([(experts == i).float().mean() for i in range(count)])
        total = total + count * (share * scores.softmax(-1).mean(0)).sum()
    return total


def gradients_of(loss: torch.Tensor, model: Any) -> Tensors:
    """Of every parameter; zeros where there is none."""
    model.zero_grad()
    loss.backward()
    found = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def term_by_hand(model: Any, inputs: Tensors) -> tuple[float, Tensors]:
    """The weighted auxiliary loss of a batch, and its gradients."""
    _, seen = watched(model, inputs)
    term = WEIGHT * switch_by_hand(seen)
    return term.item(), gradients_of(term, model)


def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if logits.dim() == 3:  # next token
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, ignore_index=-100)


def all_by_hand(model: Any, inputs: Tensors) -> tuple[float, float, Tensors]:
    """Task loss, weighted auxiliary loss, and the gradients of their sum."""
    output, seen = watched(model, inputs)
    loss = task_loss(output.logits, inputs["labels"])
    term = WEIGHT * switch_by_hand(seen)
    return loss.item(), term.item(), gradients_of(loss + term, model)


def assert_same(found: Tensors, expected: Tensors, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name],
            gradient,
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda m, n=name: n + m,
        )


def mean_over_items(output: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> Any:
    """A `compute_loss_func` as the Trainer expects it: normalised over the whole step."""
    return F.cross_entropy(output["logits"], labels, reduction="sum") / num_items_in_batch


class OwnLoss(InOrder):
    """A subclass that overrides `compute_loss` and ignores `num_items_in_batch`."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        output = model(**{k: v for k, v in inputs.items() if k != "labels"})
        loss = task_loss(output.logits, inputs["labels"])
        return (loss, output) if return_outputs else loss


class OwnStep(InOrder):
    """A subclass that overrides `training_step` and calls the stock one."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


# How a user may train: family, Trainer class, its arguments, TrainingArguments.
WAYS: dict[str, tuple[str, type[Trainer], dict[str, Any], dict[str, Any]]] = {
    "bert": ("bert", InOrder, {}, {}),
    "vit": ("vit", InOrder, {}, {}),
    "llama": ("llama", InOrder, {}, {}),  # its loss is normalised by num_items_in_batch
    "gpt2": ("gpt2", InOrder, {}, {}),  # and so is its
    "smoothing": ("bert", InOrder, {}, {"label_smoothing_factor": 0.2}),
    "smoothing-llama": ("llama", InOrder, {}, {"label_smoothing_factor": 0.2}),
    "compute_loss_func": ("bert", InOrder, {"compute_loss_func": mean_over_items}, {}),
    "compute_loss": ("bert", OwnLoss, {}, {}),
    "compute_loss-llama": ("llama", OwnLoss, {}, {}),
    "training_step": ("bert", OwnStep, {}, {}),
}


def train(model: Any, folder: Path, rows: list[Tensors], way: str = "bert", **changes: Any) -> Any:
    """Train without changing the weights; the Trainer and the gradients of its steps."""
    _, trainer_class, extra, settings = WAYS[way]
    seen = Gradients()
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **{**settings, **changes}),
        train_dataset=rows,
        callbacks=[seen],
        **extra,
    )
    trainer.train()
    return trainer, seen.steps


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("way", WAYS)
def test_every_step_adds_the_term_of_one_large_batch(
    way: str, accumulate: int, tmp_path: Path
) -> None:
    family = WAYS[way][0]
    micro = tiny.rows(family)
    # Six micro-batches, all the same; with four to a step, the second step has two only.
    settings = {"gradient_accumulation_steps": accumulate}
    plain_trainer, plain = train(routed(family, aux="none"), tmp_path, micro * 6, way, **settings)
    model = routed(family)
    trainer, steps = train(model, tmp_path, micro * 6, way, **settings)
    term, gradients = term_by_hand(model, tiny.batch(micro))
    assert len(steps) == (2 if accumulate == 4 else 6)
    for step, without in zip(steps, plain, strict=True):
        assert_same(step, {n: g + without.get(n, 0) for n, g in gradients.items()})
    expected = [loss + term for loss in losses(plain_trainer)]
    assert losses(trainer) == pytest.approx(expected, rel=1e-4)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-2


@pytest.mark.parametrize("way", ["bert", "llama"])
def test_training_step_returns_the_sum_once(way: str, tmp_path: Path) -> None:
    family = WAYS[way][0]
    model, micro = routed(family), tiny.rows(family)
    loss, term, gradients = all_by_hand(model, tiny.batch(micro))
    trainer, _ = train(model, tmp_path, micro, way)
    for _ in range(2):  # nothing piles up
        model.zero_grad()
        returned = trainer.training_step(model, tiny.batch(micro))
        assert returned.item() == pytest.approx(loss + term, rel=1e-5)
        assert_same({n: p.grad for n, p in model.named_parameters()}, gradients)
    assert "compute_loss" not in vars(trainer)


def test_load_importance_with_noise(tmp_path: Path) -> None:
    model = routed(aux="load_importance", noise=1.0, capacity_factor=1.5)
    layers, inputs = routed_layers(model), tiny.batch(tiny.rows("bert"))
    shared = next(iter(layers.values())).shared
    for name in layers:
        shared.noise[name] = torch.randn(inputs["input_ids"].numel(), 6)
    output, seen = watched(model, inputs)
    term = sum(
        load_importance_loss(r.scores[real], r.noisy_scores[real], 2, 1.0) for r, real in seen
    )
    assert all(not torch.equal(r.scores, r.noisy_scores) for r, _ in seen)
    total = task_loss(output.logits, inputs["labels"]) + WEIGHT * term
    total.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    trainer, steps = train(model, tmp_path, tiny.rows("bert"))
    assert_same(steps[0], gradients)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("settings", [{"gate": "cosine"}, {"preset": "paper", "gate": "avgk"}])
def test_other_gates_are_minimised_too(settings: dict[str, Any], tmp_path: Path) -> None:
    if settings["gate"] == "avgk":
        settings = {**settings, "aux": "load_importance_paper"}
    inputs = tiny.rows("bert")
    with_term, without = (routed(**settings, aux_weight=w) for w in (WEIGHT, 0.0))
    torch.manual_seed(1)
    one, _ = train(with_term, tmp_path, inputs)
    torch.manual_seed(1)
    other, _ = train(without, tmp_path, inputs)
    first, second = (t.state.log_history[0]["loss"] for t in (one, other))
    assert first > second + 1e-3


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradient_checkpointing_changes_nothing(family: str, tmp_path: Path) -> None:
    rows = tiny.rows(family)
    settings = {"aux": "load_importance", "noise": 1.0, "capacity_factor": 1.2}
    _, plain = train(routed(family, **settings), tmp_path, rows, family)
    _, checkpointed = train(
        routed(family, **settings), tmp_path, rows, family, gradient_checkpointing=True
    )
    assert_same(checkpointed[0], plain[0], 1e-6)


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    model = routed()
    with pytest.raises(ModelError, match="non-reentrant"):
        train(
            model,
            tmp_path,
            tiny.rows("bert"),
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )


def test_eval_loss_is_the_task_loss(tmp_path: Path) -> None:
    model, rows = routed(), tiny.rows("bert", 4)
    trainer, _ = train(model, tmp_path, rows)
    found = trainer.evaluate(rows)["eval_loss"]
    with torch.no_grad():
        inputs = tiny.batch(rows)
        expected = task_loss(model.eval()(**inputs).logits, inputs["labels"])
    assert found == pytest.approx(expected.item(), rel=1e-5)
    # Training goes on with the term after an evaluation.
    returned = trainer.training_step(model, tiny.batch(rows))
    loss, term, _ = all_by_hand(model, tiny.batch(rows))
    assert returned.item() == pytest.approx(loss + term, rel=1e-5)


@pytest.mark.parametrize("return_dict", [True, False])
def test_own_loop(return_dict: bool) -> None:
    model, inputs = routed(), tiny.batch(tiny.rows("bert"))
    loss, term, gradients = all_by_hand(model, inputs)
    for _ in range(2):
        model.zero_grad()
        output = model(**inputs, return_dict=return_dict)
        total = output["loss"] if return_dict else output[0]
        assert total.item() == pytest.approx(loss + term, rel=1e-5)
        total.backward()
        assert_same({n: p.grad for n, p in model.named_parameters()}, gradients)
    pure = model.eval()(**inputs, return_dict=return_dict)
    assert pure[0].item() == pytest.approx(loss, rel=1e-5)


def test_own_loop_with_labels_by_position() -> None:
    model, inputs = routed(), tiny.batch(tiny.rows("bert"))
    loss, term, _ = all_by_hand(model, inputs)
    output = model(
        inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"]
    )
    assert output.loss.item() == pytest.approx(loss + term, rel=1e-5)


def test_own_loss() -> None:
    model, inputs = routed(), tiny.batch(tiny.rows("bert"))
    _, term, _ = all_by_hand(model, inputs)
    labels = inputs.pop("labels")
    output = model(**inputs)
    assert output.loss is None
    assert moduli.auxiliary_loss(model).item() == pytest.approx(term, rel=1e-5)
    model.eval()(**inputs, labels=labels)
    assert moduli.auxiliary_loss(model) is None


def test_own_loop_with_reentrant_checkpointing_is_refused() -> None:
    model, inputs = routed(), tiny.batch(tiny.rows("bert"))
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ModelError, match="non-reentrant"):
        model(**inputs)


def test_dense_models_train_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    routed()  # the Trainer is wrapped from here on
    wrapped = Trainer.training_step
    assert not hasattr(wrapped.__wrapped__, "__wrapped__"), "wrapped more than once"

    def trained() -> Tensors:
        model = tiny.build("bert")
        train(model, tmp_path, tiny.rows("bert", 8), learning_rate=0.1)
        return model.state_dict()

    ours = trained()
    monkeypatch.setattr(Trainer, "training_step", wrapped.__wrapped__)
    stock = trained()
    start = tiny.build("bert").state_dict()
    assert any(not torch.equal(ours[n], start[n]) for n in start)
    assert all(torch.equal(ours[n], stock[n]) for n in stock)


def test_failing_steps_leave_the_trainer_as_it_was(tmp_path: Path) -> None:
    model, rows = routed(), tiny.rows("bert")
    trainer, _ = train(model, tmp_path, rows)
    with pytest.raises(IndexError):
        trainer.training_step(model, {"input_ids": torch.full((1, 3), tiny.VOCAB + 1)})
    assert "compute_loss" not in vars(trainer)
    loss, term, _ = all_by_hand(model, tiny.batch(rows))
    assert model(**tiny.batch(rows)).loss.item() == pytest.approx(loss + term, rel=1e-5)


def test_merging_ends_it() -> None:
    model, inputs = routed(), tiny.batch(tiny.rows("bert"))
    moduli.merge(model)
    dense = tiny.build("bert").train()(**inputs).loss
    assert model.train()(**inputs).loss.item() == dense.item()
    assert moduli.auxiliary_loss(model) is None
