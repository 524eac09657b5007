"""Growing: the old function stays, old tensors never change, checkpoints are ordinary."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import moduli
from moduli.errors import ConfigError, ModelError, UnknownNameError
from moduli.models.moduleformer.growing import extend
from moduli.models.moduleformer.grown import (
    closed,
    new_parameters,
    new_rows,
    settle,
    train_only_new,
)
from moduli.models.moduleformer.leaking import leakage, leaks, row_norm
from moduli.models.moduleformer.replay import KeepOld
from moduli.models.moduleformer.usage import expert_use
from tests import tiny
from tests.models.moduleformer import small

GATES = ("mlp", "linear", "gmm")
STARTS = [(gate, start) for gate in GATES for start in ("fresh", "copy")] + [
    (gate, "closed") for gate in GATES[:2]
]
WIDE = {"gating_size": 64}  # narrow hidden vectors of random routers have little in common


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(small.tokens(), **inputs).logits
    return found


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def kept(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether every old tensor is the beginning of the new one, bit for bit."""
    return before.keys() == after.keys() and all(
        torch.equal(tensor, after[name][: len(tensor)]) for name, tensor in before.items()
    )


@pytest.mark.parametrize(("gate", "start"), STARTS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_with_new_experts_closed_the_function_is_the_old_one_bit_for_bit(
    gate: str, start: Any, top_k: int
) -> None:
    model = small.build(gate_type=gate, k_att=top_k, k_mlp=top_k, **WIDE)
    before, old = logits(model), state(model)
    extend(model, attention=2, feed_forward=3, start=start)
    with closed(model):
        found = model(small.tokens(), output_router_logits=True)
        assert torch.equal(found.logits, before)
        for said, new in zip(found.router_logits, (2, 3) * 2, strict=True):
            assert bool((said[:, -new:] == -torch.inf).all())
    assert not torch.equal(logits(model), before)
    assert kept(old, state(model))
    assert (model.config.n_att_experts, model.config.n_mlp_experts) == (6, 8)
    assert (model.config.k_att, model.config.k_mlp) == (top_k, top_k)


@pytest.mark.parametrize("gate", GATES)
def test_a_growing_model_saves_as_an_ordinary_one(gate: str, tmp_path: Path) -> None:
    model = small.build(gate_type=gate, legacy_buffers=True)
    extend(model, attention=1, feed_forward=2)
    growing = logits(model)
    model.save_pretrained(tmp_path)
    settled = settled_copy(model)
    assert type(settled.transformer.h[0].mlpf.gate) is type(
        small.build().transformer.h[0].mlpf.gate
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, theirs = state(settled), state(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits(again), logits(settled))
    torch.testing.assert_close(growing, logits(again), rtol=0, atol=2e-6)
    assert all(parameter.requires_grad for parameter in settled.parameters())
    assert model.load_state_dict(theirs).missing_keys == []
    assert torch.equal(logits(model), growing)


def settled_copy(model: Any) -> Any:
    other = copy.deepcopy(model)
    settle(other)
    return other


def test_only_new_slices_and_rows_are_trained() -> None:
    model = small.build()
    report = extend(model, attention=1, feed_forward=2)
    new = set(new_parameters(model))
    assert {p for p in model.parameters() if p.requires_grad} == new
    assert set(new_rows(model)) <= new
    d, a, f, g, layers = 32, 16, 24, 8, 2
    assert report.trainable == layers * (2 * d * a + 2 * 2 * d * f + (1 + 2) * g)
    model(small.tokens(), labels=small.tokens()).loss.backward()
    assert all((p.grad is not None) == (p in new) for p in model.parameters())
    model.requires_grad_(True)
    train_only_new(model)
    assert {p for p in model.parameters() if p.requires_grad} == new


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("early", [False, True], ids=["optimiser after", "optimiser before"])
def test_weight_decay_never_touches_what_is_old(gate: str, early: bool) -> None:
    model = small.build(gate_type=gate)
    old = state(model)

    def optimiser() -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)

    made = optimiser() if early else None
    model(small.tokens(), labels=small.tokens()).loss.backward()  # gradients that must not count
    extend(model, attention=1, feed_forward=1)
    new = [p.detach().clone() for p in new_parameters(model)]
    made = made or optimiser()
    model(small.tokens(), labels=small.tokens()).loss.backward()
    made.step()
    assert kept(old, state(model))
    moved = [not torch.equal(p, q) for p, q in zip(new_parameters(model), new, strict=True)]
    assert any(moved) != early  # an optimiser that was made before knows nothing of them


def test_a_real_trainer_run_leaves_old_slices_bit_identical_and_resumes(tmp_path: Path) -> None:
    base = small.build(legacy_buffers=False)
    old = state(base)
    rows = [{"input_ids": ids, "labels": ids} for ids in small.tokens(32, 10, seed=1)]

    def train(name: str, steps: int, resume: str | None = None) -> Any:
        model = copy.deepcopy(base)
        extend(model, attention=1, feed_forward=2, generator=torch.Generator().manual_seed(0))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=steps, learning_rate=0.01, weight_decay=0.3,
            per_device_train_batch_size=4, lr_scheduler_type="constant", save_steps=2, use_cpu=True,
            report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return model

    model = train("whole", 4)
    assert kept(old, state(model))
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert kept(state(model), state(written))
    assert all(
        (p != q).any() for p, q in zip(*map(new_parameters, (model, fresh(base))), strict=True)
    )
    again = train("resumed", 4, str(tmp_path / "whole" / "checkpoint-2"))
    assert kept(state(model), state(again))


def fresh(base: Any) -> Any:
    model = copy.deepcopy(base)
    extend(model, attention=1, feed_forward=2, generator=torch.Generator().manual_seed(0))
    return model


def test_extending_twice() -> None:
    model = small.build()
    old, before = state(model), logits(model)
    extend(model, attention=1)
    once = state(model)
    with torch.no_grad():
        for parameter in new_parameters(model):
            parameter.mul_(3)
    between, function = state(model), logits(settled_copy(model))
    report = extend(model, attention=1, feed_forward=4)
    assert (report.attention, report.feed_forward) == ((6, 6), (9, 9))
    assert kept(old, state(model))
    assert kept(between, state(model))
    assert not kept(once, state(model))
    with closed(model):  # the old function is now that of the model grown once
        torch.testing.assert_close(logits(model), function, rtol=0, atol=0)
    assert not torch.allclose(function, before)


def test_layers_with_numbers_of_their_own_grow_too(tmp_path: Path) -> None:
    counts = {"att_experts_per_layer": [2, 4], "mlp_experts_per_layer": [3, 5]}
    model = small.build(**counts)
    extend(model, attention=2)
    assert model.config.att_experts_per_layer == [4, 6]
    assert model.config.mlp_experts_per_layer == [3, 5]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(settled_copy(model)))


