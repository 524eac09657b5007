"""From scores to a routing: choice, weights, noise, their gradients."""

import pytest
import torch

from moduli.errors import ConfigError
from moduli.routing import RouteContext, Router, Routing, Rule, route

T, E = 17, 6
EVAL, TRAIN = RouteContext(), RouteContext(training=True)


def scores(seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(T, E, generator=generator)


def test_the_three_arms_of_choice() -> None:
    s = scores()
    order = s.argsort(dim=-1, descending=True)
    for top_k in range(1, E):
        top, bottom, rest = (
            route(s, Rule(top_k=top_k, choose=arm), EVAL).experts.sort(dim=-1).values
            for arm in ("top", "bottom", "not_top")
        )
        assert torch.equal(top, order[:, :top_k].sort(dim=-1).values)
        assert torch.equal(bottom, order[:, E - top_k :].sort(dim=-1).values)
        assert torch.equal(rest, order[:, top_k:].sort(dim=-1).values)


def test_slots_are_in_order_of_choice() -> None:
    s = scores()
    chosen = s.gather(1, route(s, Rule(top_k=4), EVAL).experts)
    assert bool((chosen[:, :-1] >= chosen[:, 1:]).all())


@pytest.mark.parametrize("top_k", [0, E + 1])
def test_impossible_top_k(top_k: int) -> None:
    with pytest.raises(ConfigError, match=f"there are {E} experts"):
        route(scores(), Rule(top_k=top_k), EVAL)


def test_softmax_is_renormalised_over_the_chosen_but_not_for_one() -> None:
    s = scores()
    p = s.softmax(-1)
    three = route(s, Rule(top_k=3, combine="softmax"), EVAL)
    torch.testing.assert_close(three.weights.sum(-1), torch.ones(T))
    chosen = p.gather(1, three.experts)
    torch.testing.assert_close(three.weights, chosen / chosen.sum(-1, keepdim=True))
    one = route(s, Rule(top_k=1, combine="softmax"), EVAL)
    torch.testing.assert_close(one.weights[:, 0], p.amax(-1))
    assert float(one.weights.max()) < 1


def test_straight_through_is_one_with_the_gradient_of_the_log_probability() -> None:
    s = scores().requires_grad_()
    routing = route(s, Rule(top_k=3, combine="straight_through"), EVAL)
    assert torch.equal(routing.weights, torch.ones(T, 3))
    push = torch.randn(T, 3)
    (found,) = torch.autograd.grad((push * routing.weights).sum(), s)
    log_p = s.log_softmax(-1).gather(1, routing.experts)
    (expected,) = torch.autograd.grad((push * log_p).sum(), s)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("combine", ["softmax", "straight_through"])
@pytest.mark.parametrize("choose", ["top", "bottom", "not_top"])
def test_gradients_are_finite_for_far_apart_scores(combine: str, choose: str) -> None:
    s = scores(spread=200).requires_grad_()  # probabilities underflow
    rule = Rule(top_k=2, combine=combine, choose=choose)  # type: ignore[arg-type]
    routing = route(s, rule, EVAL)
    routing.weights.square().sum().backward()
    assert bool(routing.weights.isfinite().all())
    assert bool(s.grad.isfinite().all())


def test_weights_of_one_have_no_gradient() -> None:
    routing = route(scores().requires_grad_(), Rule(top_k=2), EVAL)
    assert torch.equal(routing.weights, torch.ones(T, 2))
    assert not routing.weights.requires_grad


def test_noise_is_for_training_and_its_width_is_a_share_of_one_expert() -> None:
    s = torch.zeros(4000, E)
    rule = Rule(top_k=1, noise=0.6)
    noisy = route(s, rule, TRAIN).noisy_scores
    assert float(noisy.std()) == pytest.approx(0.6 / E, rel=0.03)
    assert float(noisy.mean()) == pytest.approx(0, abs=0.01)
    quiet = route(s, rule, EVAL)
    assert torch.equal(quiet.noisy_scores, s)
    assert torch.equal(route(s, Rule(top_k=1), TRAIN).noisy_scores, s)


def test_noise_decides_selection_and_is_not_in_the_scores() -> None:
    s, noise = scores(), 50 * torch.randn(T, E)
    routing = route(s, Rule(top_k=2, noise=1.0), RouteContext(training=True, noise=noise))
    assert torch.equal(routing.scores, s)
    assert torch.equal(routing.noisy_scores, s + noise / E)
    assert torch.equal(routing.experts, (s + noise / E).topk(2).indices)


def test_a_generator_makes_noise_repeatable() -> None:
    rule = Rule(top_k=2, noise=1.0)

    def drawn(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return route(scores(), rule, RouteContext(training=True, generator=generator)).noisy_scores

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_gates_are_the_same_routing_as_a_matrix() -> None:
    active = torch.rand(T, 3) < 0.6
    routing = Routing(scores().topk(3).indices, torch.rand(T, 3), active)
    gates = routing.gates(E)
    for token in range(T):
        expected = [0.0] * E
        for slot in range(3):
            if active[token, slot]:
                expected[routing.experts[token, slot]] = float(routing.weights[token, slot])
        assert gates[token].tolist() == pytest.approx(expected)


class Norms(Router):
    """A router of a user."""

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_experts, -1)).norm(dim=-1)


def test_a_router_of_ones_own_needs_scores_only() -> None:
    x = torch.randn(T, 2 * E)
    router = Norms(E, Rule(top_k=2))
    expected = x.view(T, E, 2).norm(dim=-1).topk(2).indices
    assert torch.equal(router(x, EVAL).experts, expected)
    with pytest.raises(TypeError, match="does not define scores"):
        Router(E, Rule(top_k=2))(x, EVAL)


def test_wrong_shapes_are_found_under_test() -> None:
    class Wrong(Router):
        def scores(self, x: torch.Tensor) -> torch.Tensor:
            return x[0]  # one token too few dimensions

    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError):
        Wrong(E, Rule(top_k=2))(torch.randn(T, E), EVAL)
    with pytest.raises(TypeCheckError):
        route(torch.randn(T, E).long(), Rule(top_k=2), EVAL)


@pytest.mark.parametrize("top_k", [2, 5, 20])
@pytest.mark.parametrize("tokens", [1, 40])
def test_softmax_over_the_chosen_is_the_renormalised_probability(tokens: int, top_k: int) -> None:
    s = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    routing = route(s, Rule(top_k, combine="softmax"), EVAL)
    chosen = s.softmax(-1).gather(1, routing.experts)
    expected = chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights, expected)
    assert routing.weights.is_contiguous()
    push = torch.randn(tokens, top_k, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad((push * w).sum(), s)[0] for w in (routing.weights, expected)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("combine", ["softmax", "probability", "straight_through"])
def test_low_precision_scores_have_float32_weights(combine: str) -> None:
    s = scores().bfloat16()
    rule = Rule(top_k=3, combine=combine)  # type: ignore[arg-type]
    low, full = route(s, rule, EVAL), route(s.float(), rule, EVAL)
    assert low.weights.dtype == torch.float32
    assert torch.equal(low.weights, full.weights)
    assert torch.equal(low.experts, full.experts)
