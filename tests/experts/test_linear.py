"""One matrix per expert on sorted rows: equal to a product per row, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moduli.errors import UnsupportedError
from moduli.experts.kernels.order import Order, order
from moduli.experts.linear import routed_linear
from moduli.routing import Routing

T, K, E, INNER, OUTER = 9, 2, 5, 6, 4


def case(seed: int = 0, *, inactive: bool = False) -> tuple[Tensor, Tensor, Order, Tensor]:
    """Rows in order, matrices, their order, and the expert of every row (E: none)."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(0, E - 1, (T, K), generator=generator)  # nobody chose the last
    active = torch.rand(T, K, generator=generator) < 0.6 if inactive else None
    routing = Routing(experts, torch.ones(T, K), active)
    todo = order(routing, E)
    rows = torch.randn(T * K, INNER, generator=generator, dtype=torch.float64)
    weight = torch.randn(E, INNER, OUTER, generator=generator, dtype=torch.float64)
    return rows, weight, todo, todo.experts.long()


def expected(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    padded = torch.cat([weight, torch.zeros_like(weight[:1])])
    return torch.einsum("si,sio->so", rows, padded[experts])


@pytest.mark.parametrize("inactive", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_it_is_a_product_per_row(inactive: bool, grad: bool) -> None:
    rows, weight, todo, experts = case(inactive=inactive)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(
            routed_linear(rows, [weight], todo), expected(rows, weight, experts)
        )


@pytest.mark.parametrize("inactive", [False, True])
@pytest.mark.parametrize("cuts", [[], [2], [1, 4]])
def test_gradients_of_rows_and_of_every_part(inactive: bool, cuts: list[int]) -> None:
    rows, weight, todo, experts = case(inactive=inactive)
    parts = [p.clone().requires_grad_() for p in weight.tensor_split(cuts)]
    inputs = (rows.requires_grad_(), *parts)
    assert torch.autograd.gradcheck(lambda x, *ws: routed_linear(x, list(ws), todo), inputs)
    torch.testing.assert_close(
        routed_linear(rows, parts, todo), expected(rows, weight, experts), rtol=0, atol=1e-12
    )


def test_a_frozen_part_gets_no_gradient_and_changes_no_other() -> None:
    rows, weight, todo, _ = case()
    whole = weight.clone().requires_grad_()
    routed_linear(rows, [whole], todo).square().sum().backward()
    old, new = weight[:3].clone(), weight[3:].clone().requires_grad_()
    routed_linear(rows, [old, new], todo).square().sum().backward()
    assert old.grad is None
    assert new.grad is not None
    assert whole.grad is not None
    assert torch.equal(new.grad, whole.grad[3:])
    assert (whole.grad[E - 1] == 0).all()  # an expert without rows


def test_only_parts_learn_when_rows_do_not() -> None:
    rows, weight, todo, _ = case()
    parts = [p.clone().requires_grad_() for p in weight.tensor_split([2])]
    routed_linear(rows, parts, todo).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parts)


def test_the_operator_is_a_proper_one() -> None:
    rows, weight, todo, _ = case(inactive=True)
    inputs = (rows.requires_grad_(), [weight.requires_grad_()], todo.ends)
    torch.library.opcheck(torch.ops.moduli.routed_linear.default, inputs)


def test_autocast_computes_in_its_type_and_returns_gradients_in_theirs() -> None:
    rows, weight, todo, experts = case()
    rows, weight = rows.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = routed_linear(rows, [weight], todo)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected(rows, weight, experts), rtol=0.05, atol=0.05)
    found.float().sum().backward()
    assert rows.grad is not None
    assert weight.grad is not None
    assert {rows.grad.dtype, weight.grad.dtype} == {torch.float32}


class Casts(TorchDispatchMode):
    """Numbers in every tensor that is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_autocast_casts_only_matrices_that_are_used() -> None:
    rows, weight, todo, experts = case()
    rows, weight = rows.float(), weight.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        routed_linear(rows, [weight], todo)
    used = len(experts.unique())
    assert used < E
    assert sum(casts.sizes) == rows.numel() + used * INNER * OUTER


def test_transforms_are_refused() -> None:
    """Forward mode would be zero without a word."""
    rows, weight, todo, _ = case()

    def loss(matrices: Tensor) -> Tensor:
        return routed_linear(rows, [matrices], todo).square().sum()

    with pytest.raises(UnsupportedError, match=r"not by transforms of torch.func.*W\[e\]"):
        torch.func.grad(loss)(weight)
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(loss, (weight,), (weight,))
    for learns in (True, False):
        with torch.set_grad_enabled(learns), pytest.raises(UnsupportedError, match="vmapped"):
            torch.func.vmap(loss)(weight.repeat(2, 1, 1, 1))


def test_second_derivatives_are_refused() -> None:
    rows, weight, todo, _ = case()
    y = routed_linear(rows.requires_grad_(), [weight.requires_grad_()], todo)
    (grad,) = torch.autograd.grad(y.square().sum(), rows, create_graph=True)
    with pytest.raises(UnsupportedError, match="no gradient of its own"):
        grad.sum().backward()


def test_no_rows_at_all() -> None:
    _, weight, _, _ = case()
    todo = order(Routing(torch.empty(0, K, dtype=torch.long), torch.empty(0, K)), E)
    found = routed_linear(torch.empty(0, INNER, dtype=torch.float64), [weight], todo)
    assert found.shape == (0, OUTER)
