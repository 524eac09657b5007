"""Fitting a router: on real activations it learns, it is repeatable, and the best epoch stays."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics  # some English text that does not change

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moduli.errors import DataError
from moduli.routing import GroundTruthRouter, MLPRouter, Rule, SimilarityRouter
from moduli.routing.moefication import key_centers
from moduli.surgery.locate import find_ffns
from moduli.surgery.partition import balanced_clusters, observe
from moduli.training.router_fit import captured_share, selection_loss, train_mlp_router

EXPERTS = 16
RULE = Rule(top_k=3)


@pytest.fixture(scope="module")
def real(minilm_path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Keys in expert order, inputs of an FFN on real text, and what its experts carry."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm_path)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    lines = [t for page in topics.values() for t in page.splitlines() if len(t) > 60][:160]
    ffn = find_ffns(model)[3]
    keys = ffn.keys().detach()
    labels = balanced_clusters(keys, EXPERTS, starts=1)
    order = labels.argsort(stable=True)
    sizes = tuple(labels.bincount().tolist())
    keys, bias = keys[order], ffn.first.bias.detach()[order]
    seen: list[tuple[Tensor, Tensor]] = []
    batches = (
        dict(tokenizer(lines[i : i + 16], padding=True, return_tensors="pt"))
        for i in range(0, len(lines), 16)
    )
    observe(model, [ffn], batches, lambda _, x, z: seen.append((x, z[:, order])))
    x, z = (torch.cat(part) for part in zip(*seen, strict=True))
    truth = GroundTruthRouter(lambda: keys, sizes, RULE, bias=lambda: bias, activation=F.gelu)
    return keys, x, truth.from_preactivations(z)


def router_for(keys: Tensor) -> MLPRouter:
    sizes = (len(keys) // EXPERTS,) * EXPERTS
    return MLPRouter(keys.shape[1], EXPERTS, RULE, init=key_centers(keys, sizes))


def test_it_captures_more_of_a_real_layer_than_its_start(
    real: tuple[Tensor, Tensor, Tensor],
) -> None:
    keys, x, scores = real
    assert len(x) > 2000
    router, seen = router_for(keys), []
    fit = train_mlp_router(
        router,
        x,
        scores,
        epochs=20,
        batch_size=64,
        generator=torch.Generator().manual_seed(0),
        progress=lambda *at: seen.append(at),
    )
    held = slice(int(0.9 * len(x)), None)
    best_possible = captured_share(scores[held], scores[held], 3)
    assert fit.start + 0.02 < fit.best <= best_possible
    assert fit.losses[-1] < fit.losses[0]
    assert fit.best == max(fit.captured)
    assert len(fit.captured) == 21
    assert seen == list(enumerate(fit.captured))[1:]
    # The router has the weights of the best epoch, and beats the guess without training.
    assert captured_share(router.scores(x[held]), scores[held], 3) == pytest.approx(fit.best)
    sizes = (len(keys) // EXPERTS,) * EXPERTS
    guess = SimilarityRouter(lambda: keys, sizes, RULE).scores(x[held])
    assert fit.best > captured_share(guess, scores[held], 3)
    assert all(p.grad is None for p in router.parameters())


def test_the_same_generator_gives_the_same_router(real: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, x, scores = real
    fits = []
    for seed in (1, 1, 2):
        router = router_for(keys)
        generator = torch.Generator().manual_seed(seed)
        fit = train_mlp_router(router, x[:900], scores[:900], epochs=2, generator=generator)
        fits.append((fit, router.first.weight))
    assert fits[0][0] == fits[1][0]
    assert torch.equal(fits[0][1], fits[1][1])
    assert fits[0][0].losses != fits[2][0].losses


def toy(tokens: int) -> tuple[MLPRouter, Tensor, Tensor]:
    return MLPRouter(4, 5, Rule(1)), torch.randn(tokens, 4), torch.rand(tokens, 5)


def test_a_fit_that_only_harms_leaves_the_router_as_it_was() -> None:
    router, x, scores = toy(100)
    x[90:] = torch.eye(4)[0]  # held-out tokens that are unlike the others
    best = router.scores(x[90:]).argmax(-1)
    scores[90:] = F.one_hot(best, 5).float()
    before = router.first.weight.detach().clone()
    fit = train_mlp_router(router, x, scores, epochs=3, generator=torch.Generator().manual_seed(0))
    assert fit.best_epoch == 0
    assert fit.best == fit.start == 1
    assert torch.equal(router.first.weight, before)


def test_the_loss_scales_by_the_largest_score() -> None:
    logits, scores = torch.randn(6, 5), torch.rand(6, 5)
    expected = F.binary_cross_entropy_with_logits(logits, scores / scores.max())
    torch.testing.assert_close(selection_loss(logits, scores), expected)
    torch.testing.assert_close(selection_loss(logits, 50 * scores), expected)
    silent = selection_loss(logits, torch.zeros(6, 5))
    torch.testing.assert_close(silent, F.softplus(logits).mean())


def test_captured_share() -> None:
    scores = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 2.0]])
    assert captured_share(scores, scores, 1) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert captured_share(-scores, scores, 1) == pytest.approx(0)
    assert captured_share(-scores, scores, 3) == pytest.approx(1)
    with pytest.raises(DataError, match="fires"):
        captured_share(scores, torch.zeros(3, 3), 1)


def test_what_a_router_cannot_be_fitted_on() -> None:
    generator = torch.Generator()
    router, x, scores = toy(9)
    with pytest.raises(DataError, match="10 tokens"):
        train_mlp_router(router, x, scores, generator=generator)
    router, x, scores = toy(20)
    for wrong in (-scores, scores / 0):
        with pytest.raises(DataError, match="not negative"):
            train_mlp_router(router, x, wrong, generator=generator)
