"""The cost model, and what "auto" takes."""

import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moduli.experts import StackedFFN, run_experts
from moduli.experts.kernels import KERNELS, beats_masking, choose, ops, watch_kernels
from moduli.experts.kernels import calibration as calibrating
from moduli.experts.kernels.choice import fastest_of_size
from moduli.experts.kernels.cost import PROBES, Costs, Shape, _fit, terms
from moduli.experts.kernels.eager import Between
from moduli.experts.kernels.precision import fast_fp32
from moduli.routing import Routing

E, e, D, T = 6, 16, 32, 40


def layer(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Routing, StackedFFN]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    x, experts = random(T, D), StackedFFN(random(E, e, D), random(E, e, D), (e,) * E)
    return x, Routing(torch.rand(T, E, generator=generator).topk(2).indices, random(T, 2)), experts


def test_the_fit_finds_the_costs_that_made_the_times() -> None:
    truth = [2e-5, 1e-6, 1e-9, 2e-8, 3e-10, 4e-11]
    costs = Costs({"loop": truth})
    found = Costs({"loop": _fit("loop", torch.float32, lambda k, s, d: costs.estimate(k, s))})
    for shape in (*PROBES, Shape(4096, 768, 64, 8, 48), Shape(16, 384, 16, 4, 96, gated=True)):
        assert found.estimate("loop", shape) == pytest.approx(
            costs.estimate("loop", shape), rel=0.01
        )


def test_terms_count_what_a_kernel_computes() -> None:
    shape = Shape(256, 64, 8, 2, 20)
    assert terms("masked", shape)[3] == 256
    assert terms("loop", shape)[3] == 512
    assert terms("padded", shape)[3] >= 512
    assert terms("loop", shape)[5] == 512 * 64 * 32 * 2  # 20 neurons take two vectors of 16
    assert terms("loop", Shape(256, 64, 8, 2, 20, gated=True))[5] == 512 * 64 * 32 * 3


def test_the_cheapest_is_taken() -> None:
    costs = Costs({"loop": [1.0, *[0.0] * 5], "native": [*[0.0] * 3, 0.4, 0.0, 0.0]})
    assert costs.fastest(["loop", "native"], Shape(1, 8, 4, 1, 8)) == "native"
    assert costs.fastest(["loop", "native"], Shape(4, 8, 4, 1, 8)) == "loop"


def test_every_machine_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODULI_CACHE", str(tmp_path))
    asked: list[str] = []

    def measure(name: str) -> int:
        asked.append(name)
        return len(asked)

    assert calibrating.measured_once("test", ("a", "b"), measure) == {"a": 1, "b": 2}
    assert calibrating.measured_once("test", ("b", "c"), measure)["b"] == 2
    assert asked == ["a", "b", "c"]
    calibrating.calibration_file().write_text("{ not json")
    assert calibrating.measured_once("test", ("a",), measure) == {"a": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_change_neither_the_choice_nor_the_bits(dtype: torch.dtype) -> None:
    x, routing, experts = layer(dtype)
    between = Between(F.gelu)
    with torch.no_grad():
        without, plain = (
            choose(x, routing, experts, between),
            run_experts(x, routing, experts, F.gelu),
        )
    x.requires_grad_()
    assert choose(x, routing, experts, between) == without
    with watch_kernels() as seen:
        y = run_experts(x, routing, experts, F.gelu)
    assert set(seen) == {without}
    assert torch.equal(y.detach(), plain)


@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_the_choice_is_one_that_can_be_made(tokens: int) -> None:
    size = {"gated": False, "threads": torch.get_num_threads()}
    found = fastest_of_size(tokens, 64, (16,) * 8, 2, dtype=torch.float32, **size)
    assert found in KERNELS
    other = fastest_of_size(tokens, 64, (16,) * 8, 2, dtype=torch.float64, **size)
    assert other in KERNELS
    assert other != "native"
    ragged = fastest_of_size(tokens, 64, (15, 17) * 4, 2, dtype=torch.float32, **size)
    assert ragged != "padded"


def test_all_experts_are_masked_rather_than_routed() -> None:
    x = torch.randn(4, 64)
    assert not beats_masking(4096, 64, (64,) * 4, 4, gated=False, like=x)


def test_a_compiled_graph_remembers_who_computed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" may answer differently in backward, for example with another number of threads."""
    x, routing, experts = layer()
    first = experts.first.clone().requires_grad_()
    leaf = StackedFFN(first, experts.second, experts.sizes)
    grads = []
    for answers in (("loop", "loop"), ("padded", "loop")):
        todo = list(answers)
        monkeypatch.setattr(
            "moduli.experts.kernels.choice.fastest",
            lambda *a, **k: todo.pop(0),  # noqa: B023
        )
        y = ops.run(x, routing, leaf, ops.KNOWN["gelu"], "auto")
        grads.append(torch.autograd.grad(y.square().sum(), first)[0])
        assert len(todo) == 1, "backward asked again"
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_transforms_of_torch_func_get_plain_operations() -> None:
    x, routing, experts = layer()

    def loss(x: torch.Tensor) -> torch.Tensor:
        assert choose(x, routing, experts, Between(F.gelu)) in ("masked", "eager")
        return KERNELS["masked"].run(x, routing, experts, Between(F.gelu)).square().sum()

    found = torch.func.grad(loss)(x)
    leaf = x.clone().requires_grad_()
    y = run_experts(leaf, routing, experts, F.gelu, "eager")
    torch.testing.assert_close(
        found, torch.autograd.grad(y.square().sum(), leaf)[0], rtol=1e-4, atol=1e-4
    )


def test_fast_products_of_several_threads_restore_the_setting() -> None:
    before = torch.get_float32_matmul_precision()
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with fast_fp32(True):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=stay)
    with fast_fp32(True):
        thread.start()
        inside.wait(10)
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "medium"  # the other one is still inside
    leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == before
