"""The z-loss: its value, its gradient, and that there is one of it."""

import pytest
import torch

from moduli.losses.mutual_information import Z_SHARE, router_statistics, switch_z_loss
from moduli.losses.z_loss import squared_logsumexp, z_loss

T, E = 24, 6


def test_value_where_it_is_known() -> None:
    assert z_loss(torch.zeros(T, E)).item() == pytest.approx(torch.tensor(E).log().item() ** 2)
    normalised = torch.randn(T, E).log_softmax(-1)
    assert z_loss(normalised).item() == pytest.approx(0, abs=1e-9)


def test_formula() -> None:
    scores = torch.randn(T, E, dtype=torch.float64)
    by_hand = sum(float(row.exp().sum().log()) ** 2 for row in scores) / T
    assert z_loss(scores).item() == pytest.approx(by_hand)
    assert squared_logsumexp(scores).shape == (T,)


def test_it_pulls_large_logits_down() -> None:
    scores = (5 + torch.randn(T, E)).requires_grad_()
    z_loss(scores).backward()
    assert bool((scores.grad > 0).all())


def test_extreme_logits_stay_finite() -> None:
    scores = torch.tensor([[3e4, -3e4, 0.0]], requires_grad=True)
    z_loss(scores).backward()
    assert bool(scores.grad.isfinite().all())


def test_the_loss_of_moduleformer_has_a_share_of_it() -> None:
    scores = torch.randn(T, E)
    experts = scores.topk(2).indices
    found = router_statistics(scores, experts)
    mass, counts = found.mass / found.mass.sum(), found.counts / found.counts.sum()
    rest = switch_z_loss(found) - E * (mass * counts).sum()
    torch.testing.assert_close(rest, Z_SHARE * z_loss(scores))
