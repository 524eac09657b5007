"""Training: the loss of THOR and of R-Drop, gradients of what was drawn, and of nothing else."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import moduli
from moduli.errors import ModelError
from moduli.losses.consistency import consistency_loss_by_autograd
from moduli.methods.thor import last_step, start_step
from moduli.surgery.stochastic import stochastic_projections
from tests import families, tiny
from tests.methods.thor.models import assert_same, build, gradients, labelled, only, parted

WITH_LABELS = ["bert", "distilbert", "vit", "gpt2", "llama", "t5", "bart", "marian", "whisper"]


@pytest.mark.parametrize("family", WITH_LABELS)
def test_experts_that_are_equal_train_on_the_loss_of_the_model(family: str) -> None:
    """Without dropout two equal passes agree: twice the dense loss, whatever alpha."""
    dense, batch = families.build(family).train(), labelled(family)
    stock = dense(**batch).loss
    model = build(family, alpha=5.0).train()
    for options in ({}, {"return_dict": False}):
        output = model(**batch, **options)
        loss, logits = output[0], output[1]
        torch.testing.assert_close(loss, 2 * stock, rtol=1e-5, atol=1e-5)
        assert len(logits) == 2
    record = last_step(model)
    assert record is not None
    assert float(record.disagreement) == 0
    # The loss of the model is a mean over labels; that of a whole step is divided by all of them.
    parts = model(**batch, num_items_in_batch=10 * record.count).loss
    torch.testing.assert_close(parts, loss / 10)


def test_one_expert_is_r_drop() -> None:
    dense = tiny.initialise(lambda: tiny.bert(dropout=0.2)).train()
    model, batch = copy.deepcopy(dense), tiny.batch(tiny.rows("bert", 3))
    moduli.convert(model, moduli.THOR(num_experts=1, alpha=5.0))
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    torch.manual_seed(3)
    twice = dense(**{name: torch.cat([t, t]) for name, t in inputs.items()}).logits
    one, other = twice.log_softmax(-1).chunk(2)
    kl = kl_div(one, other, log_target=True, reduction="sum")
    kl = kl + kl_div(other, one, log_target=True, reduction="sum")
    errors = sum(cross_entropy(z, batch["labels"], reduction="sum") for z in twice.chunk(2))
    torch.manual_seed(3)
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss, (errors + 5.0 * kl / 2) / 3)
    assert float(kl.detach()) > 0.01


@pytest.mark.parametrize("passes", [2, 3])
def test_a_step_is_its_passes_one_by_one(passes: int) -> None:
    """Loss and every gradient, against dense models that share the parameters of their expert."""
    settings = {"passes": passes, "pair": "distinct", "alpha": 2.0, "label_smoothing": 0.1}
    model = parted(build("llama", layers=[1], **settings))
    batch = labelled("llama")
    model.train()(**batch).loss.backward()
    found, record = gradients(model), last_step(model)
    assert record is not None
    drawn = [one[0] for one in record.plan.experts]

    model.eval().zero_grad(set_to_none=True)
    logits = []
    for expert in drawn:
        moduli.set_inference(model, f"fixed:{expert}")
        logits.append(model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1])
    expected = consistency_loss_by_autograd(
        logits, batch["labels"][:, 1:], 2.0, label_smoothing=0.1, reduction="token_mean"
    )
    expected.total.backward()
    assert float(expected.disagreement) > 0.01
    assert_same(found, gradients(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "bart", "gpt2"])
def test_what_was_not_drawn_does_not_train(family: str) -> None:
    model, batch = build(family, num_experts=4).train(), labelled(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(**batch).loss.backward()
    optimizer.step()
    record = last_step(model)
    assert record is not None
    for path, projection in stochastic_projections(model).items():
        drawn = {one[projection.layer] for one in record.plan.experts}
        for number, expert in enumerate(projection.experts):
            for name, parameter in expert.named_parameters():
                still = torch.equal(parameter, before[f"{path}.experts.{number}.{name}"])
                assert (parameter.grad is None) == still == (number not in drawn)


def test_a_step_needs_the_operations_of_two_dense_ones() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def operations(model: Any, batch: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            model(**batch)
        return counter.get_total_flops()

    dense, batch = tiny.build("llama"), labelled("llama")
    cost = operations(dense, batch)
    model = build("llama", num_experts=4)
    assert operations(model.train(), batch) == 2 * cost
    moduli.set_inference(model.eval(), "fixed:3")
    assert operations(model, batch) == cost


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_checkpointing_computes_again_with_the_same_experts(family: str, reentrant: bool) -> None:
    """Also where two forwards wait for their backward, and an evaluation came between."""
    model, batch = parted(build(family, num_experts=4)).train(), labelled(family)

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        start_step(model, 0)
        losses = [model(**batch).loss for _ in range(2)]
        with torch.no_grad():
            model.eval()(**batch)
        model.train()
        sum(losses).backward()
        return gradients(model)

    plain = step()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(step(), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding_changes_nothing(family: str) -> None:
    model, batch = parted(build(family)).train(), labelled(family)
    more = {**batch, **{n: torch.nn.functional.pad(batch[n], (0, 3)) for n in
                        ("input_ids", "attention_mask")}}  # fmt: skip
    if batch["labels"].dim() == 2:
        more["labels"] = torch.nn.functional.pad(batch["labels"], (0, 3), value=-100)
    found = []
    for one in (batch, more):
        model.zero_grad(set_to_none=True)
        start_step(model, 0)
        model(**one).loss.backward()
        found.append(gradients(model))
    assert_same(*found, rtol=1e-4, atol=1e-5)


def test_regression_compares_predictions() -> None:
    config = families.tr.BertConfig(**{**families._ENCODER, "num_labels": 1})
    model = tiny.initialise(lambda: families.tr.BertForSequenceClassification(config))
    moduli.convert(model, moduli.THOR(num_experts=2, alpha=3.0, layers=[1], pair="distinct"))
    parted(model)
    batch = {**families.inputs("bert"), "labels": torch.tensor([0.5, -1.0])}
    loss = model.train()(**batch).loss
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    one, other = (only(model, e)(**inputs).logits[:, 0] for e in range(2))
    errors = sum((y - batch["labels"]).square().mean() for y in (one, other))
    torch.testing.assert_close(loss, errors + 3.0 * (one - other).square().mean())


def test_without_labels_a_training_forward_is_one_pass() -> None:
    model, batch = parted(build("bert", layers=[0])).train(), families.inputs("bert")
    logits = [model(**batch).logits for _ in range(6)]
    known = [only(model, e)(**batch).logits for e in range(3)]
    drawn = [[e for e in range(3) if torch.allclose(z, known[e])] for z in logits]
    assert all(len(one) == 1 for one in drawn)
    assert len({one[0] for one in drawn}) > 1


def test_a_loss_without_labels_is_refused() -> None:
    config = families.tr.BertConfig(**{**families._ENCODER, "num_labels": 2})
    model = tiny.initialise(lambda: families.tr.BertForQuestionAnswering(config))
    moduli.convert(model, moduli.THOR())
    where = torch.tensor([1, 2])
    with pytest.raises(ModelError, match="made a loss without `labels`"):
        model.train()(**families.inputs("bert"), start_positions=where, end_positions=where)


def test_labels_of_another_kind_are_refused() -> None:
    model = build("bert").train()
    batch = families.inputs("bert")
    with pytest.raises(ModelError, match="the number of a class for every position"):
        model(**batch, labels=torch.zeros(2, 3))
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ModelError, match="no consistency loss for several labels"):
        model(**batch, labels=torch.zeros(2, 3))


@pytest.mark.slow
def test_agreement_makes_it_matter_less_which_expert_is_used() -> None:
    """Experts that start apart say the same of new texts, and learn known ones alike."""
    rows = tiny.rows("llama", 96, seed=3)
    known, unseen = tiny.batch(rows[:48]), tiny.batch(rows[48:])
    apart = {0.0: 0.0, 5.0: 0.0}
    spread, gap = dict(apart), dict(apart)
    for seed, alpha in itertools.product(range(3), apart):
        torch.manual_seed(seed)
        model = parted(build("llama", num_experts=2, alpha=alpha, seed=seed), by=0.5).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(40):
            model(**known).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        report = moduli.thor_report(model, known)
        spread[alpha] += report.spread
        gap[alpha] += report.collapse_gap
        apart[alpha] += moduli.thor_report(model, unseen).disagreement
    assert apart[5.0] < apart[0.0] / 2
    assert spread[5.0] < spread[0.0]
    assert gap[5.0] < gap[0.0]


def test_draws_move_no_other_random_numbers() -> None:
    model, batch = build("bert").train(), labelled("bert")
    state = torch.random.get_rng_state()
    model(**batch)
    assert torch.equal(torch.random.get_rng_state(), state)
