"""Slots and capacity, against the sentence that defines them, in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moduli.routing import RouteContext, Rule, capacity, route, slots


def queue_by_hand(
    experts: list[list[int]], priority: list[float] | None, real: list[bool]
) -> dict[tuple[int, int], int]:
    """Place of every (token, rank) of a real token in the queue of its expert."""
    tokens = range(len(experts))
    order = tokens if priority is None else sorted(tokens, key=lambda t: -priority[t])
    waiting: dict[int, int] = {}
    place = {}
    for rank in range(len(experts[0])):
        for token in order:
            if not real[token]:
                continue
            expert = experts[token][rank]
            place[token, rank] = waiting.get(expert, 0)
            waiting[expert] = place[token, rank] + 1
    return place


@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 20),
    num_experts=st.integers(1, 6),
    by_priority=st.booleans(),
    padded=st.booleans(),
    ties=st.booleans(),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_slots(
    seed: int, tokens: int, num_experts: int, by_priority: bool, padded: bool, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    top_k = min(num_experts, 3)
    scores = torch.rand(tokens, num_experts, generator=generator)
    experts = scores.topk(top_k, dim=-1).indices
    priority = scores.amax(-1) if by_priority else None
    if priority is not None and ties:
        priority = (4 * priority).round()  # equal ones are served by position
    real = torch.rand(tokens, generator=generator) < 0.7 if padded else None
    found = slots(experts, num_experts, priority, real)
    flags = [True] * tokens if real is None else real.tolist()
    by_hand = queue_by_hand(
        experts.tolist(), None if priority is None else priority.tolist(), flags
    )
    for (token, rank), place in by_hand.items():
        assert found[token, rank] == place


@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "factor", "expected"),
    [
        (32, 4, 2, 1.5, 2 * math.floor(1.5 * 8)),
        (33, 4, 2, 1.5, 2 * math.floor(1.5 * 9)),
        (33, 4, 1, -1.5, math.floor(1.5 * 9)),
        (3, 8, 1, 0.5, 0),  # nobody gets in
    ],
)
def test_capacity(tokens: int, num_experts: int, top_k: int, factor: float, expected: int) -> None:
    assert capacity(tokens, num_experts, top_k, factor) == expected


def test_no_capacity_has_no_number() -> None:
    with pytest.raises(ValueError, match="drops nothing"):
        capacity(8, 4, 2, 0.0)


SCORES = torch.tensor(
    # All want expert 0 first and expert 1 second; the third token wants it most.
    [[2.0, 1.0, 0.0], [3.0, 1.0, 0.0], [5.0, 1.0, 0.0], [4.0, 1.0, 0.0]]
)


def active(**rule: object) -> list[list[bool]]:
    context = rule.pop("context", RouteContext())
    routing = route(SCORES, Rule(top_k=2, **rule), context)  # type: ignore[arg-type]
    assert routing.active is not None
    return routing.active.tolist()


def test_full_experts_drop_the_least_certain_tokens() -> None:
    # Capacity 2 * floor(0.5 * ceil(4 / 3)) = 2 of each expert's four candidates.
    best_first = [[False, False], [False, False], [True, True], [True, True]]
    assert active(capacity_factor=0.5) == best_first
    assert active(capacity_factor=-0.5) == best_first
    in_order = [[True, True], [True, True], [False, False], [False, False]]
    assert active(capacity_factor=0.5, prioritized=False) == in_order


def test_first_choices_of_all_come_before_any_second_choice() -> None:
    scores = torch.tensor([[9.0, 8.0], [0.1, 0.2]])  # 0: expert 0, then 1; 1: expert 1, then 0
    rule = Rule(top_k=2, capacity_factor=0.5)
    routing = route(scores, rule, RouteContext())  # capacity 2 * floor(0.5 * 1) = 0
    assert not routing.active.any()
    place = slots(routing.experts, 2, priority=torch.tensor([1.0, 0.0]))
    # The certain token's second choice waits behind the uncertain one's first.
    assert place.tolist() == [[0, 1], [0, 1]]


def test_nothing_is_dropped_without_capacity() -> None:
    assert route(SCORES, Rule(top_k=2), RouteContext()).active is None


def test_padding_takes_no_place_and_does_not_raise_the_capacity() -> None:
    real = torch.tensor([False, True, False, True])
    context = RouteContext(real=real)
    # Two real tokens: capacity 2 * floor(1 * ceil(2 / 3)) = 2, enough for both.
    found = active(capacity_factor=1.0, context=context)
    assert found[1] == found[3] == [True, True]
    # Counted like the others, padding has capacity 4 and everybody gets in; at 0.5 it crowds out.
    competing = active(capacity_factor=0.5, route_padding=True, context=context)
    assert competing == [[False, False], [False, False], [True, True], [True, True]]


def test_routing_of_real_tokens_does_not_depend_on_padding() -> None:
    scores = torch.randn(12, 5)
    rule = Rule(top_k=2, capacity_factor=0.8)
    alone = route(scores, rule, RouteContext(real=torch.ones(12, dtype=torch.bool)))
    padded = torch.cat([torch.randn(7, 5) * 9, scores])
    real = torch.arange(19) >= 7
    found = route(padded, rule, RouteContext(real=real))
    assert torch.equal(found.active[7:], alone.active)
    assert not alone.active.all()
