"""Stick-breaking attention: the tiles compute the formula, and the formula has its properties.

Every property of the tiles is tested with the step in C++, where it can be compiled, and in
PyTorch. Tiles are made small, so that small operands have many.
"""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moduli.models.stick_breaking import (
    native,
    stick_breaking_attention,
    stick_breaking_weights,
    tiles,
)

NAMES = ("out", "rest", "dq", "dk", "dv")


@pytest.fixture(params=["C++", "PyTorch"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two computes a tile."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("there is no C++ compiler")
    return str(request.param)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "keys_per_tile", lambda keys, queries: 7)
    monkeypatch.setattr(tiles, "rows_and_times", lambda rows, group, times, step: (2, 5))


def operands(
    B: int = 1, Hq: int = 2, H: int = 2, T: int = 23, S: int | None = None, D: int = 6, Dv: int = 6
) -> list[Tensor]:
    """Query, key, value, and gradients of outputs and remainders."""
    S = T if S is None else S
    sizes = ((B, Hq, T, D), (B, H, S, D), (B, H, S, Dv), (B, Hq, T, Dv), (B, Hq, T))
    return [torch.randn(*size) for size in sizes]


def results(
    tensors: list[Tensor], backend: str, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """Outputs, remainders and gradients in a dtype."""
    *leaves, dout, drest = (t.to(dtype) for t in tensors)
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    found = stick_breaking_attention(*leaves, return_remainder=True, backend=backend, **options)
    grads = torch.autograd.grad(found, leaves, (dout, drest))
    return dict(zip(NAMES, [t.detach() for t in (*found, *grads)], strict=True))


def same(tensors: list[Tensor], tolerance: float = 2e-6, **options: Any) -> None:
    """Tiles in float32 against the formula in float64, to a share of the largest number."""
    found = results(tensors, "blocked", torch.float32, **options)
    for name, want in results(tensors, "reference", torch.float64, **options).items():
        gap = float((found[name].double() - want).abs().max())
        assert gap <= tolerance * max(float(want.abs().max()), 1e-3), (name, gap)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_tiles_compute_the_formula(step: str, small: None, data: st.DataObject) -> None:
    draw = data.draw
    B, H, group = (draw(st.integers(1, n)) for n in (2, 3, 3))
    T = draw(st.integers(1, 30))
    S = T + draw(st.integers(0, 20))
    torch.manual_seed(draw(st.integers(0, 99)))
    mask = torch.rand(B, S) > 0.4 if draw(st.booleans()) else None
    segments = torch.randint(0, 3, (B, S)).sort(-1).values if draw(st.booleans()) else None
    same(
        operands(B, H * group, H, T, S, draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        key_mask=mask,
        segments=segments,
        attend_current=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.1, 3.0])),
    )


@pytest.mark.parametrize("mean", [0.0, -6.0])
def test_long_rows_of_equal_logits_lose_no_digits(step: str, mean: float) -> None:
    """Factors next to 1, all rounded alike, would show here first."""
    tensors = operands(1, 1, 1, 150, 1500, 4, 4)
    tensors[0][:] = mean / 2
    tensors[1][:] = 1
    same(tensors, scale=0.5)


def test_published_tile_sizes(step: str) -> None:
    same(operands(2, 3, 1, 150, 400, 8, 5), key_mask=torch.arange(400).expand(2, 400) > 17)


@pytest.mark.parametrize("size", [30.0, 150.0, 2000.0])
def test_extreme_logits_are_finite_and_right(step: str, small: None, size: float) -> None:
    tensors = operands(D=1)
    # Powers of two, so that logits are the same numbers in both precisions.
    tensors[0] = tensors[0].sign()
    tensors[1] = tensors[1].sign() * torch.randint(1, 3, tensors[1].shape)
    same(tensors, scale=size)


def test_gradients_of_all_gradients(small: None) -> None:
    q, k, v, *_ = (t.double() for t in operands(1, 2, 1, 5, 8, 2, 3))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    mask = torch.tensor([[True] * 3 + [False] + [True] * 4])

    def call(*tensors: Tensor) -> Any:
        return stick_breaking_attention(
            *tensors, key_mask=mask, attend_current=False, return_remainder=True, backend="blocked"
        )

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("where", [slice(0, 5), slice(8, 12), slice(4, 7), slice(None)])
def test_masked_keys_are_as_if_they_were_not_there(step: str, small: None, where: slice) -> None:
    q, k, v, *_ = operands(T=12)
    there = torch.ones(12, dtype=torch.bool)
    there[where] = False
    out, rest = stick_breaking_attention(
        q, k, v, key_mask=there[None], return_remainder=True, backend="blocked"
    )
    if not there.any():
        assert out.eq(0).all()
        assert rest.eq(1).all()
        return
    alone = stick_breaking_attention(*(t[:, :, there] for t in (q, k, v)))
    torch.testing.assert_close(out[:, :, there], alone)


def test_gradients_of_rows_that_see_nothing_are_zero(step: str, small: None) -> None:
    found = results(
        operands(), "blocked", torch.float32, key_mask=torch.zeros(1, 23, dtype=torch.bool)
    )
    assert all(found[n].eq(0).all() for n in ("out", "dq", "dk", "dv"))


def test_segments_are_sequences_of_their_own(step: str, small: None) -> None:
    tensors = operands(T=20)
    lengths = [3, 9, 8]
    ids = torch.repeat_interleave(torch.tensor([5, 2, 9]), torch.tensor(lengths))[None]
    packed = results(tensors, "blocked", torch.float32, segments=ids)
    parts = zip(*(t.split(lengths, dim=2) for t in tensors), strict=True)
    apart = [results(list(part), "blocked", torch.float32) for part in parts]
    for name in NAMES:
        torch.testing.assert_close(packed[name], torch.cat([p[name] for p in apart], dim=2))


