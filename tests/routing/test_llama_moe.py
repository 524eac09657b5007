"""LLaMA-MoE's gate: its weights, its noise, and the loss of both."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moduli.errors import ConfigError
from moduli.losses.balance import cv_squared
from moduli.losses.noisy_top_k import noisy_top_k_loss, smooth_load
from moduli.routing import NoisyTopKRouter, RouteContext, Rule
from moduli.surgery.convert import Split, install
from moduli.surgery.locate import find_ffns
from moduli.surgery.seam import Pass, SeamOptions
from tests import tiny

T, D, E = 11, 6, 5
RULE = Rule(top_k=2, combine="softmax")


def gate(rule: Rule = RULE, **options) -> NoisyTopKRouter:
    """With weights that are not 0."""
    router = NoisyTopKRouter(D, E, rule, **options)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


@pytest.mark.parametrize("network", ["linear", "mlp"])
@pytest.mark.parametrize("k", [1, 2, E])
def test_weights_are_the_scaled_softmax_of_the_chosen_logits(network: str, k: int) -> None:
    router = gate(replace(RULE, top_k=k), network=network).eval()
    x = torch.randn(T, D)
    routing = router(x, RouteContext())
    top = router.scores(x).topk(k, dim=-1)
    assert torch.equal(routing.experts, top.indices)
    torch.testing.assert_close(routing.weights, E / k * top.values.softmax(-1))
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((T,), E / k))
    assert routing.spread is None
    half = gate(replace(RULE, top_k=k), network=network, scale=0.5).eval()
    torch.testing.assert_close(half(x, RouteContext()).weights.sum(-1), torch.full((T,), 0.5))


def test_a_linear_gate_starts_even_and_an_mlp_does_not() -> None:
    x = torch.randn(T, D)
    assert not NoisyTopKRouter(D, E, RULE).scores(x).any()
    assert NoisyTopKRouter(D, E, RULE, network="mlp").scores(x).std() > 0


def test_noise_is_learned_has_a_floor_and_is_for_training() -> None:
    x, n = torch.randn(T, D), torch.randn(T, E)
    router = gate(noise_floor=0.25)
    routing = router(x, RouteContext(training=True, noise=n))
    spread = torch.nn.functional.softplus(x @ router.noise.weight.T) + 0.25
    torch.testing.assert_close(routing.spread, spread)
    torch.testing.assert_close(routing.noisy_scores, routing.scores + n * spread)
    assert torch.equal(routing.experts, routing.noisy_scores.topk(2).indices)
    with torch.no_grad():
        router.noise.weight.fill_(-1.0)
    quiet = router(1e4 * x.abs(), RouteContext(training=True, noise=n))
    torch.testing.assert_close(quiet.spread, torch.full((T, E), 0.25))
    still = router.eval()(x, RouteContext())
    assert torch.equal(still.noisy_scores, still.scores)
    assert gate(noise_floor=None)(x, RouteContext(training=True)).spread is None
    one, two = (
        router.train()(x, RouteContext(training=True, generator=torch.Generator().manual_seed(4)))
        for _ in range(2)
    )
    assert torch.equal(one.noisy_scores, two.noisy_scores)


def test_the_scores_of_one_call_do_not_lend_their_noise_to_another() -> None:
    router, x = gate(), torch.randn(T, D)
    scores = router.scores(x)
    copy.deepcopy(router)  # in the middle of a pass
    assert router.select(scores, RouteContext(training=True)).spread is not None
    assert router.select(scores.detach(), RouteContext(training=True)).spread is None


@pytest.mark.parametrize("wrong", [Rule(2), Rule(2, combine="softmax", noise=1.0)])
def test_rules_of_another_kind_are_refused(wrong: Rule) -> None:
    with pytest.raises(ConfigError, match="combine"):
        NoisyTopKRouter(D, E, wrong)


def sample(k: int) -> tuple[Tensor, Tensor, Tensor, int]:
    clean, spread = torch.randn(T, E), torch.rand(T, E) + 0.1
    return clean, clean + spread * torch.randn(T, E), spread, k


@pytest.mark.parametrize("k", [1, 2, E - 1])
def test_load_is_what_fresh_noise_would_give(k: int) -> None:
    """By drawing the noise of one expert at a time many times, the others' staying as it is."""
    clean, noisy, spread, _ = sample(k)
    draws = 20_000
    expected = torch.zeros(E)
    for i in range(E):
        others = torch.cat([noisy[:, :i], noisy[:, i + 1 :]], dim=1)
        bar = others.topk(k, dim=-1).values[:, -1:]
        fresh = clean[:, i, None] + spread[:, i, None] * torch.randn(T, draws)
        expected[i] = (fresh > bar).float().mean(-1).sum()
    found = smooth_load(clean, noisy, spread, k)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


def test_without_noise_or_choice_the_load_is_a_count() -> None:
    clean, noisy, spread, _ = sample(2)
    count = torch.bincount(noisy.topk(2).indices.flatten(), minlength=E).float()
    assert torch.equal(smooth_load(clean, noisy, None, 2), count)
    assert smooth_load(clean, noisy, spread, E).tolist() == [T] * E


def test_the_published_code_looks_at_the_noise_alone() -> None:
    clean, noisy, spread, k = sample(2)
    largest = noisy.topk(k + 1).values
    noise = noisy - clean
    bar = torch.where(noise > largest[:, k, None], largest[:, k, None], largest[:, k - 1, None])
    expected = torch.distributions.Normal(0, 1).cdf((clean - bar) / spread).sum(0)
    found = smooth_load(clean, noisy, spread, k, chosen_by="noise")
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, smooth_load(clean, noisy, spread, k))


def test_the_loss_adds_importance_and_load_and_reaches_gate_and_noise() -> None:
    router, x = gate(), torch.randn(200, D)
    routing = router(x, RouteContext(training=True))
    loss = noisy_top_k_loss(routing.scores, routing.noisy_scores, routing.spread, 2)
    weights = routing.gates(E).sum(0)  # the scale does not matter to it
    load = smooth_load(routing.scores, routing.noisy_scores, routing.spread, 2)
    torch.testing.assert_close(loss, cv_squared(weights) + cv_squared(load))
    loss.backward()
    assert all(bool(p.grad.any()) for p in router.parameters())
    before = loss.item()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter -= 0.1 * parameter.grad / parameter.grad.norm()
    noise = (routing.noisy_scores - routing.scores).detach() / routing.spread.detach()
    after = router(x, RouteContext(training=True, noise=noise))
    assert noisy_top_k_loss(after.scores, after.noisy_scores, after.spread, 2) < before


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_in_a_host_the_task_loss_reaches_gate_and_noise(family: str) -> None:
    model = tiny.build(family)
    batch = tiny.batch(tiny.rows(family, 3))
    ffn = find_ffns(model)[0]
    split = Split(
        lambda f, sizes: NoisyTopKRouter(tiny.WIDTH, len(sizes), RULE),
        SeamOptions(path="masked"),
        "shared",
        RULE.top_k,
    )
    layer = install(ffn, (9,) * 4, split, Pass())
    assert torch.equal(model(**batch).logits, model(**batch).logits)  # no noise in evaluation
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model(**batch).loss.backward()
    assert all(bool(p.grad.any()) for p in layer.router.parameters())
