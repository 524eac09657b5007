"""Kernels against the reference, and the reference against the definition."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from moduli.errors import ConfigError, UnknownNameError
from moduli.experts import ExpertFFN, gather_experts, members_of, run_experts, scatter_experts
from moduli.experts.ffn import merged_out_bias, stack
from moduli.experts.kernels import KERNELS, Between
from moduli.routing import Routing

T, D, E, K = 23, 8, 5, 2
EVEN, RAGGED = (4, 4, 4, 4, 4), (1, 7, 3, 4, 5)
OTHERS = [name for name in KERNELS if name != "eager"]
# Of |y|: what rounding may change. bfloat16 adds K rounded terms where the reference adds E.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def problem(
    sizes: tuple[int, ...] = RAGGED,
    dtype: torch.dtype = torch.float64,
    *,
    gated: bool = False,
    bias: bool = True,
    out_bias: bool = False,
    dropped: float = 0.0,
    tokens: int = T,
) -> tuple[torch.Tensor, Routing, ExpertFFN, list[torch.Tensor]]:
    """Tokens, a routing, experts, and everything that should get a gradient."""
    torch.manual_seed(1)
    width = sum(sizes)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

    keys, values, x = leaf(width, D), leaf(width, D), leaf(tokens, D)
    leaves = [x, keys, values]
    cut = {"keys": keys.split(sizes), "values": values.split(sizes)}
    if bias:
        leaves.append(leaf(width))
        cut["key_bias"] = leaves[-1].split(sizes)
    if gated:
        leaves += [leaf(width, D), leaf(width)]
        cut["up_keys"], cut["up_bias"] = leaves[-2].split(sizes), leaves[-1].split(sizes)
    if out_bias:
        leaves.append(leaf(E, D))
    experts = ExpertFFN(
        **{name: list(parts) for name, parts in cut.items()},
        out_bias=leaves[-1] if out_bias else None,
    )
    scores = torch.randn(tokens, E)
    weights = torch.rand(tokens, K, dtype=torch.float64).to(dtype).requires_grad_()
    leaves.append(weights)
    active = torch.rand(tokens, K) >= dropped if dropped else None
    return x, Routing(scores.topk(K).indices, weights, active), experts, leaves


def by_definition(
    x: torch.Tensor, routing: Routing, experts: ExpertFFN, activation: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Token by token, slot by slot."""
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for slot in range(routing.experts.shape[1]):
            if routing.active is not None and not routing.active[t, slot]:
                continue
            i = int(routing.experts[t, slot])
            z = experts.keys[i] @ x[t]
            hidden = activation(z if experts.key_bias is None else z + experts.key_bias[i])
            if experts.up_keys is not None and experts.up_bias is not None:
                hidden = hidden * (experts.up_keys[i] @ x[t] + experts.up_bias[i])
            own = hidden @ experts.values[i]
            own = own if experts.out_bias is None else own + experts.out_bias[i]
            y = y + routing.weights[t, slot] * own
        rows.append(y)
    return torch.stack(rows)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    found, expected = found.detach(), expected.detach()
    gap = float((found - expected).double().norm())
    assert gap <= tolerance * float(expected.double().norm()) + 1e-300


def refused(kernel: str, experts: ExpertFFN, activation: Callable[..., torch.Tensor]) -> bool:
    """Whether a kernel does not take these experts; if so, it must say so."""
    x = torch.empty(1, D, dtype=experts.keys[0].dtype)
    if KERNELS[kernel].refuses(x, stack(experts), Between(activation)) is None:
        return False
    x, routing, _, _ = problem(EVEN, x.dtype)
    with pytest.raises(ConfigError, match="cannot compute"):
        run_experts(x, routing, experts, activation, kernel)
    return True