def test_chunks_and_single_tokens_are_the_whole(step: str, small: None) -> None:
    q, k, v, *_ = operands(T=23)
    whole = stick_breaking_attention(q, k, v)
    for first, end in ((0, 9), (9, 22), (22, 23)):
        part = stick_breaking_attention(q[:, :, first:end], k[:, :, :end], v[:, :, :end])
        torch.testing.assert_close(part, whole[:, :, first:end])


def test_keys_may_be_the_values(step: str, small: None) -> None:
    q, k, _, dout, _ = operands()
    shared, key, value = (k.clone().requires_grad_() for _ in range(3))
    (together,) = torch.autograd.grad(stick_breaking_attention(q, shared, shared), shared, dout)
    apart = torch.autograd.grad(stick_breaking_attention(q, key, value), (key, value), dout)
    torch.testing.assert_close(together, apart[0] + apart[1])


def test_groups_are_repeated_keys(step: str, small: None) -> None:
    q, k, v, *_ = operands(2, 6, 2)
    repeated = (t.repeat_interleave(3, dim=1) for t in (k, v))
    torch.testing.assert_close(
        stick_breaking_attention(q, k, v), stick_breaking_attention(q, *repeated)
    )


def test_weights_and_the_remainder_are_the_stick() -> None:
    q, k, v, *_ = (t.double() for t in operands())
    weights = stick_breaking_weights(q, k)
    out, rest = stick_breaking_attention(q, k, v, return_remainder=True, backend="reference")
    torch.testing.assert_close(weights.sum(-1) + rest, torch.ones_like(rest))
    torch.testing.assert_close(out, weights @ v)
    # The definition, one key at a time.
    share = torch.sigmoid(q @ k.mT / 6**0.5)
    left = torch.ones(1, 2)
    for j in reversed(range(20)):
        torch.testing.assert_close(weights[:, :, 19, j], left * share[:, :, 19, j])
        left = left * (1 - share[:, :, 19, j])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_is_computed_in_float32(
    small: None, dtype: torch.dtype, bound: float
) -> None:
    tensors = [t.to(dtype) for t in operands(T=60)]
    found = results(tensors, "blocked", dtype)
    for name, want in results(tensors, "reference", torch.float64).items():
        assert found[name].dtype == dtype
        # Nothing but the last rounding: half a unit of the last place of each number.
        gap = (found[name].double() - want).abs() - bound / 2 * want.abs()
        assert float(gap.max()) <= 1e-5, name


def test_operands_may_differ_in_dtype() -> None:
    """As under autocast, where keys may be a normalised input and queries a product."""
    q, k, v, *_ = operands()
    found = stick_breaking_attention(q.bfloat16(), k, v)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found, stick_breaking_attention(q.bfloat16().float(), k, v).bfloat16()
    )


def test_views_are_read_as_they_lie(small: None) -> None:
    x = torch.randn(2, 9, 3, 6)  # [batch, time, heads, width], as projections give them
    view = x.transpose(1, 2)
    torch.testing.assert_close(
        stick_breaking_attention(view, view, view),
        stick_breaking_attention(*(view.contiguous(),) * 3),
    )


def test_early_exit_drops_no_more_than_allowed(step: str, small: None) -> None:
    tensors = operands(T=60)
    exact = results(tensors, "reference", torch.float64)
    largest = float(tensors[2].abs().max())
    for least in (0.3, 1e-2, 1e-5):
        found = results(tensors, "blocked", torch.float32, early_exit=least)
        assert float((found["out"] - exact["out"]).abs().max()) <= least * largest + 1e-6
    assert float(found["rest"].max()) <= 1


def test_early_exit_changes_nothing_when_it_does_not_fire(step: str, small: None) -> None:
    tensors = operands(T=40)
    tensors[0].mul_(0.01).sub_(1)
    tensors[1].abs_()  # small shares: much of the stick is left at the first key
    exact = results(tensors, "blocked", torch.float32)
    found = results(tensors, "blocked", torch.float32, early_exit=1e-9)
    assert all(torch.equal(found[n], exact[n]) for n in NAMES)


def test_gradients_with_early_exit_are_those_of_the_keys_that_were_read(
    step: str, small: None
) -> None:
    tensors = operands(1, 1, 1, 5, 30)
    tensors[1][:, :, 21:] = 0  # the last nine keys take half of the stick each
    found = results(tensors, "blocked", torch.float32, early_exit=0.04)
    near = [t[:, :, 21:] if t.shape[2] == 30 else t for t in tensors]
    want = results(near, "reference", torch.float64)
    assert found["dk"][:, :, :21].eq(0).all()
    for name in ("out", "rest", "dq"):
        torch.testing.assert_close(found[name].double(), want[name], atol=1e-6, rtol=1e-5)


def test_few_queries_read_no_further_than_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, *_ = operands(1, 1, 1, 1, 9000, 4, 4)
    seen: list[int] = []
    spend = tiles.spend
    monkeypatch.setattr(tiles, "spend", lambda z, left: (seen.append(z.shape[1]), spend(z, left)))
    stick_breaking_attention((q * 0).requires_grad_(), k, v, early_exit=1e-6)
    assert 0 < sum(seen) < 3000


def test_nan_is_passed_on_to_those_who_see_it(step: str, small: None) -> None:
    q, k, v, *_ = operands(T=12)
    k[:, :, 5] = torch.nan
    out = stick_breaking_attention(q, k, v)
    assert out[:, :, :5].isfinite().all()
    assert out[:, :, 5].isnan().all()
    q[:, :, 3] = torch.nan
    assert stick_breaking_attention(q, k, v)[:, :, 3].isnan().all()
