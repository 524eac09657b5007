"""Decoding: one query over a cache, in one pass of C++, computes what the formula says."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moduli.models.stick_breaking import native, single, stick_breaking_attention

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C++ compiler")


def operands(
    B: int = 2, Hq: int = 4, H: int = 2, S: int = 50, D: int = 6, Dv: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, Hq, 1, D), torch.randn(B, H, S, D), torch.randn(B, H, S, Dv)


def both(tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> tuple[list[Tensor], Any]:
    """Outputs and remainders, and the same by the formula in float64."""
    assert single.takes(*tensors)
    found = stick_breaking_attention(*tensors, return_remainder=True, **options)
    exact = stick_breaking_attention(
        *(t.double() for t in tensors), return_remainder=True, backend="reference", **options
    )
    return list(found), exact


def same(tensors: tuple[Tensor, Tensor, Tensor], bound: float = 2e-6, **options: Any) -> None:
    for found, want in zip(*both(tensors, **options), strict=True):
        assert found.dtype == tensors[0].dtype
        gap = float((found.double() - want).abs().max())
        assert gap <= bound * max(float(want.abs().max()), 1e-3), gap


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_it_computes_the_formula(data: st.DataObject) -> None:
    draw = data.draw
    B, H, group = (draw(st.integers(1, n)) for n in (2, 3, 3))
    S = draw(st.integers(1, 1300))
    torch.manual_seed(draw(st.integers(0, 99)))
    mask = torch.rand(B, S) > 0.4 if draw(st.booleans()) else None
    segments = torch.randint(0, 3, (B, S)).sort(-1).values if draw(st.booleans()) else None
    same(
        operands(B, H * group, H, S, draw(st.integers(1, 70)), draw(st.integers(1, 200))),
        key_mask=mask,
        segments=segments,
        attend_current=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.02, 3.0])),
    )


@pytest.mark.parametrize("mean", [0.0, -6.0])
def test_long_rows_of_equal_logits_lose_no_digits(mean: float) -> None:
    q, k, v = operands(1, 1, 1, 3000, 4, 4)
    same((torch.full_like(q, mean / 2), torch.ones_like(k), v.abs()), scale=0.5)


@pytest.mark.parametrize("size", [150.0, 2000.0, 1e30])
def test_extreme_logits_are_finite_and_right(size: float) -> None:
    q, k, v = operands(D=1)
    same((q.sign(), k.sign() * torch.randint(1, 3, k.shape), v), scale=size)


@pytest.mark.parametrize("shape", [(1, 1, 1, 900, 1024, 1024), (2, 4, 1, 700, 64, 33)])
def test_bfloat16_is_computed_in_float32(shape: tuple[int, ...]) -> None:
    q, k, v = (t.bfloat16() for t in operands(*shape))
    for found, want in zip(*both((q, k, v)), strict=True):
        assert float((found - want).abs().max()) <= max(4e-3 * float(want.abs().max()), 1e-30)


def test_caches_are_read_where_they_lie() -> None:
    """As projections give them, as longer buffers hold them, and with gaps in their rows."""
    q, k, v = operands(S=30)
    want = stick_breaking_attention(q, k, v)
    by_time = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    assert torch.equal(stick_breaking_attention(q, *by_time), want)
    longer = (torch.cat([t, t], dim=2)[:, :, :30] for t in (k, v))
    assert torch.equal(stick_breaking_attention(q, *longer), want)
    gaps = (t.repeat_interleave(2, dim=3)[..., ::2] for t in (q, k, v))
    assert torch.equal(stick_breaking_attention(*gaps), want)
    first = (t[:1].expand(2, -1, -1, -1) for t in (k, v))
    assert torch.equal(stick_breaking_attention(q, *first)[:1], want[:1])


def test_left_padding_is_as_if_it_were_not_there() -> None:
    q, k, v = operands(S=200)
    there = torch.arange(200).expand(2, 200) >= torch.tensor([[150], [0]])
    padded = stick_breaking_attention(q, k, v, key_mask=there)
    alone = stick_breaking_attention(q[:1], k[:1, :, 150:], v[:1, :, 150:])
    torch.testing.assert_close(padded[:1], alone)
    there[1] = False
    out, rest = stick_breaking_attention(q, k, v, key_mask=there, return_remainder=True)
    assert out[1].eq(0).all()
    assert rest[1].eq(1).all()


def test_what_is_far_behind_an_exit_is_not_read() -> None:
    q, k, v = operands(S=1000)
    q.zero_()  # every key takes half of the stick
    k[:, :, :700], v[:, :, :700] = torch.nan, torch.nan
    assert stick_breaking_attention(q, k, v, early_exit=1e-6).isfinite().all()
    assert stick_breaking_attention(q, k, v).isfinite().all()  # float32 has nothing left
    assert stick_breaking_attention(q / 0 * 0, k, v).isnan().all()
    k[:, :, 999] = torch.nan
    assert stick_breaking_attention(q, k, v, early_exit=1e-6).isnan().all()


def test_an_exit_drops_no_more_than_allowed() -> None:
    q, k, v = operands(S=900, D=16)
    for least in (0.3, 1e-2, 1e-5):
        (found, rest), (want, _) = both((q, k, v), early_exit=least)
        assert float((found - want).abs().max()) <= least * float(v.abs().max()) + 1e-6
        assert float(rest.max()) <= 1


def test_others_go_through_the_operator() -> None:
    q, k, v = operands()
    assert not single.takes(q.half(), k.half(), v.half())
    assert not single.takes(q.bfloat16(), k, v)
    assert not single.takes(q.expand(-1, -1, 2, -1), k, v)
    k.requires_grad_()
    assert not single.takes(q, k, v)
    with torch.no_grad():
        assert single.takes(q, k, v)
        one_pass = stick_breaking_attention(q, k, v)
    torch.testing.assert_close(one_pass, stick_breaking_attention(q, k, v))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t.detach()) for t in (q, k, v)]
        assert stick_breaking_attention(*fake).shape == (2, 4, 1, 5)


def test_threads_change_nothing() -> None:
    q, k, v = operands(S=600)
    one = stick_breaking_attention(q, k, v)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(stick_breaking_attention(q, k, v), one)
    finally:
        torch.set_num_threads(before)
