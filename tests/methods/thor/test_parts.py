"""Calls of a part of a model, and calls that fail: no other call sees anything of them."""

from __future__ import annotations

import pytest
import torch

import moduli
from moduli.errors import ModelError
from tests.methods.thor.models import assert_same, build, gradients, labelled, parted


def test_a_part_does_not_train_with_the_experts_of_another_forward() -> None:
    model, batch = parted(build("bert")).train(), labelled("bert")
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    for _ in range(2):
        with pytest.raises(ModelError, match="call the model itself"):
            model.bert(**inputs)
        model(**batch).loss.backward()
    model.eval()
    assert model.bert(**inputs).last_hidden_state.shape[0] == 2


def test_an_encoder_does_not_train_alone() -> None:
    model, batch = build("t5").train(), labelled("t5")
    model(**batch).loss.backward()
    with pytest.raises(ModelError, match="call the model itself"):
        model.get_encoder()(batch["input_ids"])


def test_a_forward_that_fails_leaves_no_choice_behind() -> None:
    model, batch = parted(build("bert", inference="random_token")).eval(), labelled("bert")
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.bert.encoder.layer[0].intermediate.intermediate_act_fn
    handle = handle.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**inputs)
    handle.remove()
    assert model(**{n: t[:1] for n, t in inputs.items()}).logits.shape[0] == 1


def test_hidden_states_and_dense_passes_are_computed_again_as_they_were() -> None:
    model, batch = parted(build("llama", num_experts=4)).train(), labelled("llama")

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        moduli.methods.thor.start_step(model, 0)
        hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
        with moduli.dense(model):
            loss = model(**batch).loss
        model(**batch)
        (hidden.square().mean() + loss).backward()
        return gradients(model)

    plain = step()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(step(), plain, rtol=1e-4, atol=1e-6)
