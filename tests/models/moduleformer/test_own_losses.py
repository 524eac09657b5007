"""Auxiliary losses reach the weights where the loss is made of the logits, exactly once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moduli.models.moduleformer.own_losses import own_losses
from moduli.training.architectures import fresh_config, fresh_model
from moduli.training.kinds.per_token import next_token_loss

TOKENS = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SMALL = {"n_layer": 2, "n_embd": 16, "att_hidden": 16, "ffd_hidden": 8, "n_mlp_experts": 4}


def model_and_batch(**changes: Any) -> tuple[Any, dict[str, Tensor]]:
    model = fresh_model(fresh_config("moduleformer", "tiny", SMALL | changes, **TOKENS), seed=0)
    ids = torch.randint(2, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.where(mask == 1, -100)
    return model.train(), {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def outside(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss as `finetune` makes it of the logits."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return next_token_loss(model(**inputs), batch["labels"], None)


@pytest.mark.parametrize(
    "weights", [{"aux_loss_weight": 0.5}, {"aux_loss_weight": 0.0, "concentration_weight": 0.5}]
)
def test_gradients_are_those_of_the_model_s_own_loss(weights: dict[str, float]) -> None:
    model, batch = model_and_batch(**weights)
    want = gradients(model, model(**batch).loss)
    without = gradients(model, outside(model, batch))
    with own_losses(model):
        found = gradients(model, outside(model, batch))
    router = "transformer.h.0.mlpf.gate.w_gate.3.weight"
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(without[router], want[router], rtol=1e-2, atol=1e-6)


def test_micro_batches_add_up_to_the_mean() -> None:
    model, batch = model_and_batch(aux_loss_weight=0.5)
    inputs = {k: v for k, v in batch.items() if k != "labels"}

    def of_the_sum(passes: int) -> Tensor:
        with own_losses(model, passes):
            model.zero_grad()
            for _ in range(passes):
                (0 * model(**inputs).logits).sum().backward()
        return model.transformer.h[0].attn.q_proj.gate.w_gate[3].weight.grad.clone()

    torch.testing.assert_close(of_the_sum(2), of_the_sum(1))


def test_outputs_are_what_they_were_and_the_hooks_go() -> None:
    model, batch = model_and_batch()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    before = model(**inputs).logits
    with own_losses(model):
        output = model(**inputs)
        assert torch.equal(output.logits, before)
        own = model(**batch).loss  # with labels nothing is added to what is there
    assert torch.equal(own, model(**batch).loss)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