@pytest.mark.parametrize("given", [False, True], ids=["random vectors", "given inputs"])
def test_a_closed_start_leaks_no_more_than_it_may(given: bool) -> None:
    batches = [{"input_ids": small.tokens(4, 20)}] if given else None
    for leak in (0.05, 1e-3):
        model = small.build(**WIDE)
        before = logits(model)
        report = extend(
            model, attention=2, feed_forward=2, start="closed", leak=leak, batches=batches
        )
        assert report.measured_on == ("given inputs" if given else "random vectors")
        for row in new_rows(model):
            assert torch.equal(row[0], row[1])
            assert (
                row.is_contiguous()
            )  # a fused optimiser would write beside rows that share memory
        # Random vectors are drawn twice; given inputs see the same routers, but for what leaks.
        assert max(report.leak) < 3 * leak
        assert torch.allclose(logits(model), before, atol=100 * leak)


def test_copies_are_of_the_least_probable_experts_and_need_not_be_exact() -> None:
    model = small.build(gate_type="gmm")
    use = expert_use(model, [{"input_ids": small.tokens(4, 20)}])
    exact, noisy, in_turn = (copy.deepcopy(model) for _ in range(3))
    least = extend(exact, attention=1, start="copy", use=use)
    extend(noisy, attention=1, start="copy", use=use, noise=0.1)
    extend(in_turn, attention=5, start="copy")
    for layer, block in enumerate(exact.transformer.h):
        chosen = use.routers[2 * layer].probability
        rarest = min(range(4), key=lambda e: chosen[e])
        experts, gate = block.attn.q_proj.experts, block.attn.q_proj.gate
        assert torch.equal(experts.new.weight[0], experts.old.weight[rarest])
        assert torch.equal(gate.rows[0], gate.old.expert_centroids[rarest])
        near = noisy.transformer.h[layer].attn.q_proj.experts
        gap = (near.new.weight[0] - near.old.weight[rarest]).std() / near.old.weight.std()
        assert 0.05 < float(gap.detach()) < 0.2
        turn = in_turn.transformer.h[layer].attn.q_proj.experts
        assert torch.equal(turn.new.weight, turn.old.weight[[0, 1, 2, 3, 0]])
    assert max(least.leak) < 0.5


