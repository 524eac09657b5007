"""Tiny THOR models whose experts have parted, and the dense models that single experts are."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import moduli
from moduli.methods.thor import last_step
from moduli.surgery.stochastic import stochastic_projections
from tests import families

Batch = dict[str, Tensor]


def build(family: str, **changes: Any) -> Any:
    """The tiny model of a family with THOR's experts in all layers."""
    model = families.build(family)
    moduli.convert(model, moduli.THOR(**{"num_experts": 3, "layers": "all", **changes}))
    return model


@torch.no_grad()
def parted(model: Any, by: float = 0.2) -> Any:
    """Move the experts apart, as training would."""
    for projection in stochastic_projections(model).values():
        for parameter in projection.parameters():
            parameter.add_(by * parameter.std() * torch.randn_like(parameter))
    return model


@torch.no_grad()
def only(model: Any, expert: int) -> Any:
    """The dense model in which every layer is this expert."""
    alone = copy.deepcopy(model)
    for projection in stochastic_projections(alone).values():
        for other in projection.experts:
            other.load_state_dict(projection.experts[expert].state_dict())
    moduli.merge(alone, exact=True)
    return alone.eval()


def labelled(family: str, seed: int = 0) -> Batch:
    """A batch with labels, of two rows; texts have padding."""
    batch = families.inputs(family, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(3, families.VOCAB, (2, 7), generator=generator)
    ids[1, 5:] = -100
    if family in families.SEQ2SEQ or family == "whisper":
        batch.pop("decoder_input_ids")
        return {**batch, "labels": ids}
    if family in families.DECODERS:
        return {**batch, "labels": batch["input_ids"].where(batch["attention_mask"] == 1, -100)}
    return {**batch, "labels": torch.tensor([2, 0])}


def assert_drawn_train(model: Any, part: str = "") -> None:
    """Of the experts, those that the last step has drawn have a gradient in every parameter (whose
    name has this part), and the others none."""
    record = last_step(model)
    assert record is not None
    for projection in stochastic_projections(model).values():
        drawn = {one[projection.layer] for one in record.plan.experts}
        assert len(drawn) < len(projection.experts), "the test proves nothing"
        for number, expert in enumerate(projection.experts):
            grads = {name: p.grad for name, p in expert.named_parameters() if part in name}
            assert grads
            for name, grad in grads.items():
                assert (grad is not None and bool(grad.any())) == (number in drawn), name


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **tolerance)
