"""The gates: avg-k in its forms, and the learned ones."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from moduli.routing import (
    AvgKRouter,
    CosineRouter,
    LinearRouter,
    Rule,
    gate_from_keys,
    key_means,
    retie,
)
from moduli.routing.avgk import group_means

D, SIZES, RAGGED = 8, (4, 4, 4), (3, 5, 4)
RULE = Rule(top_k=2)


def groups(rows: torch.Tensor, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [rows[a:b] for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("sizes", [SIZES, RAGGED])
def test_mean_keys_are_over_each_experts_own_neurons(sizes: tuple[int, ...]) -> None:
    keys = torch.randn(12, D)
    expected = torch.stack([g.mean(0) for g in groups(keys, sizes)])
    torch.testing.assert_close(key_means(keys, sizes), expected)
    torch.testing.assert_close(
        gate_from_keys(keys, sizes, normalize=True), F.normalize(expected, dim=-1)
    )


@pytest.mark.parametrize("sizes", [SIZES, RAGGED])
@pytest.mark.parametrize("bias", [True, False])
def test_scores_from_preactivations_are_those_of_the_gate(
    sizes: tuple[int, ...], bias: bool
) -> None:
    keys, x = torch.randn(12, D), torch.randn(7, D)
    b = 3 * torch.randn(12) if bias else None
    router = AvgKRouter(lambda: keys, sizes, RULE)
    torch.testing.assert_close(
        router.from_preactivations(F.linear(x, keys, b), b), router.scores(x), rtol=1e-5, atol=1e-5
    )


def test_low_precision_means_are_taken_in_float32() -> None:
    z = 1 + torch.rand(5, 4096) / 64
    low = z.bfloat16()
    found = group_means(low, (2048, 2048))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, low.float().view(5, 2, -1).mean(-1), rtol=1e-6, atol=0)
    assert gate_from_keys(low.T, (4096,)).dtype == torch.float32
    assert group_means(z.double(), (2048, 2048)).dtype == torch.float64


@pytest.mark.parametrize("kind", [LinearRouter, CosineRouter])
def test_shapes_are_known_without_numbers(kind: type[LinearRouter | CosineRouter]) -> None:
    """The meta device, which has no autocast to suspend."""
    router = kind(D, 3, RULE).to("meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert router.scores(torch.empty(5, D, device="meta")).shape == (5, 3)


def test_autocast_does_not_touch_scores() -> None:
    keys, x = torch.randn(12, D), torch.randn(7, D)
    routers = (
        AvgKRouter(lambda: keys, SIZES, RULE),
        LinearRouter(D, 3, RULE),
        CosineRouter(D, 3, RULE),
    )
    for router in routers:
        plain = router.scores(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router.scores(x), plain)


def test_a_live_gate_follows_the_keys_and_a_kept_one_waits() -> None:
    keys, x = torch.randn(12, D), torch.randn(7, D)
    live = AvgKRouter(lambda: keys, SIZES, RULE)
    kept = AvgKRouter(lambda: keys, SIZES, RULE, momentum=0.25)
    assert live.live
    assert not kept.live
    assert set(kept.state_dict()) == {"gate"}
    assert not live.state_dict()
    before, old = kept.scores(x), key_means(keys, SIZES)
    torch.testing.assert_close(before, live.scores(x))
    keys.mul_(-2)
    assert torch.equal(kept.scores(x), before)
    torch.testing.assert_close(live.scores(x), -2 * before)
    kept.update()  # no micro-batch has run
    assert torch.equal(kept.scores(x), before)
    kept.stale = True
    kept.update()
    torch.testing.assert_close(kept.gate, 0.25 * old + 0.75 * (-2 * old))
    kept.update()  # once per micro-batch
    torch.testing.assert_close(kept.gate, 0.25 * old + 0.75 * (-2 * old))


def test_normalised_scores_are_cosines() -> None:
    keys, x = torch.randn(12, D), 9 * torch.randn(7, D)
    router = AvgKRouter(lambda: keys, SIZES, RULE, normalize=True)
    expected = F.cosine_similarity(x[:, None], key_means(keys, SIZES)[None], dim=-1)
    torch.testing.assert_close(router.scores(x), expected)


def test_a_kept_gate_is_normalised_from_the_first_update_on() -> None:
    keys = 5 * torch.randn(12, D)
    router = AvgKRouter(lambda: keys, SIZES, RULE, normalize=True, momentum=0.0)
    torch.testing.assert_close(router.gate, key_means(keys, SIZES))
    router.stale = True
    router.update()
    torch.testing.assert_close(router.gate.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("sizes", [SIZES, RAGGED])
@pytest.mark.parametrize("normalize", [False, True])
def test_retie(sizes: tuple[int, ...], normalize: bool) -> None:
    gate, keys, values = torch.randn(3, D), torch.randn(12, D), torch.randn(12, D)

    def mixed(means: torch.Tensor) -> torch.Tensor:
        return 0.3 * gate + 0.7 * (F.normalize(means, dim=-1) if normalize else means)

    plain = torch.stack([g.mean(0) for g in groups(keys, sizes)])
    torch.testing.assert_close(
        retie(gate, keys, sizes, momentum=0.3, normalize=normalize), mixed(plain)
    )
    weighted = []
    for own, value in zip(groups(keys, sizes), groups(values, sizes), strict=True):
        norms = [float(v.norm()) for v in value]
        weighted.append(sum(n / sum(norms) * k for n, k in zip(norms, own, strict=True)))
    torch.testing.assert_close(
        retie(gate, keys, sizes, momentum=0.3, normalize=normalize, values=values),
        mixed(torch.stack(weighted)),
    )


def test_a_linear_gate_starts_where_it_is_told() -> None:
    means, x = torch.randn(3, D), torch.randn(7, D)
    router = LinearRouter(D, 3, RULE, init=means)
    torch.testing.assert_close(router.scores(x), x @ means.T)
    router.scores(x).square().sum().backward()
    assert bool(router.gate.weight.grad.any())


def test_the_cosine_gate() -> None:
    router, x = CosineRouter(D, 3, RULE, projection=5), torch.randn(7, D)
    z = F.linear(x, router.projector.weight, router.projector.bias)
    expected = F.cosine_similarity(z[:, :, None], router.directions[None], dim=1)
    torch.testing.assert_close(router.scores(x), 2 * expected)  # exp(ln 2)
    with torch.no_grad():
        router.temperature.fill_(math.log(50))
    torch.testing.assert_close(router.scores(x), 50 * expected)
    with torch.no_grad():
        router.temperature.fill_(1000.0)  # exp would be infinite
    found = router.scores(x)
    torch.testing.assert_close(found, 100 * expected)
    found.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in router.parameters())
    assert float(router.temperature.grad) == 0
