"""The operator `moduli::experts` towards the rest of PyTorch: one node with known shapes and one
derivative, and clear words where there is no more."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from moduli.errors import UnsupportedError
from moduli.experts import run_experts
from moduli.experts.bank import ExpertBank
from moduli.experts.ffn import ExpertFFN
from moduli.experts.kernels import build as native_build
from tests.experts.random_layers import (
    FORMS,
    LAYOUTS,
    Case,
    Layer,
    assert_close,
    build,
    gradients,
)

ROOT = Path(__file__).parents[2]
CASE = Case(
    tokens=21, width=18, sizes=(7,) * 4, form="apart", first_bias=True, up_bias=True, out_bias=True,
    active=0.7,
)  # fmt: skip


@pytest.fixture(params=("loop", "native", "padded"))
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and isinstance(native_build.library(), str):
        pytest.skip(str(native_build.library()))
    return str(request.param)


def operands(layer: Layer, kernel: str, save: bool = True) -> tuple[Any, ...]:
    """Arguments of the operator."""
    e, r = layer.experts(), layer.routing()
    return (
        layer.x(), r.experts, r.weights, r.active, e.first, e.first_bias, e.up, e.up_bias, e.second,
        e.out_bias, e.sizes, e.fused, "gelu", kernel, save,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_operator_is_registered_as_pytorch_wants_it(kernel: str, form: str) -> None:
    layer = build(replace(CASE, form=form, up_bias=form == "apart"))
    # Of numbers kept for backward those that belong to no slot differ between calls.
    opcheck(
        torch.ops.moduli.experts.default,
        operands(layer, kernel),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    for leaf in layer.leaves.values():
        leaf.requires_grad_(False)
    opcheck(torch.ops.moduli.experts.default, operands(layer, kernel, save=False))


@pytest.mark.parametrize("x", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_results_are_laid_out_as_real_ones(kernel: str, layout: str, x: str) -> None:
    """A compiler plans memory by what the fake operators promise."""
    layer = build(replace(CASE, layout=layout, x=x))
    args = [a.detach() if isinstance(a, Tensor) else a for a in operands(layer, kernel)]
    y, z = torch.ops.moduli.experts(*args)
    behind = [layer.push(), z, *args[:-1], [True] * 8]
    real = [y, z, *torch.ops.moduli.experts_backward(*behind)]
    with FakeTensorMode() as mode:

        def fake(given: list[Any]) -> list[Any]:
            return [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given]

        promised = [
            *torch.ops.moduli.experts(*fake(args)),
            *torch.ops.moduli.experts_backward(*fake(behind)),
        ]
    assert len(promised) == len(real) == 10
    for found, expected in zip(promised, real, strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert found.stride() == expected.stride()


def test_layers_of_fake_tensors(kernel: str) -> None:
    layer = build(CASE)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaves = {n: mode.from_tensor(t) for n, t in layer.leaves.items()}
        y = replace(layer, leaves=leaves).run(kernel)
        y.sum().backward()
    assert y.shape == (CASE.tokens, CASE.width)
    assert leaves["x"].grad is not None
    assert leaves["x"].grad.shape == layer.leaves["x"].shape


@pytest.mark.parametrize("alternative", ["autograd", "eager"])
def test_second_derivatives_are_refused(kernel: str, alternative: str) -> None:
    layer = build(CASE)
    leaves = list(layer.leaves.values())
    first = torch.autograd.grad(layer.run(kernel).square().sum(), leaves, create_graph=True)
    with pytest.raises(UnsupportedError, match=f"'{alternative}'"):
        torch.autograd.grad(first[0].square().sum(), leaves)
    first = torch.autograd.grad(layer.run(alternative).square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), leaves)
    assert all(g.isfinite().all() for g in second)


def _of_tokens(layer: Layer, kernel: str) -> Any:
    def call(x: Tensor) -> Tensor:
        y: Tensor = run_experts(x, layer.routing(), layer.experts(), F.gelu, kernel)
        return y

    return call


@pytest.mark.parametrize("frozen", [True, False])
def test_vmap_is_refused(kernel: str, frozen: bool, without_shape_checks: None) -> None:
    layer = build(CASE)
    for leaf in layer.leaves.values():
        leaf.requires_grad_(not frozen)
    several = torch.randn(3, CASE.tokens, CASE.width)
    with pytest.raises(UnsupportedError, match="vmap"):
        torch.vmap(_of_tokens(layer, kernel))(several)
    found = torch.vmap(_of_tokens(layer, "eager"))(several)
    torch.testing.assert_close(found[1], layer_output(layer, several[1], kernel))


def layer_output(layer: Layer, x: Tensor, kernel: str) -> Tensor:
    y: Tensor = _of_tokens(layer, kernel)(x)
    return y


@pytest.mark.parametrize("alternative", ["autograd", "eager"])
def test_functional_gradients_are_refused(
    kernel: str, alternative: str, without_shape_checks: None
) -> None:
    layer = build(CASE)
    push = layer.push()
    detached = {n: t.detach() for n, t in layer.leaves.items()}

    def value(leaves: dict[str, Tensor], kernel: str) -> Tensor:
        return (replace(layer, leaves=leaves).run(kernel) * push).sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(UnsupportedError, match=f"'{alternative}'"):
            transform(value)(detached, kernel)
    found = torch.func.grad(value)(detached, alternative)
    for name, gradient in gradients(layer, "eager")[1].items():
        assert_close(found[name], gradient, 1e-5, name, 0.1)


def test_forward_mode_is_refused(kernel: str, without_shape_checks: None) -> None:
    """A derivative that is not there may not silently be zero."""
    layer = build(CASE)
    x = layer.leaves["x"].detach()
    call, ahead = _of_tokens(layer, kernel), torch.ones_like(x)
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(call, (x,), (ahead,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, ahead)
        with pytest.raises(UnsupportedError, match="forward-mode"):
            call(dual)
    y, tangent = torch.func.jvp(_of_tokens(layer, "eager"), (x,), (ahead,))
    torch.testing.assert_close(y, call(x))
    assert tangent.any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kernel: str, reentrant: bool) -> None:
    layer = build(CASE)
    expected = gradients(layer, kernel)

    def call(*leaves: Tensor) -> Tensor:
        return replace(layer, leaves=dict(zip(layer.leaves, leaves, strict=True))).run(kernel)

    leaves = list(layer.leaves.values())
    y = checkpoint(call, *leaves, use_reentrant=reentrant)
    y.backward(layer.push())
    torch.testing.assert_close(y, expected[0])
    for name, leaf in layer.leaves.items():
        torch.testing.assert_close(leaf.grad, expected[1][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_threads_compute_what_one_does(kernel: str, dtype: torch.dtype) -> None:
    """To rounding; and the same bits every time."""
    layer = build(replace(CASE, tokens=300), dtype)
    one = gradients(layer, kernel)
    few = build(replace(CASE, tokens=1, top_k=3), dtype)
    with torch.no_grad():
        one_few = few.run(kernel)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two, again = gradients(layer, kernel), gradients(layer, kernel)
        with torch.no_grad():
            two_few = few.run(kernel)
    finally:
        torch.set_num_threads(before)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.equal(two[0], again[0])
    assert_close(two[0], one[0], tolerance, "y", 0.1)
    assert_close(two_few, one_few, tolerance, "y of one token", 0.1)
    for name, gradient in one[1].items():
        assert torch.equal(two[1][name], again[1][name])
        assert_close(two[1][name], gradient, tolerance, name, 0.1)


def test_an_output_nobody_uses_and_one_used_twice(kernel: str) -> None:
    layer = build(CASE)
    layer.run(kernel)  # its graph is dropped
    y = layer.run(kernel)
    (y + y).backward(layer.push())
    expected = gradients(layer, "eager")[1]
    for name, leaf in layer.leaves.items():
        assert leaf.grad is not None
        assert_close(leaf.grad, 2 * expected[name], 1e-5, name, 0.1)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(layer.push())


def test_weights_changed_before_backward_are_noticed(kernel: str) -> None:
    layer = build(CASE)
    y = layer.run(kernel)
    with torch.no_grad():
        layer.leaves["second"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(layer.push())


def test_a_gradient_that_is_no_plain_tensor(kernel: str) -> None:
    """Expanded (as that of a sum) and transposed gradients of the output."""
    layer = build(CASE)
    leaves = list(layer.leaves.values())
    for push in (torch.ones(()).expand(21, 18), torch.randn(18, 21).T):
        found = torch.autograd.grad(layer.run(kernel), leaves, push)
        expected = torch.autograd.grad(layer.run("eager"), leaves, push)
        for name, a, b in zip(layer.leaves, found, expected, strict=True):
            assert_close(a, b, 1e-5, name, 0.1)


def test_banks_copy_and_learn(kernel: str) -> None:
    """deepcopy of a module between steps, as averaging of weights does."""
    bank = ExpertBank(
        ExpertFFN([*torch.randn(4, 8, 16)], [*torch.randn(4, 8, 16)]), torch.nn.GELU()
    )
    index, weights, x = torch.randint(4, (12, 2)), torch.rand(12, 2), torch.randn(12, 16)
    routing = type(build(CASE).routing())(index, weights)

    def loss(module: ExpertBank) -> Tensor:
        y = run_experts(x, routing, module.stacked(), torch.nn.GELU(), kernel)
        return y.square().mean()

    loss(bank).backward()
    twin = copy.deepcopy(bank)
    before = float(loss(bank).detach())
    torch.optim.SGD(bank.parameters(), lr=1e-2).step()
    assert float(loss(bank).detach()) < before
    assert float(loss(twin).detach()) == before


def _compiled(backend: str, *kernels: str) -> None:
    command = [sys.executable, "-m", "tests.experts.ops_worker", backend, *kernels]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_one_graph_without_a_break(kernel: str) -> None:
    _compiled("aot_eager", kernel)


@pytest.mark.slow
def test_the_default_compiler(kernel: str) -> None:
    _compiled("inductor", kernel)


@pytest.mark.slow
def test_the_kernel_chosen_when_a_graph_runs() -> None:
    _compiled("aot_eager", "auto")
