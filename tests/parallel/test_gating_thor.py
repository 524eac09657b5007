"""Gating dropout of stochastic experts (THOR): rows of a rank see copies of their rank."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import moduli
from moduli.errors import ConfigError, ModelError
from moduli.methods.thor.passes import passes_of, start_step
from moduli.parallel import GatingDropout, gating_dropout, spread_experts
from moduli.parallel.stochastic import stochastic_layers
from moduli.surgery.stochastic import stochastic_projections
from tests.methods.thor.models import assert_same, build, gradients, labelled, only, parted

ALWAYS = GatingDropout(p=1.0)
NOTHING = GatingDropout(p=1.0, mode="gate_expert_drop")


def thor(family: str, experts: int = 2, **changes: Any) -> Any:
    return parted(build(family, num_experts=experts, **changes)).train()


def trained(model: Any, config: GatingDropout | None, batch: Any) -> tuple[Any, Any]:
    """Logits and gradients of the first training step, on two virtual ranks."""
    model.zero_grad()
    start_step(model, 0)
    if config is not None:
        attached = gating_dropout(model, config, ranks=2)
        attached.set_step(0)
    out = model(**batch)
    out.loss.backward()
    if config is not None:
        attached.remove()
    return out.logits.detach(), gradients(model)


@pytest.mark.parametrize(
    ("family", "passes"),
    [("bert", 2), ("llama", 1), *(pytest.param("t5", k, marks=pytest.mark.slow) for k in (1, 2))],
)
def test_with_one_expert_per_rank_rows_are_those_of_a_dense_model(family: str, passes: int) -> None:
    options = {"alpha": 1.0} if passes == 2 else {"alpha": 0.0}
    model, batch = thor(family, passes=passes, **options), labelled(family)
    logits, found = trained(model, ALWAYS, batch)
    for rank in range(2):
        alone = only(model, rank)(**batch).logits.detach()  # T5 rounds otherwise without gradients
        torch.testing.assert_close(logits[rank], alone[rank], rtol=1e-5, atol=1e-6)
    for projection in stochastic_projections(model).values():  # each rank trains its own
        assert all(p.grad.abs().max() > 0 for e in projection.experts for p in [e.weight])
    usual = trained(model, None, batch)[1]
    assert usual.keys() <= found.keys()


def test_an_expert_becomes_one_of_the_ranks_block_in_every_pass() -> None:
    model = thor("llama", experts=4)
    layer = stochastic_layers(model, ALWAYS, 2)[0]
    layer.dropped = True
    # Two passes of three rows of five tokens; the first rank has two rows.
    found = layer((3, 0), torch.Size([6, 5]))
    assert isinstance(found, torch.Tensor)
    assert found.view(6, 5)[:, 0].tolist() == [1, 1, 3, 0, 0, 2]
    assert torch.equal(found.view(6, 5), found.view(6, 5)[:, :1].expand(6, 5))
    alone = layer(2, torch.Size([1, 5]))  # the second rank is empty
    assert isinstance(alone, torch.Tensor)
    assert alone.tolist() == [0] * 5
    assert layer("mean", torch.Size([2, 5])) == "mean"
    layer.dropped = False
    assert layer((3, 0), torch.Size([6, 5])) == (3, 0)


def test_ranks_keep_to_their_blocks_and_use_all_of_them() -> None:
    model = thor("bert", experts=4)
    batch = labelled("bert")
    attached = gating_dropout(model, ALWAYS, ranks=2)
    seen: set[tuple[int, int]] = set()
    projection = next(iter(stochastic_projections(model).values()))
    for expert, module in enumerate(projection.experts):
        module.register_forward_hook(lambda _, args, __, expert=expert: seen.add((step, expert)))
    for step in range(12):
        attached.set_step(step)
        with torch.no_grad():
            model(**batch)
    for step in range(12):
        blocks = [e // 2 for s, e in seen if s == step]
        assert sorted(blocks) == [0, 1]  # one pass without gradients: one of each block
    assert {e for _, e in seen} == {0, 1, 2, 3}


@pytest.mark.parametrize("family", ["bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_what_is_skipped_adds_nothing_and_learns_nothing(family: str) -> None:
    model, batch = thor(family), labelled(family)
    logits, found = trained(model, NOTHING, batch)
    assert not [name for name in found if ".experts." in name]
    assert found
    bare = copy.deepcopy(model).eval()
    for projection in stochastic_projections(bare).values():
        if projection.last:
            for parameter in projection.parameters():
                parameter.detach().zero_()
    torch.testing.assert_close(logits, bare(**batch).logits.detach(), rtol=1e-5, atol=1e-6)


def test_nothing_changes_in_evaluation_or_without_dropping() -> None:
    model, batch = thor("bert"), labelled("bert")
    usual, gradient = trained(model, None, batch)
    for config in (GatingDropout(p=0.0), None):  # None: removed again
        logits, found = trained(model, config, batch)
        assert torch.equal(logits, usual)
        assert_same(found, gradient, rtol=0, atol=0)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        gating_dropout(model, NOTHING, ranks=2)  # needs no step
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("config", [ALWAYS, NOTHING])
def test_checkpointing_computes_the_same_again(config: GatingDropout) -> None:
    model, batch = thor("llama", experts=4), labelled("llama")
    twin = copy.deepcopy(model)
    twin.activation_checkpointing_enable()
    _, expected = trained(model, config, batch)
    _, found = trained(twin, config, batch)
    assert_same(found, expected, rtol=0, atol=0)


def test_a_copy_of_the_model_has_steps_of_its_own() -> None:
    model, batch = thor("bert"), labelled("bert")
    attached = gating_dropout(model, NOTHING, ranks=2)
    attached.set_step(0)
    twin = copy.deepcopy(model)
    with pytest.raises(ModelError, match="A copy of a model"):
        twin(**batch)
    gating_dropout(twin, NOTHING, ranks=2).set_step(0)
    with pytest.raises(ModelError, match="already"):
        gating_dropout(twin, NOTHING, ranks=2)
    attached.remove()
    attached.remove()
    start_step(twin, 0)
    start_step(model, 0)
    twin(**batch).loss.backward()
    model(**batch).loss.backward()
    assert not [name for name in gradients(twin) if ".experts." in name]
    assert [name for name in gradients(model) if ".experts." in name]
    assert passes_of(twin).chooser is not passes_of(model).chooser


def test_what_cannot_be_is_refused() -> None:
    model, batch = thor("bert", experts=4), labelled("bert")
    masked = GatingDropout(p=0.5, local_policy="masked_gate")
    with pytest.raises(ModelError, match="drawn without one"):
        gating_dropout(model, masked, ranks=2)
    with pytest.raises(ConfigError, match=r"4 experts over 3 ranks.*1, 2, 4 ranks"):
        gating_dropout(model, ALWAYS, ranks=3)
    with pytest.raises(ConfigError, match="ranks is 0"):
        gating_dropout(model, ALWAYS, ranks=0)
    with pytest.raises(ConfigError, match="virtual ranks"):
        gating_dropout(model, ALWAYS)
    with pytest.raises(ModelError, match="no token would go"):
        moduli.parallel.expert_parallel_plan(model)
    with pytest.raises(ConfigError, match="there is one process"):
        spread_experts(model)
    attached = gating_dropout(model, ALWAYS, ranks=2)
    with pytest.raises(ModelError, match="already"):
        gating_dropout(model, ALWAYS, ranks=2)
    with pytest.raises(ModelError, match="does not know the step"):
        model(**batch)
    attached.remove()
    flat = thor("opt")
    gating_dropout(flat, ALWAYS, ranks=2).set_step(0)
    with pytest.raises(ModelError, match="flattens"):
        flat(**labelled("opt"))
