"""Switch and GShard: capacities of four code bases, who gets a slot, weights, jitter, padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moduli.errors import ConfigError, ModelError
from moduli.routing import Capacity, RouteContext, Routing, Rule, SwitchRouter

D = 6
ROUNDINGS = ("fairseq", "deepspeed", "tutel", "huggingface")


def router(num_experts: int = 4, top_k: int = 1, combine: str = "probability", **more: Any) -> Any:
    return SwitchRouter(D, num_experts, Rule(top_k=top_k, combine=combine), **more)  # type: ignore[arg-type]


def loads(routing: Routing, num_experts: int, kept: bool, rows: slice = slice(None)) -> list[int]:
    """Tokens per expert, those that asked or those that were let in."""
    active = routing.active
    assert active is not None
    chosen = routing.experts[rows][active[rows]] if kept else routing.experts[rows].reshape(-1)
    return torch.bincount(chosen, minlength=num_experts).tolist()


# --- capacity -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "tokens", "top_k", "training", "expected"),
    [
        ({"rounding": "fairseq", "factor": 1.0}, 14, 1, True, 4),
        ({"rounding": "fairseq", "factor": 1.25}, 14, 1, True, 5),
        ({"rounding": "fairseq", "factor": 1.0}, 14, 2, True, 8),
        ({"rounding": "fairseq", "in_evaluation": True, "share": 0.5}, 13, 1, False, 7),
        ({"rounding": "fairseq", "in_evaluation": True, "share": 0.0}, 14, 1, False, 4),
        ({"rounding": "deepspeed", "factor": 1.0}, 14, 1, True, 4),
        ({"rounding": "deepspeed", "factor": 1.1}, 40, 1, True, 11),
        ({"rounding": "deepspeed", "factor": 1.2}, 100, 1, True, 31),  # float32: 30.000002
        ({"rounding": "deepspeed", "factor": 1.0, "minimum": 9}, 14, 1, True, 9),
        ({"rounding": "tutel", "factor": 1.25}, 14, 2, True, 10),
        ({"rounding": "tutel", "factor": -1.25}, 14, 2, True, 10),
        ({"rounding": "tutel", "factor": 0.0}, 14, 2, True, None),
        ({"rounding": "huggingface", "per_sequence": 3}, 14, 1, True, 3),
        ({"factor": None}, 14, 1, True, None),
        ({"factor": 1.0}, 14, 1, False, None),  # evaluation drops nothing unless it is asked to
    ],
)
def test_numbers_of_slots(
    settings: dict[str, Any], tokens: int, top_k: int, training: bool, expected: int | None
) -> None:
    assert Capacity(**settings).limit(tokens, 4, top_k, training) == expected


@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 12)),
    num_experts=st.integers(2, 6),
    top_k=st.integers(1, 2),
    rounding=st.sampled_from(ROUNDINGS),
    order=st.sampled_from(("position", "probability", "random")),
    factor=st.sampled_from((0.3, 1.0, 1.25, 2.0)),
    padded=st.booleans(),
    count_padding=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_an_expert_keeps_its_load_up_to_its_capacity(
    seed: int,
    shape: tuple[int, int],
    num_experts: int,
    top_k: int,
    rounding: Any,
    order: Any,
    factor: float,
    padded: bool,
    count_padding: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = math.prod(shape)
    scores = torch.randn(tokens, num_experts, generator=generator)
    real = torch.rand(tokens, generator=generator) < 0.6 if padded else None
    capacity = Capacity(
        rounding, factor, minimum=2, per_sequence=2, order=order, count_padding=count_padding
    )
    context = RouteContext(training=True, real=real, shape=shape, generator=generator)
    routing = router(num_experts, top_k, capacity=capacity).select(scores, context)
    assert routing.active is not None
    mask = torch.ones(tokens, dtype=torch.bool) if real is None else real
    counted = int(mask.sum()) if not count_padding else tokens
    limit = capacity.limit(counted, num_experts, top_k, True)
    assert limit is not None
    assert not routing.active[~mask].any()  # padding is never dispatched
    length = shape[1] if rounding == "huggingface" else tokens
    for start in range(0, tokens, length):
        rows = slice(start, start + length)
        asked = torch.bincount(
            routing.experts[rows][mask[rows]].reshape(-1), minlength=num_experts
        ).tolist()
        kept = loads(routing, num_experts, True, rows)
        assert kept == [min(load, limit) for load in asked]


def test_first_choices_come_before_second_ones() -> None:
    # Token 0: expert 0, then 1. Tokens 1 and 2: expert 1, then 0. One slot per expert and rank.
    scores = torch.tensor([[3.0, 2.0, -9.0], [2.0, 3.0, -9.0], [2.0, 2.9, -9.0]])
    capacity = Capacity(factor=1.0)  # 2 floor(1 ceil(3 / 3)) = 2 slots
    routing = router(3, 2, capacity=capacity).select(scores, RouteContext(training=True))
    assert routing.active is not None
    # Expert 1 is full of first choices; expert 0 has one place left, for token 1.
    assert routing.active.tolist() == [[True, False], [True, True], [True, False]]


def test_random_service_is_by_chance_in_training_and_by_position_else() -> None:
    scores = torch.zeros(64, 2)
    scores[:, 0] = 1.0
    capacity = Capacity("deepspeed", 0.5, order="random", in_evaluation=True)
    chosen = []
    for seed in range(2):
        context = RouteContext(training=True, generator=torch.Generator().manual_seed(seed))
        active = router(2, capacity=capacity).select(scores, context).active
        assert active is not None
        assert int(active.sum()) == 16
        chosen.append(active)
    assert not torch.equal(*chosen)
    active = router(2, capacity=capacity).select(scores, RouteContext()).active
    assert active is not None
    assert active[:16].all()
    assert not active[16:].any()


def test_slots_per_sequence_need_sequences() -> None:
    gate = router(capacity=Capacity("huggingface", in_evaluation=True))
    for shape in (None, (8,), (3, 3)):
        with pytest.raises(ModelError, match=r"counts slots in every sequence.*choose 'fairseq'"):
            gate.select(torch.randn(8, 4), RouteContext(shape=shape))


# --- padding and batches ------------------------------------------------------------------------


def route_training(scores: Tensor, real: Tensor | None, **more: Any) -> Routing:
    found: Routing = router(scores.shape[1], 2, **more).select(
        scores, RouteContext(training=True, real=real)
    )
    return found


@pytest.mark.parametrize("renormalise", ["before", "after"])
def test_padding_changes_nothing_for_real_tokens(renormalise: str) -> None:
    scores = torch.randn(24, 4)
    capacity = Capacity(factor=0.6)
    alone = route_training(scores, None, capacity=capacity, renormalise=renormalise)
    where = torch.randperm(40)[:24].sort().values
    padded, real = 9 * torch.randn(40, 4), torch.zeros(40, dtype=torch.bool)
    padded[where], real[where] = scores, True
    found = route_training(padded, real, capacity=capacity, renormalise=renormalise)
    assert alone.active is not None
    assert found.active is not None
    assert not alone.active.all()
    assert torch.equal(found.active[where], alone.active)
    assert torch.equal(found.experts[where], alone.experts)
    torch.testing.assert_close(found.weights[where], alone.weights)


def test_without_capacity_a_token_does_not_see_its_batch() -> None:
    scores = torch.randn(24, 4)
    whole, part = route_training(scores, None), route_training(scores[7:9], None)
    assert whole.active is None
    assert torch.equal(whole.experts[7:9], part.experts)
    torch.testing.assert_close(whole.weights[7:9], part.weights)


# --- weights ------------------------------------------------------------------------------------


def test_weight_of_one_expert() -> None:
    scores = torch.randn(9, 4, requires_grad=True)
    best = scores.softmax(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(router().select(scores, RouteContext()).weights, best)
    scaled = router(times_experts=True).select(scores, RouteContext()).weights
    torch.testing.assert_close(scaled, 4 * best)
    one = router(combine="straight_through").select(scores, RouteContext()).weights
    assert torch.equal(one, torch.ones(9, 1))
    (got,) = torch.autograd.grad(one.sum(), scores)
    (want,) = torch.autograd.grad(best.log().sum(), scores)
    torch.testing.assert_close(got, want)


def test_weights_of_two_experts_sum_to_one_before_or_after_tokens_are_dropped() -> None:
    scores = torch.randn(40, 4)
    capacity = Capacity(factor=0.4)
    before = route_training(scores, None, capacity=capacity, renormalise="before")
    after = route_training(scores, None, capacity=capacity, renormalise="after")
    assert before.active is not None
    assert torch.equal(before.active, after.active)  # type: ignore[arg-type]
    torch.testing.assert_close(before.weights.sum(-1), torch.ones(40))
    kept = before.active.sum(-1)
    assert {0, 1, 2} == set(kept.tolist())
    total = after.gates(4).sum(-1)
    torch.testing.assert_close(total, (kept > 0).float())  # a lone survivor has weight 1
    assert (before.gates(4).sum(-1)[kept == 1] < 1).all()


def test_second_choice_by_policy() -> None:
    scores = torch.tensor([[4.0, 1.0, 0.5, 0.0]]).repeat(4000, 1)
    probs = scores[0].softmax(-1)

    def found(second: Any, **context: Any) -> Routing:
        generator = torch.Generator().manual_seed(0)
        routing: Routing = router(4, 2, second=second, renormalise="before").select(
            scores, RouteContext(generator=generator, **context)
        )
        return routing

    for second in ("all", "sampling", "random"):  # evaluation is not left to chance
        routing = found(second)
        assert routing.active is None
        assert routing.experts[:, 1].eq(1).all()
    sampled = found("sampling", training=True)
    assert sampled.experts[:, 0].eq(0).all()
    shares = torch.bincount(sampled.experts[:, 1], minlength=4) / 4000
    expected = (probs * torch.tensor([0.0, 1.0, 1.0, 1.0])) / probs[1:].sum()
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
    kept = found("random", training=True).active
    assert kept is not None
    assert kept[:, 0].all()
    share = 2 * float(probs[1] / (probs[0] + probs[1]))
    assert float(kept[:, 1].float().mean()) == pytest.approx(share, abs=0.02)


def test_a_second_choice_that_was_not_kept_takes_no_slot() -> None:
    # Both tokens want expert 0 first and expert 1 second, which is likely for the second only.
    scores = torch.tensor([[20.0, 0.0, -30.0], [1.0, 1.0, -30.0]])
    gate = router(3, 2, second="random", capacity=Capacity(factor=0.5 + 1e-9))
    assert gate.capacity.limit(2, 3, 2, True) == 0
    gate.capacity = Capacity("deepspeed", 0.1, minimum=1)  # one slot
    routing = gate.select(scores, RouteContext(training=True))
    assert routing.active is not None
    # Position would give expert 1 to token 0, had it asked; its chance to ask is 4e-9.
    assert routing.active.tolist() == [[True, False], [False, True]]


# --- jitter and precision -----------------------------------------------------------------------


def test_jitter_is_for_the_router_alone_and_for_training_alone() -> None:
    gate = router(jitter=0.3).train()
    x = torch.randn(50, D)
    before = x.clone()
    noisy = gate.scores(x)
    assert torch.equal(x, before)
    clean = gate.eval().scores(x)
    assert not torch.allclose(noisy, clean)
    torch.testing.assert_close(clean, x @ gate.gate.weight.T)
    bound = 0.3 * x.abs() @ gate.gate.weight.abs().T
    assert ((noisy - clean).abs() <= bound + 1e-6).all()


def test_scores_are_in_float32_whatever_the_model_is_in() -> None:
    x = torch.randn(50, D)
    gate = router().bfloat16()
    assert gate.scores(x.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert router().scores(x).dtype == torch.float32
    assert router().double().scores(x.double()).dtype == torch.float64


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 0.0}, "capacity factor of 0 leaves experts without slots"),
        ({"factor": -1.0}, r"capacity factor of -1 .*only rounding='tutel' knows"),
        ({"rounding": "fairsec"}, r"rounding is 'fairsec'. Did you mean 'fairseq'"),
        ({"order": "priority"}, "order is 'priority'"),
        ({"rounding": "huggingface", "per_sequence": 0}, "per_sequence=0"),
        ({"share": 1.5}, r"share=1.5"),
    ],
)
def test_capacities_that_cannot_work(
    settings: dict[str, Any], message: str, without_shape_checks: None
) -> None:
    with pytest.raises(ConfigError, match=message):
        Capacity(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"second": "any"}, "second is 'any'. Known names: all, random, sampling"),
        ({"renormalise": "never"}, "renormalise is 'never'"),
        ({"combine": "softmax"}, "combine is 'softmax'"),
        ({"jitter": 1.0}, "jitter is 1"),
        ({"jitter": -0.1}, "jitter is -0.1"),
    ],
)
def test_routers_that_cannot_work(
    settings: dict[str, Any], message: str, without_shape_checks: None
) -> None:
    with pytest.raises(ConfigError, match=message):
        router(**settings)