VARIANTS: dict[str, dict[str, object]] = {
    "even": {"sizes": EVEN},
    "ragged": {},
    "swiglu": {"gated": True},
    "no bias": {"bias": False},
    "expert biases": {"out_bias": True},
    "dropped": {"dropped": 0.4},
    "dropped, expert biases": {"dropped": 0.4, "out_bias": True},
    "one token": {"tokens": 1},  # most experts get none
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compute_the_definition(kernel: str, variant: str) -> None:
    x, routing, experts, leaves = problem(**VARIANTS[variant])  # type: ignore[arg-type]
    activation = F.silu if VARIANTS[variant].get("gated") else F.gelu
    if refused(kernel, experts, activation):
        return
    found = run_experts(x, routing, experts, activation, kernel)
    expected = by_definition(x, routing, experts, activation)
    close(found, expected, 1e-13)
    push = torch.randn_like(expected)
    grads = torch.autograd.grad((push * found).sum(), leaves)
    wanted = torch.autograd.grad((push * expected).sum(), leaves)
    for gradient, want in zip(grads, wanted, strict=True):
        close(gradient, want, 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kernel", OTHERS)
def test_kernels_agree_with_the_reference_in_every_dtype(
    kernel: str, variant: str, dtype: torch.dtype
) -> None:
    x, routing, experts, leaves = problem(dtype=dtype, **VARIANTS[variant])  # type: ignore[arg-type]
    if refused(kernel, experts, F.gelu):
        return
    found, expected = (run_experts(x, routing, experts, F.gelu, k) for k in (kernel, "eager"))
    assert found.dtype == expected.dtype == dtype
    close(found, expected, TOLERANCE[dtype])
    push = torch.randn_like(expected)
    grads = torch.autograd.grad((push * found).sum(), leaves)
    wanted = torch.autograd.grad((push * expected).sum(), leaves)
    for gradient, want in zip(grads, wanted, strict=True):
        close(gradient, want, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_by_finite_differences(kernel: str) -> None:
    x, routing, experts, leaves = problem(EVEN, gated=True, out_bias=True, dropped=0.3, tokens=4)
    if refused(kernel, experts, F.silu):
        return
    torch.autograd.gradcheck(
        lambda *_: run_experts(x, routing, experts, F.silu, kernel), leaves, fast_mode=True
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropped_slots_contribute_nothing(kernel: str) -> None:
    x, routing, experts, _ = problem(EVEN, torch.float32, out_bias=True)
    if refused(kernel, experts, F.gelu):
        return
    nobody = Routing(routing.experts, routing.weights, torch.zeros(T, K, dtype=torch.bool))
    y = run_experts(x, nobody, experts, F.gelu, kernel)
    assert not y.any()
    y.sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("sizes", [EVEN, RAGGED])
def test_all_experts_together_are_the_dense_ffn(sizes: tuple[int, ...]) -> None:
    x, _, experts, _ = problem(sizes)
    everyone = torch.arange(E).expand(T, E)
    routing = Routing(everyone, torch.ones(T, E, dtype=torch.float64))
    keys, bias, values = (
        torch.cat(list(part)) for part in (experts.keys, experts.key_bias, experts.values)
    )
    dense = F.gelu(F.linear(x, keys, bias)) @ values
    for kernel in KERNELS:
        if not refused(kernel, experts, F.gelu):
            close(run_experts(x, routing, experts, F.gelu, kernel), dense, 1e-12)


def test_unknown_kernels_name_the_nearest() -> None:
    x, routing, experts, _ = problem()
    with pytest.raises(UnknownNameError, match="eager"):
        run_experts(x, routing, experts, F.gelu, "eagre")


def test_gathering_and_scattering_are_inverse() -> None:
    keys, bias, values = torch.randn(20, D), torch.randn(20), torch.randn(20, D)
    labels = torch.randint(0, E, (20,))
    members = members_of(labels, E)
    assert all(torch.equal(labels[m], torch.full_like(m, i)) for i, m in enumerate(members))
    assert all(bool((m.diff() > 0).all()) for m in members)  # ascending
    experts = gather_experts(keys, values, members, key_bias=bias)
    found = scatter_experts(experts, members)
    for tensor, original in zip(found, (keys, bias, values), strict=True):
        assert torch.equal(tensor, original)


def test_repeated_members_take_the_next_clusters_too() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert [m.tolist() for m in members_of(labels, 3, repeat=2)] == [
        [0, 1, 3, 4],
        [1, 2, 4, 5],
        [0, 2, 3, 5],
    ]
    assert all(len(m) == 6 for m in members_of(labels, 3, repeat=3))


def test_the_merged_bias_is_what_uniform_routing_gives() -> None:
    bias = torch.randn(D)
    torch.testing.assert_close(merged_out_bias((bias / K).expand(E, D), K), bias)
