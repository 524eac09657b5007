"""MoEfication's routers: what the ground truth captures, and what the guesses are made of."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduli.routing import GroundTruthRouter, MLPRouter, RouteContext, Rule, SimilarityRouter
from moduli.routing.moefication import key_centers

T, D, SIZES, RAGGED = 9, 8, (4, 4, 4, 4), (2, 6, 5, 3)
RULE = Rule(top_k=2)


def groups(z: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [z[:, a:b] for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("sizes", [SIZES, RAGGED])
@pytest.mark.parametrize("activation", [torch.relu, F.gelu, nn.SiLU()])
def test_no_choice_of_experts_captures_more_than_the_ground_truth(sizes, activation) -> None:
    keys, bias, x = torch.randn(16, D), torch.randn(16), torch.randn(T, D)
    router = GroundTruthRouter(lambda: keys, sizes, RULE, bias=lambda: bias, activation=activation)
    positive = activation(F.linear(x, keys, bias)).clamp_min(0)
    mass = torch.stack([g.sum(-1) for g in groups(positive, sizes)], dim=-1)
    routing = router(x, RouteContext())
    found = mass.gather(1, routing.experts).sum(-1)
    for choice in itertools.combinations(range(len(sizes)), RULE.top_k):
        assert bool((found >= mass[:, choice].sum(-1) - 1e-5).all())
    torch.testing.assert_close(routing.scores, mass)
    assert torch.equal(routing.weights, torch.ones(T, 2))
    assert not list(router.children())  # the activation stays where it is


def test_scores_from_preactivations_are_those_of_the_input() -> None:
    keys, bias, x = torch.randn(16, D), torch.randn(16), torch.randn(T, D)
    router = GroundTruthRouter(lambda: keys, RAGGED, RULE, bias=lambda: bias)
    z = F.linear(x, keys, bias)
    assert torch.equal(router.from_preactivations(z, bias), router.scores(x))
    assert router.by_neurons
    assert not router.learned
    low = router.from_preactivations(z.bfloat16(), bias)
    assert low.dtype == torch.float32
    before = router.scores(x)
    keys.mul_(2)
    assert not torch.equal(router.scores(x), before)  # the keys are live


@pytest.mark.parametrize("sizes", [SIZES, RAGGED])
def test_centres_are_means_of_unit_keys(sizes: tuple[int, ...]) -> None:
    keys = 7 * torch.randn(16, D)
    unit = (keys / keys.norm(dim=-1, keepdim=True)).T
    expected = torch.stack([g.mean(-1) for g in groups(unit, sizes)])
    torch.testing.assert_close(key_centers(keys, sizes), expected)
    assert key_centers(keys.bfloat16(), sizes).dtype == torch.float32


def test_similarity_is_minus_a_distance() -> None:
    keys, x = torch.randn(16, D), 5 * torch.randn(T, D)
    router = SimilarityRouter(lambda: keys, RAGGED, RULE)
    centers = key_centers(keys, RAGGED)
    unit = x / x.norm(dim=-1, keepdim=True)
    expected = torch.stack([-(unit - c).norm(dim=-1) for c in centers], dim=-1)
    torch.testing.assert_close(router.scores(x), expected)
    torch.testing.assert_close(router.scores(3 * x), expected)
    # What decides is the cosine, less a half for the length of the centre.
    linear = unit @ centers.T - centers.square().sum(-1) / 2
    assert torch.equal(router.scores(x).argsort(-1), linear.argsort(-1))
    # One neuron per expert: all centres have unit length, and the order is that of the cosine.
    one = SimilarityRouter(lambda: keys, (1,) * 16, RULE)
    cosine = F.cosine_similarity(x[:, None], keys[None], dim=-1)
    assert torch.equal(one.scores(x).argsort(-1), cosine.argsort(-1))
    keys.neg_()
    assert torch.equal(one.scores(x).argmax(-1), cosine.argmin(-1))


def test_the_mlp_starts_at_the_tanh_of_the_centres_dot_products() -> None:
    keys, x = torch.randn(16, D), 5 * torch.randn(T, D)
    centers = key_centers(keys, SIZES)
    router = MLPRouter(D, 4, RULE, init=centers)
    expected = torch.tanh(F.normalize(x, dim=-1) @ centers.T)
    torch.testing.assert_close(router.scores(x), expected)
    unit = MLPRouter(D, 4, RULE, init=F.normalize(centers, dim=-1))
    cosine = F.cosine_similarity(x[:, None], centers[None], dim=-1)
    torch.testing.assert_close(unit.scores(x), cosine.tanh())
    unit.scores(x).square().sum().backward()
    assert all(bool(p.grad.any()) for p in unit.parameters())
    assert {n: tuple(p.shape) for n, p in unit.named_parameters()} == {
        "first.weight": (4, D),
        "second.weight": (4, 4),
    }


@pytest.mark.parametrize("kind", ["truth", "similarity", "mlp"])
def test_autocast_does_not_change_scores(kind: str) -> None:
    keys, x = torch.randn(16, D), torch.randn(T, D)
    router = {
        "truth": GroundTruthRouter(lambda: keys, SIZES, RULE),
        "similarity": SimilarityRouter(lambda: keys, SIZES, RULE),
        "mlp": MLPRouter(D, 4, RULE, init=key_centers(keys, SIZES)),
    }[kind]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = router.scores(x)
    assert torch.equal(low, router.scores(x))
