"""What goes wrong easily: closed experts in losses, frozen routers that grow, truncated history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moduli
from moduli.errors import ConfigError
from moduli.losses.mutual_information import accumulated, router_statistics, switch_z_loss
from moduli.models.moduleformer import ModuleFormerConfig, ModuleFormerForCausalLM
from moduli.models.moduleformer.grown import closed, new_rows


@pytest.fixture(params=[False, True], ids=["projections", "shared"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    width = {"att_hidden": 16, "n_head": 1} if request.param else {"att_hidden": 8, "n_head": 2}
    config = ModuleFormerConfig(
        vocab_size=32, n_embd=16, ffd_hidden=12, n_layer=2, n_att_experts=4, n_mlp_experts=6,
        gating_size=8, aux_loss_weight=0.1, bos_token_id=None, eos_token_id=None, **width,
    )  # fmt: skip
    return ModuleFormerForCausalLM(config)


def ids() -> torch.Tensor:
    return torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(1))


def test_closed_experts_leave_gradients_finite(model: Any) -> None:
    moduli.extend(model, attention=1, feed_forward=1)
    model.requires_grad_(True)
    with closed(model):
        model(ids(), labels=ids()).loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)


def test_the_z_term_of_several_calls_is_a_mean_over_all_tokens() -> None:
    sizes, E = (5, 20), 4
    logits = [torch.randn(n, E) for n in sizes]
    found = [router_statistics(x, x.topk(2).indices) for x in logits]
    whole = torch.cat(logits)
    together = router_statistics(whole, whole.topk(2).indices)
    torch.testing.assert_close(switch_z_loss(accumulated(found)), switch_z_loss(together))


def test_routers_that_grow_are_frozen_as_far_as_they_learn(model: Any) -> None:
    moduli.extend(model, attention=1, feed_forward=1)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    model.freeze_routers()
    assert not any(row.requires_grad for row in new_rows(model))
    model.freeze_routers(False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before


def test_a_refused_pruning_leaves_a_model_growing(model: Any) -> None:
    other = moduli.expert_use(model, [{"input_ids": ids()}])
    moduli.extend(model, attention=1, feed_forward=1)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ConfigError):
        moduli.prune(model, other, keep=0.75)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before


def test_history_is_not_trained_through(model: Any) -> None:
    """Truncated back-propagation: each chunk has its own graph, and its gradients are those of a
    pass over everything whose past is taken as it is."""
    first, second = ids()[:, :5], ids()[:, 5:]
    past = model(first, use_cache=True).past_key_values
    assert not any(layer.keys.requires_grad for layer in past.layers)
    model(first, labels=first).loss.backward()
    model.zero_grad()
    out = model(second, past_key_values=past, use_cache=True)
    torch.testing.assert_close(out.logits, model(ids()).logits[:, 5:], atol=1e-5, rtol=1e-4)
    out.logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_written_file_is_a_state_dict_too(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, True, model.state_dict())
    again = type(model)(model.config)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("keep", [float("nan"), float("inf")])
def test_no_share_at_all(model: Any, keep: float) -> None:
    use = moduli.expert_use(model, [{"input_ids": ids()}])
    with pytest.raises(ConfigError, match=r"keep is (nan|inf); it is a share"):
        moduli.prune(model, use, keep=keep)
