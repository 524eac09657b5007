"""Stick-breaking attention in the hands of PyTorch: memory, compile, checkpoints, transforms."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moduli.errors import UnsupportedError
from moduli.models.stick_breaking import stick_breaking_attention


def leaves(T: int = 20, S: int | None = None, width: int = 4) -> list[Tensor]:
    shapes = ((1, 2, T, width), (1, 1, S or T, width), (1, 1, S or T, width))
    return [torch.randn(*shape).requires_grad_() for shape in shapes]


def step(call: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    out, rest = call(*tensors)
    return [out, rest, *torch.autograd.grad(out.sin().sum() + rest.square().sum(), tensors)]


def attention(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return stick_breaking_attention(query, key, value, return_remainder=True)


def saved(out: Tensor) -> int:
    """Numbers that wait for backward."""
    return sum(t.numel() for t in out.grad_fn.saved_tensors if t is not None)  # type: ignore[union-attr]


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4)
        return found


def test_no_tensor_of_all_weights() -> None:
    """What is kept for backward grows with T as well, and no faster."""
    T = 1024
    q, k, v = leaves(T)
    with Largest() as seen:
        out = stick_breaking_attention(q, k, v)
        kept = saved(out)
        out.sum().backward()
    assert 0 < seen.numel <= T * T // 8
    assert kept <= 64 * q.shape[1] * T + 8 * q.numel()


def test_what_is_kept_stays_linear() -> None:
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(1, 1, 1 << 17, 8, requires_grad=True)
        out = stick_breaking_attention(q, q, q)
        assert saved(out) <= (64 + 4 * 8) << 17


def test_the_operator_keeps_its_promises() -> None:
    q, k, v = leaves(6, 9)
    mask = torch.rand(1, 9) > 0.3
    args = (q, k, v, mask, None, 0.5, True, 0.0, "blocked", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(
            torch.ops.moduli.stick_breaking.default,
            args,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.slow
def test_compiled_in_one_graph(without_shape_checks: None) -> None:
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for T, S in ((20, 20), (3, 20)):
        tensors = leaves(T, S)
        for found, want in zip(step(compiled, tensors), step(attention, tensors), strict=True):
            torch.testing.assert_close(found, want)


def test_checkpointing_changes_nothing() -> None:
    tensors = leaves()

    def again(*given: Tensor) -> Any:
        return checkpoint(attention, *given, use_reentrant=False)

    for found, want in zip(step(again, tensors), step(attention, tensors), strict=True):
        assert torch.equal(found, want)


def test_what_needs_no_gradient_gets_none() -> None:
    q, k, v = leaves()
    out = stick_breaking_attention(q.detach(), k, v.detach())
    out.sum().backward()
    assert q.grad is None
    assert k.grad is not None
    assert not stick_breaking_attention(q.detach(), k.detach(), v.detach()).requires_grad


def test_the_gradient_of_a_gradient_is_refused_and_the_reference_has_it() -> None:
    q, k, v = leaves(5)
    for backend in ("blocked", "reference"):
        out = stick_breaking_attention(q, k, v, backend=backend)
        (first,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
        if backend == "reference":
            assert torch.autograd.grad(first.sum(), q)[0].isfinite().all()
        else:
            with pytest.raises(UnsupportedError, match="backend='reference'"):
                first.sum().backward()


def test_transforms_are_refused() -> None:
    q, k, v = (t.detach() for t in leaves(5))

    def loss(query: Tensor) -> Tensor:
        out: Tensor = stick_breaking_attention(query, k, v)  # type: ignore[assignment]
        return out.sum()

    with pytest.raises(UnsupportedError, match="transforms"):
        torch.func.grad(loss)(q)
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(loss, (q,), (q,))
    with pytest.raises(UnsupportedError, match="vmapped"):
        torch.func.vmap(loss)(q[None].repeat(2, 1, 1, 1, 1))
