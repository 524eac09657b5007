"""Activations that kernels know: recognised for what they compute, value and derivative right."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduli.errors import ConfigError
from moduli.experts import run_experts
from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import KERNELS, Between
from moduli.experts.kernels.activations import KNOWN, known
from moduli.routing import Routing


def _tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


# The definitions, in plain differentiable operations.
DEFINITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _tanh,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "relu": F.relu,
    "relu_squared": lambda z: F.relu(z).square(),
}
MODULES: dict[str, nn.Module] = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "relu": nn.ReLU(),
}
OPERATORS = ("loop", "native", "padded")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def points(dtype: torch.dtype) -> Tensor:
    """Dense around 0, and far out on both sides."""
    far = torch.logspace(0.5, 6, 200, dtype=torch.float64)
    near = torch.linspace(-12, 12, 1201, dtype=torch.float64)
    return torch.cat([-far, near, far]).to(dtype)


def exact(name: str, z: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient in float64."""
    z = z.detach().double().requires_grad_()
    h = DEFINITIONS[name](z)
    return h.detach(), torch.autograd.grad(h, z, push.double())[0]


def close(found: Tensor, expected: Tensor, z: Tensor, tolerance: float) -> None:
    """Absolutely for small numbers, relatively for large ones."""
    gap = (found.double() - expected).abs() / expected.abs().clamp(min=1)
    worst = int(gap.argmax())
    assert gap.isfinite().all()
    assert gap[worst] <= tolerance, f"{float(gap[worst])} at z = {float(z[worst])}"


def test_every_activation_of_the_table_has_a_definition_here() -> None:
    assert KNOWN.keys() == DEFINITIONS.keys()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", KNOWN)
