"""Every kernel computes what `eager` computes in float64, for layers of any shape, memory layout
and routing, forward and backward."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moduli.errors import ConfigError
from moduli.experts import run_experts
from moduli.experts.kernels import KERNELS, Between
from moduli.routing import Routing
from tests.experts.random_layers import (
    FORMS,
    LAYOUTS,
    Case,
    Layer,
    assert_close,
    assert_computes,
    build,
    cases,
    gradients,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
OWN_BACKWARD = ("loop", "native", "padded")
few = settings(
    max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
many = settings(few, max_examples=200)


def refusal(layer: Layer, kernel: str) -> str | None:
    return KERNELS[kernel].refuses(layer.x(), layer.experts(), Between(layer.case.activation))


def check(case: Case, kernel: str, dtype: torch.dtype) -> None:
    layer = build(case, dtype)
    if refusal(layer, kernel) is not None:  # some want rows of a multiple of 16 bytes
        sizes = tuple(-(-e // 8) * 8 for e in case.sizes)
        layer = build(replace(case, width=-(-case.width // 8) * 8, sizes=sizes), dtype)
    assume(refusal(layer, kernel) is None)
    assert_computes(layer, kernel)


def built(case: Case, kernel: str, dtype: torch.dtype = torch.float32) -> Layer:
    """The layer, for a kernel that takes it; skips the test otherwise."""
    layer = build(case, dtype)
    reason = refusal(layer, kernel)
    if reason is not None:
        pytest.skip(reason)
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@few
@given(case=cases(most_tokens=60, most_experts=12, even=True))
def test_small_layers(kernel: str, dtype: torch.dtype, case: Case) -> None:
    built(Case(), kernel, dtype)
    check(case, kernel, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@many
@given(case=cases())
def test_any_layer(kernel: str, dtype: torch.dtype, case: Case) -> None:
    built(Case(), kernel, dtype)
    check(case, kernel, dtype)


# Sizes around multiples of vector widths, tiles of registers and blocks of rows.
EDGES = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 66, 96, 97, 100)


@pytest.mark.parametrize("kernel", ["native", pytest.param("loop", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(few, max_examples=60)
@given(
    width=st.sampled_from(EDGES),
    size=st.sampled_from(EDGES),
    tokens=st.sampled_from((1, 2, 3, 5, 13, 29, 191, 192, 193, 200)),
    form=st.sampled_from(FORMS),
    layout=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
)
def test_sizes_next_to_those_of_vectors_and_blocks(
    kernel: str, dtype: torch.dtype, width: int, size: int, tokens: int, form: str, layout: str,
    bias: bool,
) -> None:  # fmt: skip
    built(Case(), kernel, dtype)
    case = Case(
        tokens=tokens, width=width, sizes=(size,) * 2, top_k=1, form=form, layout=layout,
        first_bias=bias, up_bias=bias and form == "apart", out_bias=bias,
    )  # fmt: skip
    check(case, kernel, dtype)


@pytest.mark.parametrize("kernel", OWN_BACKWARD)
@pytest.mark.parametrize(
    "case",
    [
        Case(sizes=(1100,) * 2, first_bias=True, tokens=3),
        Case(sizes=(1100,) * 2, form="concatenated", first_bias=True, tokens=3),
        Case(sizes=(5,) * 2, width=4500, out_bias=True, tokens=3),
        pytest.param(Case(sizes=(3,) * 2, width=17000, tokens=9), marks=pytest.mark.slow),
        pytest.param(
            Case(sizes=(17000,) * 2, width=6, tokens=9, first_bias=True), marks=pytest.mark.slow
        ),
    ],
    ids=lambda case: f"D={case.width}, e={case.sizes[0]}, {case.form}",
)
def test_wide_layers_and_large_experts(kernel: str, case: Case) -> None:
    assert_computes(built(case, kernel), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(kernel: str, form: str) -> None:
    layer = built(Case(tokens=0, form=form, first_bias=True, out_bias=True), kernel)
    y, grads = gradients(layer, kernel)
    assert y.shape == (0, layer.case.width)
    assert not any(g.any() for g in grads.values())
    with torch.no_grad():
        assert layer.run(kernel).shape == y.shape


@pytest.mark.parametrize("kernel", KERNELS)
def test_experts_without_neurons_give_their_output_bias(kernel: str) -> None:
    layer = built(
        Case(sizes=(0, 3, 0, 5), routing="everyone", out_bias=True, first_bias=True), kernel
    )
    assert_computes(layer, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_an_expert_in_several_slots_of_a_token_counts_several_times(
    kernel: str, tokens: int
) -> None:
    layer = built(Case(tokens=tokens, width=32, out_bias=True), kernel)
    index = torch.randint(3, (tokens, 1))
    weights = torch.rand(tokens, 2)
    twice = Routing(index.expand(-1, 2), weights)
    once = Routing(index, weights.sum(1, keepdim=True))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found, expected = (
                run_experts(layer.x(), r, layer.experts(), F.gelu, kernel) for r in (twice, once)
            )
        assert_close(found, expected, 1e-6, "y", 0.0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", [F.gelu, F.silu, F.relu])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_token_spoils_its_own_output_only(
    kernel: str, activation: object, bad: float, tokens: int, dtype: torch.dtype
) -> None:
    case = Case(tokens=tokens, width=40, sizes=(24,) * 3, form="apart", activation=activation)  # type: ignore[arg-type]
    layer = built(case, kernel, dtype)
    x = layer.leaves["x"]

    def results() -> tuple[Tensor, Tensor, Tensor]:
        """The output without and with a graph, and the gradient of the tokens."""
        with torch.no_grad():
            bare = layer.run(kernel)
        y = layer.run(kernel)
        return bare, y.detach(), torch.autograd.grad(y, x, layer.push())[0]

    before = results()
    with torch.no_grad():
        x[2, 1] = bad
    after = results()
    rest = torch.arange(tokens) != 2
    for found, good in zip(after, before, strict=True):
        assert not found[2].isfinite().any()
        torch.testing.assert_close(found[rest], good[rest])


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_stays_behind_in_buffers(kernel: str) -> None:
    """A call with infinities and NaN everywhere, then an ordinary one, smaller and larger."""
    spoilt = built(Case(tokens=40, first_bias=True, out_bias=True), kernel)
    with torch.no_grad():
        for leaf in spoilt.leaves.values():
            leaf.fill_(float("nan"))
    gradients(spoilt, kernel)
    for tokens in (9, 80):
        layer = build(Case(tokens=tokens, active=0.5, first_bias=True, out_bias=True))
        assert_computes(layer, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_that_are_not_active_are_not_looked_at(kernel: str, dtype: torch.dtype) -> None:
    """An expert of infinities behind a slot that is dropped changes nothing."""
    layer = built(Case(tokens=30, active=0.5, routing="one expert"), kernel, dtype)
    if kernel in ("eager", "masked"):
        pytest.skip("computes every expert on every token")
    used = int(layer.index[0, 0])
    other = (used + 1) % 3
    index = torch.where(layer.mask, used, other)
    layer = replace(layer, index=index)
    expected = gradients(layer, kernel)[1]
    with torch.no_grad():
        layer.experts().first[other] = float("inf")
    y, grads = gradients(layer, kernel)
    assert y.isfinite().all()
    for name in ("x", "weights", "second"):
        torch.testing.assert_close(grads[name], expected[name])


GRADIENT_CASE = Case(
    tokens=21, width=24, sizes=(8,) * 4, form="apart", first_bias=True, up_bias=True, out_bias=True,
    active=0.7,
)  # fmt: skip
NAMES = ("x", "weights", "first", "first_bias", "up", "up_bias", "second", "out_bias")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone_and_each_one_missing(kernel: str, name: str, alone: bool) -> None:
    layer = built(GRADIENT_CASE, kernel)
    _, expected = gradients(layer, "eager")
    for own, leaf in layer.leaves.items():
        leaf.requires_grad_((own == name) is alone)
    layer.run(kernel).backward(layer.push())
    for own, leaf in layer.leaves.items():
        if (own == name) is alone:
            assert leaf.grad is not None
            assert_close(leaf.grad, expected[own], 1e-5, own, 0.1)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_wants_a_gradient(kernel: str) -> None:
    layer = built(GRADIENT_CASE, kernel)
    for leaf in layer.leaves.values():
        leaf.requires_grad_(False)
    y = layer.run(kernel)
    assert not y.requires_grad


@pytest.mark.parametrize("kernel", OWN_BACKWARD)
@pytest.mark.parametrize("layout", ["linear", "conv1d", "owned"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_arrive_in_the_parameters_without_a_copy(
    kernel: str, layout: str, form: str
) -> None:
    """What autograd hands to the parameter has its strides, and owns no more than it shows."""
    layer = built(Case(form=form, layout=layout, width=12, tokens=30), kernel)
    layer.run(kernel).backward(layer.push())
    for name in {"first", "up", "second"} & set(layer.leaves):
        leaf = layer.leaves[name]
        assert leaf.grad is not None
        assert leaf.grad.stride() == leaf.stride(), name
        assert leaf.grad.untyped_storage().nbytes() == leaf.grad.nbytes, name


@pytest.mark.parametrize("kernel", OWN_BACKWARD)
def test_gradients_accumulate(kernel: str) -> None:
    layer = built(GRADIENT_CASE, kernel)
    _, once = gradients(layer, kernel)
    for _ in range(2):
        layer.run(kernel).backward(layer.push())
    for name, leaf in layer.leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, 2 * once[name])


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_of_another_type_are_refused(kernel: str) -> None:
    """No kernel reads memory as a type that it does not have."""
    layer = build(GRADIENT_CASE)
    for name in ("first", "second", "up"):
        leaves = dict(layer.leaves)
        leaves[name] = leaves[name].detach().bfloat16()
        other = replace(layer, leaves=leaves)
        with pytest.raises((ConfigError, RuntimeError)):
            other.run(kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_combine_weights_of_another_type(kernel: str) -> None:
    """Routers keep float32 where the layer computes in bfloat16."""
    layer = built(Case(tokens=30, width=32), kernel, torch.bfloat16)
    weights = torch.rand(30, 2).requires_grad_()
    mixed = replace(layer, leaves=layer.leaves | {"weights": weights})
    y, grads = gradients(mixed, kernel)
    expected, wanted = gradients(mixed.to(torch.float64), "eager")
    assert y.dtype == torch.bfloat16
    assert grads["weights"].dtype == torch.float32
    assert_close(y, expected, 2e-2, "y", 0.0)
    for name in grads:
        assert_close(grads[name], wanted[name], 3e-2, name, 0.0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kernel: str, dtype: torch.dtype) -> None:
    """As linear layers do: computed in autocast's type, gradients in the parameters' own."""
    layer = build(Case(tokens=30, width=32, first_bias=True, out_bias=True))
    with torch.autocast("cpu", dtype):
        try:
            y = layer.run(kernel)
        except ConfigError as error:
            pytest.skip(str(error))
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, list(layer.leaves.values()), layer.push().to(dtype))
    exact, wanted = gradients(layer.to(torch.float64), "eager")
    assert_close(y, exact, 3e-2, "y", 0.0)
    for (name, leaf), gradient in zip(layer.leaves.items(), grads, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_close(gradient, wanted[name], 4e-2, name, 0.0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_training_goes_on_after_inference_mode(kernel: str) -> None:
    layer = built(GRADIENT_CASE, kernel)
    with torch.inference_mode():
        first = layer.run(kernel)
    assert first.is_inference()
    y, grads = gradients(layer, kernel)
    expected, wanted = gradients(layer, "eager")
    torch.testing.assert_close(first.clone(), expected.detach())
    for name in grads:
        assert_close(grads[name], wanted[name], 1e-5, name, 0.1)
    with torch.inference_mode():
        torch.testing.assert_close(layer.run(kernel).clone(), y.detach())


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_bits_every_time(kernel: str) -> None:
    layer = built(replace(GRADIENT_CASE, tokens=200), kernel)
    y, grads = gradients(layer, kernel)
    for _ in range(3):
        again, other = gradients(layer, kernel)
        assert torch.equal(y, again)
        assert all(torch.equal(grads[n], other[n]) for n in grads)


@pytest.mark.parametrize("kernel", KERNELS)
def test_copies_compute_the_same(kernel: str) -> None:
    layer = built(GRADIENT_CASE, kernel)
    experts: dict[str, Tensor] = copy.deepcopy(layer.leaves)
    other = replace(layer, leaves=experts)
    y, grads = gradients(layer, kernel)
    again, copied = gradients(other, kernel)
    assert torch.equal(y, again)
    assert all(torch.equal(grads[n], copied[n]) for n in grads)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("wrong", [3, -1, 2**40])
def test_an_expert_that_is_not_there_is_an_error(tokens: int, wrong: int) -> None:
    """Memory that is not the layer's is neither read nor written."""
    layer = built(Case(tokens=tokens), "native")
    index = layer.index.clone()
    index[-1, 0] = wrong
    other = replace(layer, index=index)
    with pytest.raises(ConfigError, match="not there"):
        other.run("native")
    with torch.no_grad(), pytest.raises(ConfigError, match="not there"):
        other.run("native")
    mask = torch.ones_like(index, dtype=torch.bool)
    mask[-1, 0] = False
    assert replace(other, mask=mask).run("native").isfinite().all()


def test_indices_of_another_integer_type() -> None:
    layer = built(Case(tokens=40), "native")
    narrow = replace(layer, index=layer.index.int())
    assert torch.equal(narrow.run("native"), layer.run("native"))


def test_weights_without_memory_of_their_own_are_refused() -> None:
    """Sharded and quantised tensors show a type and a shape, and have no numbers to read."""
    from torch.testing._internal.two_tensor import TwoTensor

    layer = built(Case(), "native")
    for name in ("first", "second"):
        part = layer.leaves[name].detach()
        wrapped = replace(layer, leaves=layer.leaves | {name: TwoTensor(part, part.clone())})
        with pytest.raises(ConfigError, match="TwoTensor"):
            wrapped.run("native")
