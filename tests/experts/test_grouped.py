"""Grouped products: against the reference, without a look at the routing, the same bits twice."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moduli.errors import ConfigError
from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import KERNELS, Between, run_experts
from moduli.experts.kernels.order import order
from moduli.routing import Routing

ROOT = Path(__file__).resolve().parents[2]
T, D, E, e, K = 19, 16, 6, 8, 2
# Of |y|: what rounding may change.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
PARAMETERS = ("first", "first_bias", "up", "up_bias", "second", "out_bias")


def experts_of(
    form: str, dtype: torch.dtype = torch.float32, *, bias: bool = True, device: str = "cpu"
) -> StackedFFN:
    """Experts of a form; the second matrix is a view of a dense layer's, as in a split FFN."""

    def leaf(*shape: int) -> Tensor:
        numbers = torch.randn(*shape) / shape[-1] ** 0.5
        return numbers.to(device, dtype).requires_grad_()

    fused = form if form in ("concatenated", "interleaved") else None
    rows = 2 * e if fused else e
    gated_apart = form == "apart"
    return StackedFFN(
        first=leaf(E, rows, D),
        second=leaf(D, E * e).T.unflatten(0, (E, e)),
        sizes=(e,) * E,
        first_bias=leaf(E, rows) if bias else None,
        up=leaf(E, e, D) if gated_apart else None,
        up_bias=leaf(E, e) if gated_apart and bias else None,
        out_bias=leaf(E, D) if bias else None,
        fused=fused,
    )


def routing_of(
    kind: str, dtype: torch.dtype = torch.float32, tokens: int = T, device: str = "cpu"
) -> Routing:
    """A routing with some property."""
    chosen = torch.rand(tokens, E).topk(K).indices
    active = None
    if kind == "empty experts":
        chosen = chosen % 2 + torch.tensor([0, 4])
    elif kind == "one expert":
        chosen = torch.full((tokens, K), E - 1)
    elif kind == "some inactive":
        active = torch.rand(tokens, K) > 0.4
    elif kind == "none active":
        active = torch.zeros(tokens, K, dtype=torch.bool)
    weights = torch.rand(tokens, K).to(device, dtype).requires_grad_()
    return Routing(chosen.to(device), weights, None if active is None else active.to(device))


def leaves_of(x: Tensor, routing: Routing, experts: StackedFFN) -> list[Tensor]:
    found = (getattr(experts, name) for name in PARAMETERS)
    return [x, routing.weights, *(t for t in found if t is not None)]


def step(
    x: Tensor, routing: Routing, experts: StackedFFN, kernel: str, **options: Any
) -> list[Tensor]:
    """The output and the gradients of everything."""
    y = run_experts(x, routing, experts, F.silu, kernel, **options)
    push = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves_of(x, routing, experts), push)]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        gap = float((a - b).detach().double().norm())
        assert gap <= tolerance * float(b.detach().double().norm())


ROUTINGS = ("usual", "empty experts", "one expert", "some inactive", "none active")
FORMS = ("plain", "apart", "concatenated", "interleaved")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ROUTINGS)
def test_agrees_with_the_reference(kind: str, form: str, dtype: torch.dtype) -> None:
    for bias in (True, False):
        experts = experts_of(form, dtype, bias=bias)
        routing = routing_of(kind, dtype)
        x = torch.randn(T, D).to(dtype).requires_grad_()
        expected = step(x.float(), *_in_float(routing, experts), "eager")
        found = step(x, routing, experts, "grouped")
        assert all(t.dtype == dtype for t in found)
        same([t.float() for t in found], expected, TOLERANCE[dtype])


def _in_float(routing: Routing, experts: StackedFFN) -> tuple[Routing, StackedFFN]:
    """The same numbers in float32, which the reference then rounds nowhere else."""
    tensors = {name: getattr(experts, name) for name in PARAMETERS}
    return (
        replace(routing, weights=routing.weights.float()),
        replace(experts, **{n: None if t is None else t.float() for n, t in tensors.items()}),
    )


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_a_gating_rule_and_a_norm_behind_the_experts(form: str, kind: str) -> None:
    experts, routing = experts_of(form), routing_of(kind)
    x = torch.randn(T, D, requires_grad=True)
    norm = nn.LayerNorm(D)
    rule = None if form == "plain" else lambda z: z[:, ::2] * z[:, 1::2].tanh()
    for gating, after in ((rule, None), (None, norm), (rule, norm)):
        found, expected = (
            step(x, routing, experts, kernel, gating=gating, after=after)
            for kernel in ("grouped", "eager")
        )
        same(found, expected, 2e-5)  # the norm divides by small numbers


def test_a_token_and_none() -> None:
    experts = experts_of("apart")
    for tokens in (1, 0):
        x = torch.randn(tokens, D, requires_grad=True)
        routing = routing_of("usual", tokens=tokens)
        found, expected = (step(x, routing, experts, kernel) for kernel in ("grouped", "eager"))
        same(found, expected, 2e-6)


def test_second_derivatives() -> None:
    experts, routing = experts_of("concatenated"), routing_of("some inactive")
    x = torch.randn(T, D, requires_grad=True)
    found = []
    for kernel in ("grouped", "eager"):
        y = run_experts(x, routing, experts, F.silu, kernel)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), leaves_of(x, routing, experts)[:3]))
    same(list(found[0]), list(found[1]), 1e-5)


