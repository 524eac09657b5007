"""Training: sampled experts, checkpointing, auxiliary losses, Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moduli.losses.mutual_information import concentration_loss, router_statistics, switch_z_loss
from moduli.models.moduleformer import ModuleFormerForSequenceClassification
from moduli.models.moduleformer.routers import FLOOR, drawn
from tests.models.moduleformer import small

KINDS: dict[str, dict[str, Any]] = {
    "projections": {}, "published": small.PUBLISHED_KIND, "linear": {"gate_type": "linear"},
    "gmm": {"gate_type": "gmm"},
}  # fmt: skip


def near(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- sampled experts ------------------------------------------------------------------------------


def test_experts_are_drawn_by_probability_beside_the_best() -> None:
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    rows = probs.expand(40_000, -1)
    generator = torch.Generator().manual_seed(0)
    found = drawn(rows, 2, 1, generator)
    assert (found[:, 0] == 0).all()
    left = torch.tensor([0.0, 0.25, 0.15, 0.1, 0.0]) + FLOOR
    shares = found[:, 1].bincount(minlength=5) / len(rows)
    assert shares[0] == 0
    near(shares[1:], (left / left.sum())[1:], 0.01)
    both = drawn(rows, 2, 2, generator)
    assert (both[:, 0] != both[:, 1]).all()
    near(both[:, 0].bincount(minlength=5) / len(rows), probs, 0.01)


def test_experts_are_drawn_in_training_only() -> None:
    model, plain = small.build(sample_topk=1), small.build()
    ids = small.tokens()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model.train()
    torch.manual_seed(0)
    out = model(ids, output_router_logits=True)
    for logits, experts in zip(out.router_logits, out.router_experts, strict=True):
        assert torch.equal(experts[:, 0], logits.argmax(1))
        assert (experts[:, 1] != experts[:, 0]).all()
    again = model(ids, output_router_logits=True)
    assert any(
        (a != b).any() for a, b in zip(out.router_experts, again.router_experts, strict=True)
    )


# --- gradient checkpointing -----------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_neither_loss_nor_gradients(kind: str, reentrant: bool) -> None:
    """With drawn experts, dropout and all losses."""
    model = small.build(
        **KINDS[kind], sample_topk=1, resid_pdrop=0.1, moe_pdrop=0.1, aux_loss_weight=0.5,
        concentration_weight=0.3,
    ).train()  # fmt: skip
    ids, mask = small.tokens(), torch.ones(2, 12)
    mask[0, :3] = 0

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        torch.manual_seed(1)
        out = model(ids, attention_mask=mask, labels=ids, use_cache=False)
        out.loss.backward()
        return out.loss, gradients(model)

    loss, grads = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    again, same = run()
    assert torch.equal(loss, again)
    assert grads.keys() == same.keys()
    for name in grads:
        near(same[name], grads[name])


# --- auxiliary losses -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mi", "switch"])
def test_the_loss_has_every_auxiliary_loss_once_by_its_weight(kind: str) -> None:
    model, ids = small.build(aux_loss_type=kind), small.tokens()
    plain = model(ids, labels=ids)
    assert plain.aux_loss is None
    told = model(ids, labels=ids, output_router_logits=True)
    near(told.loss, plain.loss)  # released checkpoints have weight 0
    model.config.aux_loss_weight = 0.25
    model.config.concentration_weight = 0.5
    out = model(ids, labels=ids)
    assert out.router_logits is None  # it was not asked for
    gathered = sum(
        concentration_loss(router_statistics(s, e))
        for s, e in zip(told.router_logits, told.router_experts, strict=True)
    )
    near(out.aux_loss, told.aux_loss)
    near(out.concentration_loss, gathered)
    near(out.loss, plain.loss + 0.25 * told.aux_loss + 0.5 * gathered)
    assert model(ids).aux_loss is None  # no labels, nothing asked
    if kind == "switch":
        each = zip(told.router_logits, told.router_experts, strict=True)
        near(out.aux_loss, sum(switch_z_loss(router_statistics(s, e)) for s, e in each))


def test_training_lowers_the_losses_that_have_a_weight() -> None:
    def after(**weights: float) -> tuple[float, float]:
        """Balance and concentration losses."""
        model, ids = small.build(**weights), small.tokens(8)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(15):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        with torch.no_grad():
            out = model(ids, output_router_logits=True)
        each = zip(out.router_logits, out.router_experts, strict=True)
        return float(out.aux_loss), float(
            sum(concentration_loss(router_statistics(s, e)) for s, e in each)
        )

    plain = after()
    assert after(aux_loss_weight=1.0)[0] < plain[0] - 0.5
    assert after(concentration_weight=1.0)[1] < plain[1] - 0.5


def test_a_classifier_has_the_concentration_loss_and_no_balance_loss() -> None:
    model = small.build(auto=ModuleFormerForSequenceClassification, num_labels=3)
    ids, labels, mask = small.tokens(), torch.tensor([0, 2]), torch.ones(2, 12)
    plain = model(ids, attention_mask=mask, labels=labels)
    model.config.aux_loss_weight = 1.0
    near(model(ids, attention_mask=mask, labels=labels).loss, plain.loss)
    model.config.concentration_weight = 1.0
    out = model(ids, attention_mask=mask, labels=labels)
    near(out.loss, plain.loss + out.concentration_loss)
    assert out.concentration_loss > 0.1
    assert out.router_logits is None
    told = model(ids, attention_mask=mask, output_router_logits=True)
    near(told.concentration_loss, out.concentration_loss)
    assert [len(logits) for logits in told.router_logits] == [24] * 4
    assert all(int(load.sum()) == 48 for load in told.router_load)


def test_frozen_routers_stay_as_they_are_and_the_rest_learns() -> None:
    model, ids = small.build(aux_loss_weight=0.1), small.tokens()
    model.freeze_routers()
    model(ids, labels=ids).loss.backward()
    found = gradients(model)
    assert not [name for name in found if ".gate." in name]
    assert "transformer.h.0.attn.q_proj.experts.weight" in found
    assert "transformer.h.0.mlpf.experts.up_proj" in found
    model.freeze_routers(False)
    model(ids, labels=ids).loss.backward()
    assert "transformer.h.0.mlpf.gate.w_gate.3.weight" in gradients(model)


# --- Trainer --------------------------------------------------------------------------------------


def train(model: Any, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Trainer:
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-2,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no", "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "seed": 0,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **defaults | settings)
    trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    return trainer


def texts(count: int = 4) -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row} for row in small.tokens(count)]


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.usefixtures("without_shape_checks")  # accelerate builds outputs from a dictionary
def test_trainer_learns_a_batch_by_heart(kind: str, bf16: bool, tmp_path: Path) -> None:
    model = small.build(**KINDS[kind], aux_loss_weight=0.01)
    trainer = train(
        model, tmp_path, texts(), max_steps=12, bf16=bf16, save_strategy="steps", save_steps=12,
        gradient_checkpointing=True,
    )  # fmt: skip
    found = losses(trainer)
    assert found[-1] < 0.6 * found[0]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_trainer_adds_the_auxiliary_losses_once(tmp_path: Path) -> None:
    rows = texts()
    ids = torch.stack([row["input_ids"] for row in rows])
    weights = {"aux_loss_weight": 0.5, "concentration_weight": 0.5}
    expected = small.build(**weights)(ids, labels=ids).loss
    found = losses(train(small.build(**weights), tmp_path, rows))
    assert found == pytest.approx([float(expected)], abs=1e-4)


def test_accumulated_passes_count_by_their_share(tmp_path: Path) -> None:
    """Four passes of one row: the losses of a step are the mean over its tokens, not their sum."""
    rows = texts()
    rows[0]["labels"] = rows[0]["labels"].clone()
    rows[0]["labels"][:8] = -100
    weights = {"aux_loss_weight": 0.5, "concentration_weight": 0.5}
    model = small.build(**weights)
    counts = torch.tensor([4.0, 11.0, 11.0, 11.0])
    each = [model(r["input_ids"][None], labels=r["labels"][None]).loss for r in rows]
    expected = (torch.stack(each) * counts / counts.sum()).sum()
    expected.backward()
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = train(small.build(**weights), tmp_path, rows, learning_rate=0.0, **split)
    assert losses(trainer) == pytest.approx([float(expected)], abs=1e-4)
    norm = next(e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e)
    wanted = torch.stack([g.norm() for g in gradients(model).values()]).norm()
    assert norm == pytest.approx(float(wanted), rel=1e-3)


def test_a_classifier_is_trained_alike_in_one_pass_and_in_several(tmp_path: Path) -> None:
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": i % 3}
        for i, row in enumerate(small.tokens(4))
    ]
    found = []
    for size in (4, 1):
        model = small.build(auto=ModuleFormerForSequenceClassification, num_labels=3)
        trainer = train(
            model, tmp_path, rows, per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size, learning_rate=0.0,
        )  # fmt: skip
        entry = next(e for e in trainer.state.log_history if "grad_norm" in e)
        found.append((entry["loss"], entry["grad_norm"]))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
