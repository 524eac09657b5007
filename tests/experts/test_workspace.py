"""Buffers of kernels: reused, never shared, never seen outside; and what is kept for backward."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moduli.errors import ConfigError
from moduli.experts import run_experts
from moduli.experts.kernels import workspace
from moduli.experts.kernels.workspace import held, release, take
from tests.experts.random_layers import Case, Layer, build, gradients

KERNELS = ("loop", "native", "padded")


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    release()
    yield
    release()


def test_buffers_grow_and_are_reused() -> None:
    like = torch.empty(0)
    first = take("a", 10, like=like)
    assert held() == 40
    assert take("a", 5, 2, like=like).data_ptr() == first.data_ptr()
    assert take("a", 3, like=like).data_ptr() == first.data_ptr()
    larger = take("a", 100, 3, like=like)
    assert larger.shape == (100, 3)
    assert held() == 1200  # the smaller one is gone
    assert take("a", 10, like=like).data_ptr() == larger.data_ptr()


def test_purposes_and_types_have_buffers_of_their_own() -> None:
    buffers = [
        take(purpose, 4, like=torch.empty(0, dtype=dtype))
        for purpose in ("a", "b")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for i, buffer in enumerate(buffers):
        buffer.fill_(i)
    assert [float(b[0]) for b in buffers] == [0, 1, 2, 3]
    assert held() == 2 * 4 * (4 + 2)


def test_release_lets_go() -> None:
    take("a", 1000, like=torch.empty(0))
    release()
    assert held() == 0
    assert take("a", 0, like=torch.empty(0)).numel() == 0


def test_threads_have_buffers_of_their_own() -> None:
    mine = take("a", 10, like=torch.empty(0)).fill_(1)
    found: list[int] = []

    def other() -> None:
        found.append(held())
        found.append(take("a", 10, like=torch.empty(0)).fill_(2).data_ptr())
        release()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found[0] == 0
    assert found[1] != mine.data_ptr()
    assert held() == 40
    assert mine.eq(1).all()


def test_buffers_made_in_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        take("a", 10, like=torch.empty(0))
    buffer = take("a", 10, like=torch.empty(0))
    assert not buffer.is_inference()
    buffer.fill_(1)


def test_a_call_without_gradients_keeps_what_it_took() -> None:
    layer = build(Case(tokens=64))
    with torch.no_grad():
        layer.run("loop")
        size = held()
        assert size > 0
        for _ in range(3):
            layer.run("loop")
    assert held() == size


def computed(layer: Layer, kernel: str) -> tuple[Tensor, dict[str, Tensor]]:
    try:
        return gradients(layer, kernel)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_not_in_buffers(kernel: str) -> None:
    layer, other = build(Case(tokens=40, active=0.7)), build(Case(tokens=90, seed=5))
    y, grads = computed(layer, kernel)
    kept = y.detach().clone(), {n: g.clone() for n, g in grads.items()}
    gradients(other, kernel)
    assert torch.equal(y, kept[0])
    assert all(torch.equal(grads[n], kept[1][n]) for n in grads)
    memory = {b.untyped_storage().data_ptr() for b in workspace._buffers().values()}
    assert not memory & {t.untyped_storage().data_ptr() for t in (y, *grads.values())}


@pytest.mark.parametrize("kernel", KERNELS)
def test_layers_between_forward_and_backward_of_another(kernel: str) -> None:
    """Forward of several layers, then backward in either order: nothing is kept in buffers."""
    layers = [build(Case(tokens=30 + 10 * i, seed=i, active=0.8)) for i in range(3)]
    expected = [computed(layer, kernel)[1] for layer in layers]
    for order in ((2, 1, 0), (0, 1, 2)):
        outputs = [layer.run(kernel) for layer in layers]
        release()
        for i in order:
            leaves = list(layers[i].leaves.values())
            found = torch.autograd.grad(outputs[i], leaves, layers[i].push())
            for name, gradient in zip(layers[i].leaves, found, strict=True):
                assert torch.equal(gradient, expected[i][name])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_layer_in_a_hook_of_the_backward_of_another(kernel: str) -> None:
    inner, outer = build(Case(tokens=25, seed=3)), build(Case(tokens=40))
    expected, alone = computed(outer, kernel)[1], gradients(inner, kernel)[1]
    seen: list[dict[str, Tensor]] = []

    def hook(gradient: Tensor) -> None:
        with torch.enable_grad():
            seen.append(gradients(inner, kernel)[1])

    outer.leaves["x"].register_hook(hook)
    found = gradients(outer, kernel)[1]
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient)
    for name, gradient in alone.items():
        assert torch.equal(seen[0][name], gradient)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_layer_inside_an_expert_of_another(kernel: str) -> None:
    """An activation that is itself a layer of experts."""
    inner, outer = build(Case(tokens=1, width=8, seed=1)), build(Case(tokens=6, width=10))
    computed(inner, kernel)

    def activation(z: Tensor) -> Tensor:
        index = torch.arange(len(z))[:, None] % 3
        routing = type(inner.routing())(index, torch.ones(len(z), 1))
        return run_experts(z, routing, inner.experts(), F.gelu, kernel)

    for other in ("autograd", "eager"):
        y = run_experts(outer.x(), outer.routing(), outer.experts(), activation, other)
        y.sum().backward()
        assert y.isfinite().all()
    with pytest.raises(ConfigError, match="does not know the derivative"):
        run_experts(outer.x(), outer.routing(), outer.experts(), activation, kernel)


@pytest.mark.parametrize("inner", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_computing_at_the_same_time(kernel: str, inner: int) -> None:
    """Each with one or two threads of its own for its products."""
    before = torch.get_num_threads()
    torch.set_num_threads(inner)
    try:
        _together(kernel, inner)
    finally:
        torch.set_num_threads(before)


def _together(kernel: str, inner: int) -> None:
    layers = [build(Case(tokens=150, width=40, seed=i, active=0.9)) for i in range(4)]
    expected = [computed(layer, kernel) for layer in layers]

    def work(i: int) -> bool:
        torch.set_num_threads(inner)
        same = True
        for _ in range(5):
            y, grads = gradients(layers[i], kernel)
            with torch.no_grad():
                bare = layers[i].run(kernel)
            same &= torch.equal(bare, y)
            same &= torch.equal(y, expected[i][0])
            same &= all(torch.equal(grads[n], g) for n, g in expected[i][1].items())
        return same

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def saved_bytes(layer: Layer, kernel: str, dtype: torch.dtype) -> int:
    """Bytes saved for backward that are not leaves or integer routing."""
    known = {t.untyped_storage().data_ptr() for t in layer.leaves.values()}
    known |= {t.untyped_storage().data_ptr() for t in (layer.index, layer.mask) if t is not None}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(tensor: Any) -> Any:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        try:
            y = layer.run(kernel)
        except ConfigError as error:
            pytest.skip(str(error))
        assert y.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "apart", "concatenated"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_number_per_pre_activation_is_saved(kernel: str, form: str, dtype: torch.dtype) -> None:
    """Beyond weights and tokens, at most 1.2 times the pre-activations of the slots."""
    tokens, top_k, size = 512, 2, 48
    case = Case(
        tokens=tokens, width=32, sizes=(size,) * 8, top_k=top_k, form=form, out_bias=True,
        first_bias=True,
    )  # fmt: skip
    layer = build(case, dtype)
    rows = size if form == "plain" else 2 * size
    limit = 1.2 * tokens * top_k * rows * dtype.itemsize
    assert 0 < saved_bytes(layer, kernel, dtype) <= limit


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_saved_without_gradients(kernel: str) -> None:
    layer = build(Case())
    with torch.no_grad():
        try:
            y = layer.run(kernel)
        except ConfigError as error:
            pytest.skip(str(error))
    assert y.grad_fn is None