def test_what_it_refuses() -> None:
    x, routing = torch.randn(T, D), routing_of("usual")
    whole = experts_of("plain", bias=False)
    packed = replace(
        whole,
        first=whole.first.flatten(0, 1),
        second=whole.second.flatten(0, 1),
        sizes=(e - 4, e + 4, *whole.sizes[2:]),
    )
    odd = replace(whole, first=whole.first[:, :6], second=whole.second[:, :6], sizes=(6,) * E)
    far = replace(whole, first=torch.randn(E, e, 2 * D)[..., ::2])
    cases: list[tuple[Tensor, StackedFFN, str]] = [
        (x, packed, "differ in size"),
        (x, odd, "neurons per expert are 6"),
        (x, far, "unit stride"),
        (x.double(), experts_of("plain", torch.float64), "these are torch.float64"),
        (x.half(), whole, "tokens are torch.float16 and first is torch.float32"),
    ]
    for tokens, experts, reason in cases:
        with pytest.raises(ConfigError, match=reason):
            run_experts(tokens, routing, experts, F.gelu, "grouped")


def test_the_order_has_the_rows_of_every_expert_together() -> None:
    routing = routing_of("some inactive")
    todo = order(routing, E)
    assert routing.active is not None
    assert todo.active is not None
    ids = routing.experts.flatten()[todo.slots]
    starts = [0, *todo.ends.tolist()]
    for i in range(E):
        mine = slice(starts[i], starts[i + 1])
        assert ids[mine].eq(i).all()
        assert todo.active[mine].all()
        assert todo.tokens[mine].diff().ge(0).all()
    assert starts[-1] == int(routing.active.sum()) == int(todo.active.sum())
    assert torch.equal(todo.slots[todo.place.flatten()], torch.arange(T * K))


# Nobody looks at the routing: what was traced, compiled or captured for one computes any other.


def operands(dtype: torch.dtype, kind: str, device: str = "cpu") -> list[Tensor]:
    """x, index, weights, active, and the tensors of gated experts with biases."""
    experts = experts_of("concatenated", dtype, device=device)
    routing = routing_of(kind, dtype, device=device)
    active = routing.active
    if active is None:
        active = torch.ones(T, K, dtype=torch.bool, device=device)
    tensors = [t for f in fields(experts) if isinstance(t := getattr(experts, f.name), Tensor)]
    x = torch.randn(T, D).to(device, dtype)
    return [t.detach() for t in (x, routing.experts, routing.weights, active, *tensors)]


def layer(*tensors: Tensor) -> list[Tensor]:
    """Output and gradients as a function of tensors alone."""
    x, index, weights, active, first, second, first_bias, out_bias = tensors
    leaves = [t.detach().requires_grad_() for t in (x, weights, first, second)]
    experts = StackedFFN(
        leaves[2], leaves[3], (e,) * E, first_bias, out_bias=out_bias, fused="concatenated"
    )
    routing = Routing(index, leaves[1], active)
    y = run_experts(leaves[0], routing, experts, F.silu, "grouped")
    return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def test_a_trace_of_one_routing_computes_any_other(without_shape_checks: None) -> None:
    del without_shape_checks
    traced = make_fx(layer, tracing_mode="fake")(*operands(torch.bfloat16, "usual"))
    for kind in ROUTINGS:
        tensors = operands(torch.bfloat16, kind)
        for a, b in zip(traced(*tensors), layer(*tensors), strict=True):
            assert torch.equal(a, b)


def test_fake_tensors(without_shape_checks: None) -> None:
    del without_shape_checks
    real = operands(torch.bfloat16, "some inactive")
    with FakeTensorMode() as mode:
        fake = layer(*(mode.from_tensor(t) for t in real))
    for a, b in zip(fake, layer(*real), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph_in_bfloat16(backend: str) -> None:
    command = [sys.executable, "-m", "tests.experts.grouped_worker", backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def fast_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ROUTINGS)
def test_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    experts = experts_of("apart", dtype, device="cuda")
    routing = routing_of(kind, dtype, device="cuda")
    x = torch.randn(T, D).to("cuda", dtype).requires_grad_()
    expected = step(x.float(), *_in_float(routing, experts), "eager")
    found = step(x, routing, experts, "grouped")
    same([t.float() for t in found], expected, TOLERANCE[dtype])
    again = step(x, routing, experts, "grouped")
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.gpu
def test_nobody_waits_for_a_gpu() -> None:
    if not fast_gpu():
        pytest.skip("torch's own grouped product waits on this device")
    tensors = operands(torch.bfloat16, "some inactive", "cuda")
    layer(*tensors)  # what is built or loaded at the first call may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_cuda_graph_of_one_routing_computes_any_other() -> None:
    if not fast_gpu():
        pytest.skip("torch's own grouped product waits on this device")
    held = operands(torch.bfloat16, "some inactive", "cuda")
    layer(*held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(*held)
    for kind in ROUTINGS:
        for place, new in zip(held, operands(torch.bfloat16, kind, "cuda"), strict=True):
            place.copy_(new)
        graph.replay()
        for a, b in zip(captured, layer(*held), strict=True):
            assert torch.equal(a, b)


def test_what_it_takes_on_cpu() -> None:
    experts = experts_of("plain")
    assert KERNELS["grouped"].refuses(torch.randn(1, D), experts, Between(F.gelu)) is None
