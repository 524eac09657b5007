"""Gates that are derived from keys: kept in evaluation, never older than the keys."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moduli
from moduli.routing import AvgKRouter, Rule, SimilarityRouter
from moduli.routing.derived import DerivedRouter
from moduli.surgery.modular import routed_layers
from tests import tiny

SETTINGS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "layers": "all", "path": "fast"}


def split(family: str) -> Any:
    model = tiny.build(family)
    moduli.convert(model, moduli.EMoE(split="random", **SETTINGS))
    return model


def routers(model: nn.Module) -> list[AvgKRouter]:
    return [layer.router for layer in routed_layers(model).values()]  # type: ignore[misc]


def run(model: nn.Module, family: str) -> torch.Tensor:
    inputs = tiny.batch(tiny.rows(family))
    with torch.no_grad():
        return model(**inputs).logits


def warmed(family: str) -> Any:
    """A split model whose layers have gates that they would use again."""
    model = split(family)
    run(model, family)
    with torch.no_grad():
        assert all(r.current_gate() is r.current_gate() for r in routers(model))
    return model


def check_fresh(model: nn.Module, family: str, before: torch.Tensor | None = None) -> None:
    """The model computes what its copy does, which has derived nothing yet."""
    found = run(model, family)
    assert torch.equal(found, run(copy.deepcopy(model), family))
    for layer in routed_layers(model).values():
        router: Any = layer.router
        with torch.no_grad():
            keys = layer.ffn.keys().to(router.current_gate().dtype).reshape(4, -1, tiny.WIDTH)
            torch.testing.assert_close(router.current_gate(), keys.mean(1), rtol=1e-6, atol=1e-6)
    if before is not None:
        assert not torch.allclose(found.float(), before.float(), atol=1e-4)


def firsts(model: nn.Module) -> list[nn.Module]:
    return [layer.ffn.first for layer in routed_layers(model).values()]


def turned(weight: torch.Tensor) -> torch.Tensor:
    """Another weight of the same size, with other mean keys."""
    return -2 * weight.detach() + torch.randn_like(weight)


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for first in firsts(model):
            first.weight.copy_(turned(first.weight))


def of_a_view(model: nn.Module) -> None:
    with torch.no_grad():
        for first in firsts(model):
            first.weight.T[1:3].mul_(-3)


def behind_the_counter(model: nn.Module) -> None:
    for first in firsts(model):
        version = first.weight._version
        first.weight.data.mul_(-2)
        assert first.weight._version == version


def through_numpy(model: nn.Module) -> None:
    for first in firsts(model):
        first.weight.detach().numpy()[:] *= -2


def other_data(model: nn.Module) -> None:
    for first in firsts(model):
        first.weight.data = turned(first.weight)


def other_parameter(model: nn.Module) -> None:
    for first in firsts(model):
        first.weight = nn.Parameter(turned(first.weight))


def other_module(model: nn.Module) -> None:
    for layer in routed_layers(model).values():
        ffn = layer.ffn
        new = copy.deepcopy(ffn.first)
        new._forward_pre_hooks.clear()
        new.weight.data = turned(new.weight)
        ffn.block.set_submodule(ffn.family.first, new)


def loaded(model: nn.Module) -> None:
    state = {k: turned(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def loaded_by_assignment(model: nn.Module) -> None:
    state = {k: turned(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def rounded(model: nn.Module) -> None:
    # Allocators like to give the same address to the third weight as to the first.
    with torch.no_grad():
        for first in firsts(model):
            first.weight.data = (first.weight + 30).bfloat16().float() - 30


def to_float64_and_back(model: nn.Module) -> None:
    model.double()
    for first in firsts(model):
        first.weight.data.mul_(-2)
    model.float()


WAYS = [
    in_place,
    of_a_view,
    behind_the_counter,
    through_numpy,
    other_data,
    other_parameter,
    other_module,
    loaded,
    loaded_by_assignment,
    rounded,
    to_float64_and_back,
]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("change", WAYS, ids=lambda change: change.__name__)
def test_no_gate_is_stale(family: str, change: Callable[[nn.Module], None]) -> None:
    model = warmed(family)
    before = run(model, family)
    change(model)
    check_fresh(model, family, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype(dtype: torch.dtype) -> None:
    model = warmed("llama").to(dtype)
    check_fresh(model, "llama")
    gates = [r.current_gate().dtype for r in routers(model)]
    assert gates == [torch.float64 if dtype == torch.float64 else torch.float32] * tiny.LAYERS


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_steps_of_an_optimiser(kind: dict[str, bool], mode: bool) -> None:
    model = warmed("llama")
    before = run(model, "llama")
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.3, **kind)
    for _ in range(2):
        model.train(mode)
        model(**tiny.batch(tiny.rows("llama"))).loss.backward()
        optimiser.step()
        model.eval()
        check_fresh(model, "llama", before)


@pytest.mark.parametrize("unload", [True, False])
def test_merged_lora(unload: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = warmed("llama")
    before = run(model, "llama")
    tuned: Any = get_peft_model(
        model, LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)
    )
    tuned.eval()
    if unload:
        check_fresh(tuned.merge_and_unload(), "llama", before)
    else:
        tuned.merge_adapter()
        check_fresh(tuned, "llama", before)
        tuned.unmerge_adapter()
        with tuned.disable_adapter():
            torch.testing.assert_close(run(tuned, "llama"), before, rtol=1e-3, atol=1e-3)


def test_a_training_mode_never_keeps_a_gate_nor_do_gradients() -> None:
    model = warmed("bert")
    router = routers(model)[0]
    assert router.current_gate() is not router.current_gate()  # gradients are on
    with torch.no_grad():
        kept = router.current_gate()
        assert router.current_gate() is kept
        router.scores(torch.randn(3, tiny.WIDTH, requires_grad=True))
        assert router.current_gate() is not kept
        model.train()
        assert router.current_gate() is not router.current_gate()


def test_gradients_reach_the_keys() -> None:
    keys, x = torch.randn(12, 8, requires_grad=True), torch.randn(5, 8)
    for router in (
        AvgKRouter(lambda: keys, (4, 4, 4), Rule(top_k=1)).eval(),
        SimilarityRouter(lambda: keys, (4, 4, 4), Rule(top_k=1)).eval(),
    ):
        with torch.no_grad():
            router.scores(x)
        (found,) = torch.autograd.grad(router.scores(x).square().sum(), keys)
        assert bool(found.any())


@pytest.mark.parametrize("kind", [AvgKRouter, SimilarityRouter])
def test_inference_tensors_are_not_kept(kind: type[DerivedRouter]) -> None:
    with torch.inference_mode():
        keys = torch.randn(12, 8)
        router = kind(lambda: keys, (4, 4, 4), Rule(top_k=1)).eval()  # type: ignore[call-arg,arg-type]
        x = torch.randn(5, 8)
        before = router.scores(x)
        keys[1] *= -3  # in one place, which a sample may miss
        after = router.scores(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, copy.deepcopy(router).scores(x))


def test_ordinary_weights_are_kept_in_inference_mode() -> None:
    model = warmed("llama")
    with torch.inference_mode():
        model(**tiny.batch(tiny.rows("llama")))
        assert all(r.current_gate() is r.current_gate() for r in routers(model))
    model.train()
    model(**tiny.batch(tiny.rows("llama"))).loss.backward()  # nothing made there is left


@pytest.mark.parametrize("kind", [AvgKRouter, SimilarityRouter])
def test_one_changed_number_is_seen(kind: type[DerivedRouter]) -> None:
    keys, x = torch.randn(120, 80), torch.randn(5, 80)
    router = kind(lambda: keys, (40, 50, 30), Rule(top_k=1)).eval()  # type: ignore[call-arg,arg-type]
    with torch.no_grad():
        before = router.scores(x)
        keys[17, 3] += 50
        assert not torch.equal(router.scores(x), before)
        before = router.scores(x)
        keys.data[17, 3] += 50  # past torch's notice, and not in the sample
        assert torch.equal(router.scores(x), before)
        router.forget()
        assert not torch.equal(router.scores(x), before)


def test_keys_that_are_made_at_every_call_are_not_confused() -> None:
    array = torch.randn(12, 8).numpy()
    # New tensors at the same address every time, as allocators like to make them.
    router = AvgKRouter(lambda: torch.from_numpy(array), (4, 4, 4), Rule(top_k=1)).eval()
    with torch.no_grad():
        for _ in range(3):
            array[5, 1] += 1  # in one place, which a sample may miss
            expected = torch.from_numpy(array.reshape(3, 4, 8).mean(1))
            torch.testing.assert_close(router.current_gate(), expected)


def test_a_setting_that_changes() -> None:
    keys = torch.randn(12, 8)
    router = AvgKRouter(lambda: keys, (4, 4, 4), Rule(top_k=1)).eval()
    with torch.no_grad():
        router.current_gate()
        router.normalize = True
        torch.testing.assert_close(router.current_gate().norm(dim=-1), torch.ones(3))


def test_what_is_kept_is_not_saved_or_copied() -> None:
    model = warmed("llama")
    names = set(split("llama").state_dict())
    assert set(model.state_dict()) == names
    size = len(pickle.dumps(routers(model)[0]._derived))
    assert size < 200
    assert all(r._derived._kept is None for r in routers(copy.deepcopy(model)))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)  # and the model itself is still warm
    with torch.no_grad():
        assert all(r.current_gate() is r.current_gate() for r in routers(model))


@pytest.mark.usefixtures("without_shape_checks")
def test_compiled_gates_follow_the_keys() -> None:
    keys, x = torch.randn(12, 8), torch.randn(5, 8)
    router = AvgKRouter(lambda: keys, (4, 4, 4), Rule(top_k=1)).eval()
    with torch.no_grad():
        router.scores(x)
        compiled = torch.compile(router.scores, fullgraph=True)
        torch.testing.assert_close(compiled(x), router.scores(x))
        keys.mul_(-2)
        torch.testing.assert_close(compiled(x), x @ keys.view(3, 4, 8).mean(1).T)


def test_weights_that_a_transform_provides() -> None:
    model = warmed("llama")
    router, first = routers(model)[0], firsts(model)[0]
    x = torch.randn(5, tiny.WIDTH)
    with torch.no_grad():
        plain = router.scores(x)
        stacked = torch.stack([first.weight, -2 * first.weight])

        def scores(weight: torch.Tensor) -> torch.Tensor:
            class Call(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.first = first

                def forward(self) -> torch.Tensor:
                    return router.scores(x)

            return torch.func.functional_call(Call(), {"first.weight": weight}, ())

        found = torch.vmap(scores)(stacked)
        torch.testing.assert_close(found[0], plain)
        torch.testing.assert_close(found[1], -2 * plain)
        assert torch.equal(router.scores(x), plain)
