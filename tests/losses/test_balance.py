"""Balance losses: their values where they are known, their formulas, their gradients."""

import math

import pytest
import torch

from moduli.losses.balance import cv_squared, load_importance_loss, switch_loss

T, E = 24, 6


def test_switch_is_one_when_even_and_the_number_of_experts_when_all_go_to_one() -> None:
    even = torch.arange(T)[:, None] % E
    assert switch_loss(torch.zeros(T, E), even).item() == pytest.approx(1)
    sure = torch.full((T, E), -50.0)
    sure[:, 2] = 50.0
    assert switch_loss(sure, torch.full((T, 1), 2)).item() == pytest.approx(E)


def test_switch_formula_with_several_slots() -> None:
    scores = torch.randn(T, E)
    experts = scores.topk(3).indices
    share = [sum(int((row == i).sum()) for row in experts) / (3 * T) for i in range(E)]
    mean = scores.softmax(-1).mean(0)
    expected = E * sum(share[i] * float(mean[i]) for i in range(E))
    assert switch_loss(scores, experts).item() == pytest.approx(expected, rel=1e-5)


def test_switch_is_least_where_all_are_equally_likely() -> None:
    """Where choices follow the scores, no table of logits lies below 1."""
    for spread in (0.01, 1.0, 10.0):
        scores = spread * torch.randn(T, E)
        mixed = torch.cat([scores.roll(i, dims=1) for i in range(E)])  # every expert as often
        assert switch_loss(mixed, mixed.argmax(-1, keepdim=True)).item() == pytest.approx(1)
        tilted = scores + torch.arange(E) * spread
        assert switch_loss(tilted, tilted.argmax(-1, keepdim=True)).item() > 1


def test_switch_may_let_padding_dilute_its_means() -> None:
    scores, experts = torch.randn(T, E), torch.randint(E, (T, 1))
    real = torch.arange(T) < T // 2
    share = torch.bincount(experts[real, 0], minlength=E) / T
    expected = E * (share * scores.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(switch_loss(scores, experts, real), expected)
    everyone = torch.ones(T, dtype=torch.bool)
    assert torch.equal(switch_loss(scores, experts, everyone), switch_loss(scores, experts))


def test_switch_pushes_scores_of_crowded_experts_down() -> None:
    scores = torch.zeros(T, E, requires_grad=True)
    experts = torch.zeros(T, 1, dtype=torch.long)
    switch_loss(scores, experts).backward()
    assert bool((scores.grad[:, 0] > 0).all())
    assert bool((scores.grad[:, 1:] < 0).all())


def test_cv_squared_uses_the_unbiased_variance() -> None:
    assert cv_squared(torch.tensor([1.0, 3.0])).item() == pytest.approx(2 / 4)
    assert cv_squared(torch.full((5,), 7.0)).item() == 0
    assert cv_squared(torch.tensor([7.0])).item() == 0  # one expert


@pytest.mark.parametrize("compare", ["scores", "probabilities"])
def test_load_importance_formula(compare: str) -> None:
    scores, noise, top_k = torch.randn(T, E), 0.8, 2
    noisy = scores + noise / E * torch.randn(T, E)
    p = scores.softmax(-1)
    measured = scores if compare == "scores" else p
    load = []
    for i in range(E):
        total = 0.0
        for t in range(T):
            threshold = sorted(noisy[t].tolist(), reverse=True)[top_k - 1]
            z = (float(measured[t, i]) - threshold) / (noise / E)
            total += (1 + math.erf(z / math.sqrt(2))) / 2
        load.append(total)

    def cv2(values: list[float]) -> float:
        mean = sum(values) / E
        return sum((v - mean) ** 2 for v in values) / (E - 1) / mean**2

    expected = (cv2(p.sum(0).tolist()) + cv2(load)) / 2
    found = load_importance_loss(scores, noisy, top_k, noise, compare=compare)
    assert found.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("noise", [0.0, -1.0])
def test_load_importance_needs_noise(noise: float) -> None:
    with pytest.raises(ValueError, match="noise > 0"):
        load_importance_loss(torch.randn(T, E), torch.randn(T, E), 2, noise)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 100.0])
def test_gradients_are_finite(spread: float) -> None:
    for compare in ("scores", "probabilities"):
        scores = (spread * torch.randn(T, E)).requires_grad_()
        noisy = scores + torch.randn(T, E) / E
        load_importance_loss(scores, noisy, 2, 1.0, compare=compare).backward()
        assert bool(scores.grad.isfinite().all())
    scores = (spread * torch.randn(T, E)).requires_grad_()
    switch_loss(scores, scores.topk(2).indices).backward()
    assert bool(scores.grad.isfinite().all())
    assert bool(scores.grad.any())


def test_load_importance_falls_when_tokens_spread() -> None:
    crowded = torch.randn(T, E)
    crowded[:, 0] += 5
    spread = torch.randn(T, E)
    losses = [load_importance_loss(s, s, 2, 1.0).item() for s in (crowded, spread)]
    assert losses[0] > 2 * losses[1]