def test_noise_is_measured_by_what_is_copied() -> None:
    model = small.build()
    stack = model.transformer.h[0].attn.q_proj.experts
    with torch.no_grad():
        stack.weight[1:] *= 100
    extend(model, attention=1, start="copy", noise=0.1)
    grown = model.transformer.h[0].attn.q_proj.experts
    gap = (grown.new.weight[0] - grown.old.weight[0]).std() / grown.old.weight[0].std()
    assert 0.08 < float(gap.detach()) < 0.12


def test_what_was_frozen_before_growing_is_frozen_after_it() -> None:
    model = small.build()
    model.freeze_routers()
    model.transformer.wte.requires_grad_(False)
    model.transformer.h[0].mlpf.experts.requires_grad_(False)

    def trained(model: Any) -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    before = trained(model)
    extend(model, attention=1, feed_forward=1)
    assert trained(settled_copy(model)) == before
    extend(model, feed_forward=1)  # which settles it first
    train_only_new(model)
    settle(model)
    assert trained(model) == before
    model.requires_grad_(True)
    settle(model)  # nothing is remembered
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_leakage_is_the_probability_of_new_experts_on_real_tokens() -> None:
    model = small.build()
    extend(model, attention=1, feed_forward=2)
    ids = small.tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    found = model(ids, attention_mask=mask, output_router_logits=True)
    share = leakage(model, found.router_logits, mask)
    expected = [
        said.softmax(-1)[mask.flatten() == 1][:, -new:].sum(-1).mean()
        for said, new in zip(found.router_logits, (1, 2) * 2, strict=True)
    ]
    torch.testing.assert_close(share, torch.stack(expected).mean())
    measured = leaks(model, [{"input_ids": ids, "attention_mask": mask}])
    torch.testing.assert_close(
        torch.stack([one.mean() for one in measured]), torch.stack(expected).detach()
    )
    share.backward()
    assert all(row.grad is not None and row.grad.norm() > 0 for row in new_rows(model))
    total = sum(float(row.detach().square().sum()) for row in new_rows(model))
    assert float(row_norm(model).detach()) == pytest.approx(total, rel=1e-5)


