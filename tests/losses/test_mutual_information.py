"""Losses on a router's statistics: their bounds, their gradients, and what padding does to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moduli.losses.mutual_information import (
    accumulated,
    concentration_loss,
    mutual_information_loss,
    router_statistics,
    switch_z_loss,
)

E, K, T = 5, 2, 200


def sample(seed: int = 0, tokens: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, E, generator=generator, dtype=torch.float64)
    return logits, logits.topk(K).indices


def near(one: Tensor | float, other: Tensor | float, tolerance: float = 1e-6) -> None:
    assert float(one) == pytest.approx(float(other), abs=tolerance)


def test_mutual_information_is_that_of_token_and_expert() -> None:
    """-sum p(x, e) log p(x, e) / (p(x) p(e)), with the tokens equally likely."""
    logits, experts = sample()
    joint = logits.softmax(-1) / T
    product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    found = mutual_information_loss(router_statistics(logits, experts))
    near(found, -(joint * (joint / product).log()).sum())
    assert -math.log(E) <= found <= 0


def test_mutual_information_at_its_ends() -> None:
    sure = 100.0 * torch.eye(E, dtype=torch.float64).repeat(4, 1)
    near(mutual_information_loss(router_statistics(sure, sure.topk(K).indices)), -math.log(E))
    same = torch.zeros(8, E, dtype=torch.float64)
    near(mutual_information_loss(router_statistics(same, same.topk(K).indices)), 0)


def test_concentration_at_its_ends() -> None:
    even = torch.zeros(8, E, dtype=torch.float64)
    near(concentration_loss(router_statistics(even, even.topk(K).indices)), math.log(E))
    one = torch.zeros(8, E, dtype=torch.float64)
    one[:, 2] = 100
    near(concentration_loss(router_statistics(one, one.topk(K).indices)), 0)


def test_the_two_parts_of_mutual_information() -> None:
    found = router_statistics(*sample())
    near(mutual_information_loss(found) + concentration_loss(found), found.conditional_entropy)


def test_switch_is_one_where_tokens_are_even_whatever_k_is() -> None:
    logits = torch.zeros(E, E, dtype=torch.float64)
    for k in (1, 2, 3):
        experts = (torch.arange(E)[:, None] + torch.arange(k)) % E
        near(switch_z_loss(router_statistics(logits, experts)), 1 + 0.1 * math.log(E) ** 2)


def test_switch_is_larger_where_tokens_gather() -> None:
    logits = torch.zeros(8, E, dtype=torch.float64)
    logits[:, 0] = 3
    gathered = router_statistics(logits, torch.zeros(8, 1, dtype=torch.long))
    even = router_statistics(logits, torch.arange(8)[:, None] % E)
    assert switch_z_loss(gathered) > switch_z_loss(even) + 1


@pytest.mark.parametrize("loss", [mutual_information_loss, concentration_loss, switch_z_loss])
def test_padding_is_as_if_it_were_not_there(loss: object) -> None:
    assert callable(loss)
    logits, experts = sample()
    real = torch.rand(T, generator=torch.Generator().manual_seed(1)) < 0.6
    logits[~real] = 50 * logits[~real]  # whatever stands there
    near(
        loss(router_statistics(logits, experts, real)),
        loss(router_statistics(logits[real], experts[real])),
    )


def test_nothing_but_padding_is_finite() -> None:
    logits, experts = sample()
    logits.requires_grad_()
    found = router_statistics(logits, experts, torch.zeros(T, dtype=torch.bool))
    total = mutual_information_loss(found) + switch_z_loss(found) + concentration_loss(found)
    total.backward()
    assert total.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_probabilities_of_zero_have_finite_losses_and_gradients() -> None:
    logits = torch.tensor([[0.0, -1e4, 3.0], [1e4, 0.0, 0.0]], requires_grad=True)
    found = router_statistics(logits, torch.tensor([[0, 1], [0, 1]]))
    assert found.counts.tolist() == [2, 0, 0]  # a choice of probability 0 is none
    total = mutual_information_loss(found) + concentration_loss(found)
    total.backward()
    assert total.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", [mutual_information_loss, concentration_loss, switch_z_loss])
def test_gradients_are_those_of_differences(loss: object) -> None:
    logits, experts = sample(tokens=6)
    real = torch.tensor([True, True, False, True, True, True])

    def of(x: Tensor) -> Tensor:
        assert callable(loss)
        found: Tensor = loss(router_statistics(x, experts, real))
        return found

    assert torch.autograd.gradcheck(of, (logits.requires_grad_(),))


def test_calls_of_one_length_accumulate_to_one_long_call() -> None:
    (a, chosen_a), (b, chosen_b) = sample(1), sample(2)
    parts = accumulated([router_statistics(a, chosen_a), router_statistics(b, chosen_b)])
    whole = router_statistics(torch.cat([a, b]), torch.cat([chosen_a, chosen_b]))
    for loss in (mutual_information_loss, concentration_loss, switch_z_loss):
        near(loss(parts), loss(whole))


def test_short_types_are_computed_in_float32() -> None:
    logits, experts = sample()
    short = logits.to(torch.bfloat16)
    found = router_statistics(short, experts)
    assert found.mass.dtype == torch.float32
    near(
        mutual_information_loss(found),
        mutual_information_loss(router_statistics(short.double(), experts)),
        1e-5,
    )
