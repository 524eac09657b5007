"""Expert choice: balanced by construction, padding takes no place, k is a mean."""

from __future__ import annotations

import pytest
import torch

from moduli.routing import ExpertChoiceRouter, RouteContext, Routing, Rule

T, E, D = 24, 4, 8


def route(k: int = 2, combine: str = "softmax", real: torch.Tensor | None = None) -> Routing:
    router = ExpertChoiceRouter(D, E, Rule(top_k=k, combine=combine))  # type: ignore[arg-type]
    return router(torch.randn(T, D), RouteContext(real=real))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_expert_takes_its_share(k: int) -> None:
    active = route(k).active
    assert active is not None
    assert active.sum(dim=0).tolist() == [k * T // E] * E


def test_experts_take_the_tokens_they_score_highest() -> None:
    routing = route(combine="probability")
    assert routing.active is not None
    assert routing.scores is not None
    probs = routing.scores.softmax(-1)
    lowest = probs.masked_fill(~routing.active, 2).amin(dim=0)
    highest_left = probs.masked_fill(routing.active, -1).amax(dim=0)
    assert (lowest >= highest_left).all()
    assert torch.equal(routing.weights, probs * routing.active)


def test_renormalised_weights_sum_to_one_where_any_expert_came() -> None:
    routing = route()
    assert routing.active is not None
    taken = routing.active.any(dim=1)
    total = routing.weights.sum(dim=1)
    torch.testing.assert_close(total[taken], torch.ones(int(taken.sum())))
    assert not total[~taken].any()


def test_padding_takes_no_place() -> None:
    real = torch.arange(T) < 16
    active = route(real=real).active
    assert active is not None
    assert not active[~real].any()
    assert active.sum(dim=0).tolist() == [2 * 16 // E] * E


def test_no_real_token_at_all() -> None:
    active = route(real=torch.zeros(T, dtype=torch.bool)).active
    assert active is not None
    assert not active.any()