def test_the_penalty_keeps_the_old_domain_where_it_was(tmp_path: Path) -> None:
    """Trained on sequences of its own, with replay of others, less leaks than without."""
    base = small.build(legacy_buffers=False)
    ids = small.tokens(16, 10, seed=1) % 20 + 1
    rows = [{"input_ids": one, "labels": one} for one in ids]
    replayed = [{"input_ids": small.tokens(4, 10, seed=seed) % 20 + 40} for seed in range(3)]

    def leak(*callbacks: Any) -> float:
        model = fresh(base)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=12, learning_rate=0.03, save_strategy="no",
            per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True,
            report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks)).train()
        return float(torch.stack([one.mean() for one in leaks(model, replayed)]).mean())

    class Seen(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            modes.append(known["model"].training)

    without, modes = leak(), list[bool]()
    leak(KeepOld(replayed, leakage_weight=1.0), Seen())
    assert all(modes)  # the first step, which Trainer begins in evaluation, too
    assert leak(KeepOld(replayed, leakage_weight=5.0)) < 0.7 * without
    assert leak(KeepOld(row_weight=0.0)) == without
    with pytest.raises(ConfigError, match="leakage is measured on tokens of the old domain"):
        KeepOld(leakage_weight=1.0)
    with pytest.raises(ConfigError, match="choose bf16"):
        KeepOld(row_weight=1.0).on_train_begin(SimpleNamespace(fp16=True), None, None)
    with pytest.raises(ConfigError, match="row_weight is -1"):
        KeepOld(row_weight=-1.0)


@pytest.mark.parametrize(
    ("error", "settings", "says"),
    [
        (ConfigError, {}, "add 1 or more of a kind"),
        (ConfigError, {"attention": 0, "feed_forward": 0}, "add 1 or more"),
        (ConfigError, {"attention": -1, "feed_forward": 2}, "-1 attention"),
        (UnknownNameError, {"attention": 1, "start": "close"}, "'closed'"),
        (ConfigError, {"attention": 1, "noise": 0.1}, "start is 'fresh', choose 'copy'"),
        (ConfigError, {"attention": 1, "start": "copy", "noise": -1.0}, "standard deviation"),
        (ConfigError, {"attention": 1, "start": "closed", "leak": 0.0}, "share of probability"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_what_cannot_be_added_is_said_and_nothing_is_changed(
    error: type[Exception], settings: dict[str, Any], says: str
) -> None:
    model = small.build()
    before = state(model)
    with pytest.raises(error, match=says):
        moduli.extend(model, **settings)
    assert kept(before, state(model))
    assert model.config.n_att_experts == 4


def test_gates_of_cosines_cannot_start_closed() -> None:
    with pytest.raises(ConfigError, match=r"start='copy'.*leakage"):
        extend(small.build(gate_type="gmm"), attention=1, start="closed")


def test_a_refused_extension_leaves_a_growing_model_as_it_grows() -> None:
    model = small.build()
    extend(model, attention=1)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ConfigError, match="too little in common"):
        extend(model, attention=1, start="closed", leak=1e-30)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert max(extend(model, attention=1, start="closed", leak=0.1).leak) <= 0.1
    assert model.config.n_att_experts == 6


def test_hidden_vectors_with_nothing_in_common_cannot_be_closed() -> None:
    model = small.build()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlpf.gate.w_gate[0].weight.zero_()
            block.mlpf.gate.w_gate[0].bias.zero_()
    with pytest.raises(ConfigError, match=r"feed_forward 0.*too little in common"):
        extend(model, feed_forward=1, start="closed")


def test_use_of_another_model_is_refused() -> None:
    use = expert_use(small.build(n_att_experts=3), [{"input_ids": small.tokens()}])
    with pytest.raises(ConfigError, match="measure it on this model"):
        extend(small.build(), attention=1, start="copy", use=use)


def test_other_models_and_states_are_refused() -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM is a llama model.*moduli convert"):
        moduli.extend(tiny.build("llama"), attention=1)
    model = small.build()
    for act in (train_only_new, lambda m: closed(m).__enter__()):
        with pytest.raises(ModelError, match="no experts are being added"):
            act(model)
    settle(model)  # nothing to do
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["w_gate.0"], r=2)
    with pytest.raises(ModelError, match="merge_and_unload"):
        extend(peft.get_peft_model(model, lora), attention=1)
