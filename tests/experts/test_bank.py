"""Banks of owned experts: the contract of transformers, and the same numbers from every backend."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moduli.errors import ConfigError
from moduli.experts.bank import ExpertBank
from moduli.experts.ffn import ExpertFFN
from moduli.experts.kernels import run_experts
from moduli.routing import Routing

E, F, D, T, K = 4, 8, 16, 12, 2
SHAPES = {"plain": (False, False), "gated": (True, False), "plain+b": (False, True)}
BACKENDS = ["batched_mm", "grouped_mm"]


def experts(gated: bool, bias: bool, sizes: tuple[int, ...] = (F,) * E) -> ExpertFFN:
    def rows() -> list[Tensor]:
        return [torch.randn(n, D) for n in sizes]

    return ExpertFFN(
        keys=rows(),
        values=rows(),
        key_bias=[torch.randn(n) for n in sizes] if bias else None,
        up_keys=rows() if gated else None,
        out_bias=torch.randn(len(sizes), D) if bias else None,
    )


def routing() -> Routing:
    index = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    return Routing(index, torch.rand(T, K))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_those_of_the_contract(shape: str) -> None:
    gated, bias = SHAPES[shape]
    bank = ExpertBank(experts(gated, bias), nn.GELU())
    found = {name: tuple(p.shape) for name, p in bank.named_parameters()}
    first = "gate_up_proj" if gated else "up_proj"
    width = 2 * F if gated else F
    expected = {first: (E, width, D), "down_proj": (E, D, F)}
    if bias:
        expected |= {f"{first}_bias": (E, width), "down_proj_bias": (E, D)}
    assert found == expected


@pytest.mark.parametrize("sizes", [(F,) * E, (8, 5, 1, 7)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bank_computes_its_experts(shape: str, sizes: tuple[int, ...]) -> None:
    given = experts(*SHAPES[shape], sizes)
    bank = ExpertBank(given, nn.GELU())
    x, where = torch.randn(T, D), routing()
    expected = run_experts(x, where, given, nn.GELU(), "eager")
    torch.testing.assert_close(
        bank(x, where.experts, where.weights), expected, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("name", ["moduli", "moduli:padded", "moduli:eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_our_own_kernels_by_the_names_they_have_in_transformers(shape: str, name: str) -> None:
    bank = ExpertBank(experts(*SHAPES[shape]), nn.GELU(), dropout=0.1).eval()
    x, where = torch.randn(T, D), routing()
    expected = bank(x, where.experts, where.weights)
    bank.implementation = name
    torch.testing.assert_close(bank(x, where.experts, where.weights), expected)
    bank.implementation = "moduli"
    bank.train()  # unlike those of transformers, ours know dropout
    assert not torch.allclose(bank(x, where.experts, where.weights), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_of_transformers_agree_forward_and_backward(shape: str, backend: str) -> None:
    ours = ExpertBank(experts(*SHAPES[shape]), nn.GELU())
    theirs = copy.deepcopy(ours)
    theirs.implementation = backend
    where = routing()
    results: list[dict[str, Any]] = []
    for bank in (ours, theirs):
        x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = bank(x, where.experts, where.weights)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in bank.named_parameters()}
        results.append({"y": y, "x": x.grad, **grads})
    for name, tensor in results[0].items():
        gap = float((results[1][name] - tensor).detach().norm() / tensor.detach().norm())
        assert gap < 1e-5, f"{name}: {gap}"


def test_a_slot_of_weight_zero_and_one_of_another_rank_add_nothing() -> None:
    bank = ExpertBank(experts(True, False), nn.SiLU())
    x, where = torch.randn(T, D), routing()
    weights = where.weights.clone()
    weights[:, 1] = 0
    alone = bank(x, where.experts[:, :1], weights[:, :1])
    found = bank(x, where.experts, weights)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)  # perhaps by another kernel
    elsewhere = where.experts.clone()
    elsewhere[:, 1] = E  # what expert parallelism gives for experts of other ranks
    assert torch.equal(bank(x, elsewhere, weights), found)


def test_padding_of_small_experts_stays_zero() -> None:
    bank = ExpertBank(experts(False, True, (8, 3, 8, 8)), nn.GELU())
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1)
    x, where = torch.randn(T, D), routing()
    before = bank.up_proj[1, :3].detach().clone()
    for _ in range(3):
        bank(x, where.experts, where.weights).square().sum().backward()
        optimizer.step()
    assert not bank.up_proj[1, 3:].any()
    assert not bank.down_proj[1, :, 3:].any()
    assert not torch.equal(bank.up_proj[1, :3], before)


def test_padding_needs_an_activation_that_keeps_zero() -> None:
    with pytest.raises(ConfigError, match=r"unequal size \(3 to 8 neurons\).*divides"):
        ExpertBank(experts(False, False, (8, 3)), nn.Sigmoid())
    ExpertBank(experts(False, False), nn.Sigmoid())  # equal sizes are not padded
