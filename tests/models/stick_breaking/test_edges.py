"""Stick-breaking attention where there is nothing to compute, too much, or only just enough."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moduli.models.stick_breaking import stick_breaking_attention

BACKENDS = ["blocked", "reference"]


def leaves(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value of one shape."""
    return [torch.randn(*shape).to(dtype).requires_grad_() for _ in range(3)]


def step(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Outputs, remainders and gradients of sums, whose gradients have no memory of their own."""
    found = stick_breaking_attention(*tensors, return_remainder=True, **options)
    return [*found, *torch.autograd.grad(found[0].sum() + found[1].sum(), tensors)]


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Also fills what `torch.empty` returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequences(backend: str) -> None:
    tensors = leaves(0, 2, 5, 4)
    out, rest, *gradients = step(tensors, backend=backend)
    assert out.shape == (0, 2, 5, 4)
    assert rest.shape == (0, 2, 5)
    assert all(g.shape == (0, 2, 5, 4) for g in gradients)
    assert stick_breaking_attention(*(t.detach()[:, :, :1] for t in tensors)).numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_without_width_leave_the_stick(backend: str) -> None:
    q, k, v = leaves(2, 2, 5, 4)
    out, rest, *gradients = step([q, k, v[..., :0].detach().requires_grad_()], backend=backend)
    assert out.shape == (2, 2, 5, 0)
    want = step([q, k, v], backend="reference")
    torch.testing.assert_close(rest, want[1])
    assert gradients[0].abs().sum() > 0
    with torch.no_grad():
        _, last = stick_breaking_attention(q[:, :, -1:], k, v[..., :0], return_remainder=True)
    torch.testing.assert_close(last, rest[:, :, -1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token(backend: str) -> None:
    q, k, v = leaves(1, 1, 1, 4)
    share = torch.sigmoid((q * k).sum(-1) / 2)
    out, rest, *_ = step([q, k, v], backend=backend)
    torch.testing.assert_close(out, share[..., None] * v)
    torch.testing.assert_close(rest, 1 - share)
    out, rest, *gradients = step([q, k, v], backend=backend, attend_current=False)
    assert out.eq(0).all()
    assert rest.eq(1).all()
    assert all(g.eq(0).all() for g in gradients)
    with torch.no_grad():
        assert stick_breaking_attention(q, k, v, attend_current=False).eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_of_one_token_see_themselves_alone(backend: str) -> None:
    q, k, v = leaves(2, 2, 9, 4)
    alone = torch.arange(9).expand(2, 9)
    out, rest, *gradients = step([q, k, v], backend=backend, segments=alone)
    share = torch.sigmoid((q * k).sum(-1) / 2)
    torch.testing.assert_close(out, share[..., None] * v)
    torch.testing.assert_close(rest, 1 - share)
    want = torch.autograd.grad((share[..., None] * v).sum() + (1 - share).sum(), [q, k, v])
    for found, expected in zip(gradients, want, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_largest_numbers_of_half_precision(dtype: torch.dtype, length: int) -> None:
    """Their products are no numbers of the type, nor of float32 in bfloat16."""
    largest = torch.finfo(dtype).max
    q, k, v = (t.detach() for t in leaves(1, 1, 40, 1, dtype=dtype))
    q, k = q.sign() * largest, k.sign() * largest
    q = q[:, :, -length:]
    out, rest = stick_breaking_attention(q, k, v, return_remainder=True)
    want = stick_breaking_attention(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(out, want.to(dtype))  # type: ignore[union-attr]
    assert rest.isfinite().all()


def test_large_logits_have_finite_gradients() -> None:
    for scale in (1e3, -1e3, 1e20):
        assert all(t.isfinite().all() for t in step(leaves(1, 2, 30, 4), scale=scale))


def test_gaps_in_memory_change_nothing() -> None:
    tensors = leaves(1, 2, 12, 6)
    wide = [t.detach().repeat_interleave(2, dim=3)[..., ::2].requires_grad_() for t in tensors]
    by_time = [
        t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in tensors
    ]
    want = step(tensors)
    for others in (wide, by_time):
        for found, expected in zip(step(others), want, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("cache", [0, 30])
def test_where_sums_must_be_deterministic(cache: int, deterministic: None) -> None:
    q, k, v = leaves(2, 2, 150 + cache, 6)
    tensors = [q[:, :, cache:].detach().requires_grad_(), k, v]
    mask = torch.arange(150 + cache).expand(2, -1) >= 7
    once, again = (step(tensors, key_mask=mask) for _ in range(2))
    wanted = step(tensors, key_mask=mask, backend="reference")
    for found, same, want in zip(once, again, wanted, strict=True):
        assert torch.equal(found, same)
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        last = stick_breaking_attention(q[:, :, -1:], k, v, key_mask=mask)
    torch.testing.assert_close(last, once[0][:, :, -1:])