def test_value_and_derivative(name: str, dtype: torch.dtype) -> None:
    z, push = points(dtype), torch.randn(len(points(dtype))).to(dtype)
    value, gradient = exact(name, z, push)
    act = KNOWN[name]
    close(act.forward(z, torch.empty_like(z)), value, z, TOLERANCE[dtype])
    close(act.backward(push, z, torch.empty_like(z)), gradient, z, 3 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", KNOWN)
def test_outputs_may_be_the_inputs_and_views(name: str) -> None:
    act = KNOWN[name]
    z, push = torch.randn(6, 10), torch.randn(6, 10)
    value, gradient = act.forward(z, torch.empty_like(z)), torch.empty_like(z)
    act.backward(push, z, gradient)
    own = z.clone()
    assert act.forward(own, own) is own
    torch.testing.assert_close(own, value)
    wide = torch.randn(6, 20)
    wide[:, ::2] = z
    out = torch.zeros(6, 20)
    act.forward(wide[:, ::2], out[:, 1::2])
    torch.testing.assert_close(out[:, 1::2], value)
    act.backward(push, wide[:, ::2], out[:, ::2])
    torch.testing.assert_close(out[:, ::2], gradient)


def elementwise(z: Tensor, gated: bool) -> tuple[Tensor, Routing, StackedFFN]:
    """Two experts of one neuron that show their activations: y[:, 0] = act(x[:, 0]) (* x[:, 1])."""
    x = torch.stack([z, torch.ones_like(z)], dim=1)
    keys = torch.eye(2, dtype=z.dtype)
    first, up, values = (
        row.expand(2, 1, 2).clone() for row in (keys[None, :1], keys[None, 1:], keys[None, :1])
    )
    experts = StackedFFN(first, values, (1, 1), up=up if gated else None)
    routing = Routing(torch.arange(len(z))[:, None] % 2, torch.ones(len(z), 1, dtype=z.dtype))
    return x, routing, experts


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_value_and_derivative_through_kernels(
    kernel: str, name: str, dtype: torch.dtype, gated: bool
) -> None:
    z = points(dtype)
    x, routing, experts = elementwise(z, gated)
    if KERNELS[kernel].refuses(x, experts, Between(MODULES[name])):
        pytest.skip("refused")
    push = torch.randn(len(z)).to(dtype)
    value, gradient = exact(name, z, push)
    tolerance = TOLERANCE[dtype]
    with torch.no_grad():
        close(run_experts(x, routing, experts, MODULES[name], kernel)[:, 0], value, z, tolerance)
        # Few tokens take another way in some kernels.
        for row in (0, 700, len(z) - 1):
            one = slice(row, row + 1)
            few = Routing(routing.experts[one], routing.weights[one])
            y = run_experts(x[one], few, experts, MODULES[name], kernel)
            close(y[:, 0], value[one], z[one], tolerance)
    x.requires_grad_()
    y = run_experts(x, routing, experts, MODULES[name], kernel)
    close(y.detach()[:, 0], value, z, tolerance)
    zero = torch.zeros_like(push)
    found = torch.autograd.grad(y, x, torch.stack([push, zero], dim=1))[0]
    close(found[:, 0], gradient, z, 3 * tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("kernel", OPERATORS)
def test_nan_and_infinity_pass(kernel: str, name: str, bad: float) -> None:
    from transformers.activations import ACT2FN

    names = {"gelu_tanh": "gelu_pytorch_tanh", "relu_squared": "relu2"}
    x, routing, experts = elementwise(torch.tensor([1.0, bad, 2.0]), False)
    activation = ACT2FN[names.get(name, name)]
    experts = StackedFFN(experts.first, experts.second, (1, 1))
    x[1, 1] = 0
    try:
        y = run_experts(x[:, :1], routing, _narrow(experts), activation, kernel)
    except ConfigError as error:
        pytest.skip(str(error))
    assert not y[1, 0].isfinite()
    assert y[[0, 2]].isfinite().all()


def _narrow(experts: StackedFFN) -> StackedFFN:
    return StackedFFN(experts.first[..., :1], experts.second[..., :1], experts.sizes)


def test_activations_of_transformers_are_what_the_table_says() -> None:
    from transformers.activations import ACT2FN

    z = torch.linspace(-8, 8, 1001)
    found = {}
    for name in ACT2FN:
        activation = ACT2FN[name]
        entry = known(activation)
        if entry is not None:
            found[name] = entry.name
            # Published formulas of GELU's tanh form have constants of 10 digits.
            torch.testing.assert_close(entry.forward(z, torch.empty_like(z)), activation(z))
    assert set(found.values()) == set(KNOWN)
    assert {"gelu", "gelu_new", "gelu_fast", "silu", "relu", "quick_gelu", "relu2"} <= found.keys()


class _Odd(nn.GELU):
    def forward(self, z: Tensor) -> Tensor:
        return z + 1


def _patched() -> nn.Module:
    activation = nn.GELU()
    activation.forward = torch.tanh  # type: ignore[method-assign]
    return activation


def _hooked(register: str) -> nn.Module:
    activation = nn.SiLU()
    getattr(activation, register)(lambda *_: None)
    return activation


@pytest.mark.parametrize(
    "activation",
    [
        torch.tanh,
        lambda z: z,
        nn.Tanh(),
        _Odd(),
        _patched(),
        nn.Sequential(nn.ReLU()),
        _hooked("register_forward_hook"),
        _hooked("register_forward_pre_hook"),
        _hooked("register_full_backward_hook"),
        _hooked("register_full_backward_pre_hook"),
    ],
)
def test_what_does_something_else_is_not_known(activation: Callable[[Tensor], Tensor]) -> None:
    assert known(activation) is None
    x, routing, experts = elementwise(torch.randn(4), False)
    expected = run_experts(x, routing, experts, activation, "eager")
    torch.testing.assert_close(run_experts(x, routing, experts, activation), expected)
    for kernel in OPERATORS:
        with pytest.raises(ConfigError, match="does not know the derivative"):
            run_experts(x, routing, experts, activation, kernel)
