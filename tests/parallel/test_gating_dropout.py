"""Gating dropout in one process: decisions, what a dropped step computes, errors, the Trainer."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moduli
from moduli.errors import ConfigError, ModelError, UnknownNameError
from moduli.parallel import GatingDropout, gating_dropout, spread_experts
from moduli.parallel.layer import GatedLayer
from moduli.routing import LinearRouter, Rule
from tests import families, tiny
from tests.parallel.gating_ranks import build as ranks_model
from tests.parallel.gating_ranks import tokens

ALWAYS = GatingDropout(p=1.0)
IDS = torch.arange(3, 3 + 4 * 5).reshape(4, 5)


def upcycled(experts: int = 4, **options: Any) -> Any:
    model = tiny.build("llama")
    options = {"aux": "none", "layers": "last:1", **options}
    moduli.convert(model, moduli.SparseUpcycling(num_experts=experts, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def layer_of(model: Any) -> Any:
    return model.model.layers[1].mlp


def dropped_output(model: Any, config: GatingDropout, x: Tensor, ranks: int) -> Tensor:
    attached = gating_dropout(model, config, ranks=ranks)
    attached.set_step(0)
    y: Tensor = layer_of(model)(x)
    attached.remove()
    return y


# --- decisions ------------------------------------------------------------------------------------


def test_the_share_of_steps_that_drop_is_p() -> None:
    steps = 2000
    for p in (0.05, 0.3, 0.7):
        config = GatingDropout(p=p, seed=4)
        share = sum(config.decisions(step, 1)[0] for step in range(steps)) / steps
        assert abs(share - p) < 4 * (p * (1 - p) / steps) ** 0.5
    assert not any(any(GatingDropout(p=0.0).decisions(s, 2)) for s in range(50))
    assert all(all(ALWAYS.decisions(s, 2)) for s in range(50))


def test_a_decision_depends_on_seed_step_and_layer_only() -> None:
    config = GatingDropout(p=0.5, scope="layer", seed=9)
    said = [config.decisions(step, 6) for step in range(60)]
    torch.manual_seed(123)
    assert said == [config.decisions(step, 6) for step in range(60)]
    assert said[7][:3] == config.decisions(7, 3)  # whatever layers come after
    other = GatingDropout(p=0.5, scope="layer", seed=10)
    assert said != [other.decisions(step, 6) for step in range(60)]
    columns = [tuple(column) for column in zip(*said, strict=True)]
    assert len(set(columns)) == 6  # layers decide by themselves
    together = GatingDropout(p=0.5, seed=9)
    assert all(len(set(together.decisions(step, 6))) == 1 for step in range(60))


# --- what a dropped step computes -----------------------------------------------------------------


@pytest.mark.parametrize("policy", ["paper", "masked_gate", "modulo"])
def test_a_rank_depends_on_its_own_tokens_and_experts_only(policy: Any) -> None:
    model, x = upcycled(), torch.randn(4, 5, tiny.WIDTH)
    config = GatingDropout(p=1.0, local_policy=policy)
    y = dropped_output(model, config, x, ranks=2)
    y[:2].square().sum().backward()
    for parameter in layer_of(model).experts.parameters():
        assert parameter.grad[:2].abs().max() > 0
        assert parameter.grad[2:].abs().max() == 0
    with torch.no_grad():
        for parameter in layer_of(model).experts.parameters():
            parameter[2:] += 1
    changed = x.clone()
    changed[2:] = 7
    again = dropped_output(model, config, changed, ranks=2)
    assert torch.equal(again[:2], y[:2])
    assert not torch.equal(again[2:], y[2:])


def test_paper_with_one_expert_per_rank_is_that_expert() -> None:
    model, x = upcycled(experts=2), torch.randn(4, 5, tiny.WIDTH)
    y = dropped_output(model, ALWAYS, x, ranks=2)
    bank = layer_of(model).experts
    for rank, rows in enumerate((x[:2], x[2:])):
        flat = rows.reshape(-1, tiny.WIDTH)
        index = torch.full((len(flat), 1), rank)
        own = bank(flat, index, torch.ones(len(flat), 1))
        torch.testing.assert_close(y[2 * rank : 2 * rank + 2], own.view_as(rows))


def test_masked_gate_of_one_rank_is_usual_routing() -> None:
    model, x = upcycled(), torch.randn(4, 5, tiny.WIDTH)
    expected = layer_of(model)(x)
    config = GatingDropout(p=1.0, local_policy="masked_gate")
    assert torch.equal(dropped_output(model, config, x, ranks=1), expected)


def test_a_sublayer_that_is_dropped_adds_nothing_and_learns_nothing() -> None:
    model = upcycled(aux="switch", layers="all")
    config = GatingDropout(p=1.0, mode="gate_expert_drop")
    attached = gating_dropout(model, config, ranks=2)
    attached.set_step(0)
    assert layer_of(model)(torch.randn(4, 5, tiny.WIDTH)).abs().max() == 0
    out = model(input_ids=IDS, labels=IDS)
    assert moduli.auxiliary_loss(model) is None
    out.loss.backward()
    learnt = {n for n, p in model.named_parameters() if p.grad is not None}
    assert not [name for name in learnt if "router" in name or "experts" in name]
    assert "model.layers.0.self_attn.q_proj.weight" in learnt


def test_stock_gates_learn_nothing_from_a_dropped_step_either() -> None:
    model = families.moe("mixtral").train()
    attached = gating_dropout(model, ALWAYS, ranks=2)
    for step, config in enumerate((True, False)):
        attached.set_step(step)
        for layer in attached.layers:
            layer.dropped = config
        model.zero_grad()
        model(input_ids=IDS, labels=IDS, output_router_logits=True).loss.backward()
        gates = [p.grad for n, p in model.named_parameters() if "gate.weight" in n]
        assert all((grad is None) == config for grad in gates)


def test_modulo_keeps_weights_and_auxiliary_loss() -> None:
    model, x = upcycled(aux="switch", top_k=2), torch.randn(4, 5, tiny.WIDTH)
    layer = layer_of(model)
    layer(x)
    usual = layer.auxiliary.detach().clone()
    seen = []
    layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    before = layer.router(x.flatten(0, 1), layer.shared.context(x.shape[:2], True, ""))
    dropped_output(model, GatingDropout(p=1.0, local_policy="modulo"), x, ranks=2)
    assert torch.equal(layer.auxiliary, usual)
    (_, index, weights) = seen[0]  # before our own hook, which was hung in later
    assert torch.equal(index, before.experts)
    assert torch.equal(weights, before.weights)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_without_dropping_nothing_changes(family: str) -> None:
    model = upcycled() if family == "llama" else families.moe(family).train()
    expected = model(input_ids=IDS).logits
    attached = gating_dropout(model, GatingDropout(p=0.0), ranks=2)
    attached.set_step(0)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    attached.remove()
    always = gating_dropout(model, ALWAYS, ranks=2)
    always.set_step(0)
    assert not torch.equal(model(input_ids=IDS).logits, expected)
    model.eval()  # never drops, and needs no step
    assert torch.equal(model(input_ids=IDS).logits, expected)
    always.remove()
    assert not model.train().state_dict().keys() - families.moe("mixtral").state_dict().keys() or (
        family == "llama"
    )
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_scope_layer_drops_some_layers() -> None:
    model = upcycled(layers="all")
    attached = gating_dropout(model, GatingDropout(p=0.5, scope="layer", seed=1), ranks=2)
    counts = []
    for step in range(20):
        attached.set_step(step)
        counts.append(len(attached.dropped))
    assert set(counts) == {0, 1, 2}


def test_checkpointing_recomputes_with_the_same_decision() -> None:
    grads = []
    for checkpointing in (False, True):
        model = upcycled()
        if checkpointing:
            model.activation_checkpointing_enable()
        attached = gating_dropout(model, GatingDropout(p=1.0, local_policy="masked_gate"), ranks=2)
        attached.set_step(0)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def copied(model: Any, way: str) -> Any:
    if way == "deepcopy":
        return copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_has_steps_of_its_own(way: str) -> None:
    model = upcycled()
    attached = gating_dropout(model, ALWAYS, ranks=2)
    attached.set_step(0)
    expected = model(input_ids=IDS).logits
    twin = copied(model, way)
    with pytest.raises(ModelError, match="A copy of a model"):
        twin(input_ids=IDS)
    gating_dropout(twin, ALWAYS, ranks=2).set_step(0)
    assert torch.equal(twin(input_ids=IDS).logits, expected)
    with pytest.raises(ModelError, match="already"):
        gating_dropout(twin, ALWAYS, ranks=2)
    with pytest.raises(ModelError, match="already"):  # the original still is under it
        gating_dropout(model, ALWAYS, ranks=2)
    attached.remove()
    assert not torch.equal(model(input_ids=IDS).logits, expected)
    assert torch.equal(twin(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("config", [ALWAYS, GatingDropout(p=1.0, local_policy="masked_gate")])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_ranks_have_whole_rows_also_where_a_model_flattens_them(
    family: str, config: GatingDropout
) -> None:
    model = ranks_model(family)
    ids = tokens()[:3]
    for module in model.modules():  # OPT
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gating_dropout(model, config, ranks=2).set_step(0)
    logits = model(input_ids=ids).logits.detach()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter[2:] += 0.5 * torch.randn_like(parameter[2:])
    changed = model(input_ids=ids).logits.detach()
    torch.testing.assert_close(changed[:2], logits[:2])
    assert ((changed[2] - logits[2]).abs().amax(-1) > 1e-4).all()


def test_rows_of_tokens_that_come_flat_from_nowhere_are_refused() -> None:
    model = ranks_model("opt")
    gating_dropout(model, ALWAYS, ranks=2).set_step(0)
    model(input_ids=tokens())  # rows of this pass say nothing of the next
    layer = model.model.decoder.layers[0].fc2
    with pytest.raises(ModelError, match="nothing tells the rows of 6 tokens"):
        layer(torch.randn(6, tiny.WIDTH))


# --- the Trainer ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trainer_keeps_one_decision_per_step_and_resumes_the_sequence(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    config = GatingDropout(p=0.5, seed=2)
    rows = [{"input_ids": IDS[i % 4], "labels": IDS[i % 4]} for i in range(16)]

    def train(folder: Path, stop: int | None = None, resume: bool = False) -> tuple[Any, Any]:
        model, said = upcycled(), []
        attached = gating_dropout(model, config, ranks=2)
        model.register_forward_pre_hook(
            lambda *_: said.append((attached.step, bool(attached.dropped)))
        )
        arguments = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=6, save_steps=3, report_to="none", use_cpu=True, learning_rate=1e-3,
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[attached.callback()])
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        return said, model.state_dict()

    said, weights = train(tmp_path)
    steps = [(step, config.decisions(step, 1)[0]) for step in range(6)]
    assert said == [each for each in steps for _ in range(2)]
    assert {dropped for _, dropped in steps} == {True, False}
    resumed, after = train(tmp_path, resume=True)
    assert resumed == said[6:]
    for name, tensor in weights.items():
        assert torch.equal(after[name], tensor), name


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_p_is_a_probability(p: float) -> None:
    with pytest.raises(ConfigError, match="no probability"):
        GatingDropout(p=p)


@pytest.mark.usefixtures("without_shape_checks")
def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="'gate_drop'"):
        GatingDropout(p=0.1, mode="gatedrop")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="masked_gate"):
        GatingDropout(p=0.1, local_policy="masked")  # type: ignore[arg-type]
    seeds: tuple[Any, ...] = (-1, 2**128, 1.5, "0")
    for seed in seeds:
        with pytest.raises(ConfigError, match="whole number from 0 to"):
            GatingDropout(p=0.1, seed=seed)
    assert GatingDropout(p=0.1, seed=2**128 - 1).decisions(0, 2)
    with pytest.raises(ConfigError, match=r"p is '0\.3'"):
        GatingDropout(p="0.3")  # type: ignore[arg-type]
    steps: tuple[Any, ...] = (-1, 1.5, 2**64, None)
    attached = gating_dropout(upcycled(), ALWAYS, ranks=2)
    for step in steps:
        with pytest.raises(ConfigError, match="expected how many optimiser steps"):
            attached.set_step(step)
    assert attached.step is None


def test_removing_twice_leaves_what_came_in_between() -> None:
    model = upcycled()
    first = gating_dropout(model, ALWAYS, ranks=2)
    first.remove()
    first.remove()
    second = gating_dropout(model, ALWAYS, ranks=2)
    first.remove()
    second.set_step(0)
    with pytest.raises(ModelError, match="already"):
        gating_dropout(model, ALWAYS, ranks=2)
    assert "select" in vars(layer_of(model).router)
    second.remove()
    assert "select" not in vars(layer_of(model).router)


def test_ranks_have_to_divide_the_experts() -> None:
    model = upcycled()
    with pytest.raises(ConfigError, match=r"4 experts over 3 ranks.*1, 2, 4 ranks"):
        gating_dropout(model, ALWAYS, ranks=3)
    with pytest.raises(ConfigError, match="more ranks than experts"):
        gating_dropout(model, ALWAYS, ranks=8)
    with pytest.raises(ConfigError, match="ranks is 0"):
        gating_dropout(model, ALWAYS, ranks=0)
    with pytest.raises(ConfigError, match="virtual ranks"):
        gating_dropout(model, ALWAYS)


def test_what_cannot_have_gating_dropout_is_refused() -> None:
    model = upcycled()
    attached = gating_dropout(model, ALWAYS, ranks=2)
    with pytest.raises(ModelError, match="already"):
        gating_dropout(model, ALWAYS, ranks=2)
    with pytest.raises(ModelError, match="does not know the step"):
        model(input_ids=IDS)
    attached.remove()
    with pytest.raises(ConfigError, match="there is one process"):
        spread_experts(model)
    with pytest.raises(ModelError, match="no model of transformers"):
        spread_experts(nn.Linear(2, 2))
    borrowed = tiny.build("bert")
    moduli.convert(borrowed, moduli.EMoE(num_experts=4, top_k=2))
    with pytest.raises(ModelError, match="sharded like the dense"):
        gating_dropout(borrowed, ALWAYS, ranks=2)
    with pytest.raises(ModelError, match="no experts of their own"):
        gating_dropout(tiny.build("bert"), ALWAYS, ranks=2)


class OddGate(nn.Module):
    """A stock gate that says nothing but logits, or weighs in its own way."""

    def __init__(self, gate: nn.Module, what: str) -> None:
        super().__init__()
        self.gate, self.what = gate, what

    def forward(self, x: Tensor) -> Any:
        logits, weights, index = self.gate(x)
        return logits if self.what == "logits" else (logits, weights * 0.3, index)


def test_gates_that_are_not_understood_are_refused() -> None:
    ids = {"input_ids": IDS}
    for what in ("logits", "odd"):
        for policy in ("paper", "masked_gate"):
            model = families.moe("mixtral").train()
            block = model.model.layers[1].mlp
            block.gate = OddGate(block.gate, what)
            config = GatingDropout(p=0.0, local_policy=policy)  # type: ignore[arg-type]
            gating_dropout(model, config, ranks=2).set_step(0)
            with pytest.raises(ModelError, match='local_policy="modulo"'):
                model(**ids)


def test_policies_that_need_scores_are_refused_without() -> None:
    class Bare(nn.Module):
        """Experts without a router, such as those that are chosen at random."""

        def __init__(self, experts: nn.Module) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            weights = torch.full(index.shape, 0.5)
            y: Tensor = self.experts(x.flatten(0, 1), index, weights)
            return y.view_as(x)

    bare = Bare(layer_of(upcycled()).experts).train()
    with pytest.raises(ModelError, match="no router with scores"):
        gating_dropout(bare, GatingDropout(p=1.0), ranks=2)
    x, index = torch.randn(4, 1, tiny.WIDTH), torch.tensor([[0], [3], [1], [2]])
    attached = gating_dropout(bare, GatingDropout(p=1.0, local_policy="modulo"), ranks=2)
    attached.set_step(0)
    y = bare(x, index)
    attached.remove()
    torch.testing.assert_close(y, bare(x, torch.tensor([[0], [1], [3], [2]])))
    attached = gating_dropout(bare, GatingDropout(p=1.0), ranks=4)  # the rank's one expert
    attached.set_step(0)
    y = bare(x, index)
    attached.remove()
    torch.testing.assert_close(y, 2 * bare(x, torch.arange(4)[:, None]))


def test_a_weight_in_shares_of_all_experts_is_one_of_the_ranks_experts_meanwhile() -> None:
    model = tiny.build("llama")
    options = {"layers": "last:1", "gate_scale": "prob_times_E", "router_std": 1e-4}
    moduli.convert(model, moduli.Switch(num_experts=4, jitter=0.0, capacity_factor=None, **options))
    model.train()
    x = torch.randn(4, 5, tiny.WIDTH)
    usual = layer_of(model)(x)  # copies at even weights: the dense function
    config = GatingDropout(p=1.0, local_policy="masked_gate")
    torch.testing.assert_close(
        dropped_output(model, config, x, ranks=2), usual, rtol=1e-2, atol=1e-4
    )


def test_few_rows_leave_ranks_empty_in_turn() -> None:
    model, x = upcycled(), torch.randn(1, 5, tiny.WIDTH)
    attached = gating_dropout(model, ALWAYS, ranks=4)
    for step in range(5):
        attached.set_step(step)
        model.zero_grad()
        layer_of(model)(x).sum().backward()
        grad = layer_of(model).experts.down_proj.grad
        trained = grad.abs().amax((1, 2)) > 0
        assert trained.nonzero().flatten().tolist() == [step % 4]


def test_packed_rows_are_refused() -> None:
    model = upcycled()
    owner, bank = layer_of(model), layer_of(model).experts
    layer = GatedLayer("x.experts", bank, owner, None, ALWAYS, 4, 2, None)
    layer.rows = 2
    with pytest.raises(ModelError, match="no common length"):
        layer._parts(5)
    layer.remove()


def test_a_rule_of_its_own_survives_a_dropped_step() -> None:
    model = upcycled(top_k=3)
    router: LinearRouter = layer_of(model).router
    rule: Rule = router.rule
    x = torch.randn(4, 5, tiny.WIDTH)
    config = GatingDropout(p=1.0, local_policy="masked_gate")
    y = dropped_output(model, config, x, ranks=2)  # 3 of 2 experts: both
    assert router.rule is rule
    assert "select" not in vars(router)
    assert torch.isfinite(y).all()
