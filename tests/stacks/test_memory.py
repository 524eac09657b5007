"""What saves memory keeps the gradients: activation checkpointing, bf16, loading by device map."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import moduli
from moduli.surgery.modular import routed_layers
from tests import tiny

SETTINGS: dict[str, dict[str, Any]] = {
    "live gate": {},
    "learned gate": {"gate": "linear", "aux": "switch"},
    "kept gate": {"gate_momentum": 0.5},
    "paper": {"preset": "paper", "expert_dropout": 0.0, "noise": 0.0, "aux": "switch"},
}
LARGE = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}


SLOW = ("gpt2", "vit", "kept gate", "paper")


def each(name: str, values: Iterable[str]) -> Any:
    """One test per value; some of them slow."""
    marks = [pytest.param(v, marks=[pytest.mark.slow] if v in SLOW else []) for v in values]
    return pytest.mark.parametrize(name, marks)


def converted(family: str, **settings: Any) -> Any:
    model = tiny.build(family)
    settings = {"num_experts": 5, "top_k": 2, "layers": "all", **settings}
    moduli.convert(model, moduli.EMoE(**settings))
    return model


def inputs(family: str) -> dict[str, Tensor]:
    return tiny.batch(tiny.rows(family, 4))


def gradients(model: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Of one training step, and how often a layer has routed in it."""
    routed: list[str] = []
    shared = next(iter(routed_layers(model).values())).shared
    shared.record = lambda name, routing, real: routed.append(name)
    model.train().zero_grad()
    model(**batch).loss.backward()
    shared.record = None
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found, len(routed)


@pytest.mark.parametrize("path", ["masked", "fast"])
@each("case", SETTINGS)
@each("family", ["bert", "gpt2", "llama"])
def test_checkpointing_keeps_gradients(family: str, case: str, path: str) -> None:
    model = converted(family, path=path, **SETTINGS[case])
    plain, count = gradients(model, inputs(family))
    model.gradient_checkpointing_enable()
    checkpointed, again = gradients(model, inputs(family))
    assert again == 2 * count, "nothing was computed again"
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


@pytest.mark.parametrize("path", ["masked", "fast"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_reentrant_checkpointing_keeps_gradients_without_an_auxiliary_loss(
    family: str, path: str
) -> None:
    model = converted(family, path=path, gate="linear")
    plain, count = gradients(model, inputs(family))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    checkpointed, again = gradients(model, inputs(family))
    assert again == 2 * count, "nothing was computed again"
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


@pytest.mark.parametrize("path", ["masked", "fast"])
@each("case", SETTINGS)
@each("family", tiny.MODELS)
def test_training_in_bf16_follows_float32(family: str, case: str, path: str) -> None:
    """Three steps of SGD under autocast, and with bf16 weights, next to those in float32."""

    def losses(autocast: bool, dtype: torch.dtype) -> list[float]:
        torch.manual_seed(0)
        model = converted(family, path=path, **SETTINGS[case]).train().to(dtype)
        optimiser = torch.optim.SGD(model.parameters(), 0.01)
        batch = inputs(family)
        batch = {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}
        found = []
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            loss.backward()
            assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)
            optimiser.step()
            optimiser.zero_grad()
            found.append(loss.item())
        return found

    exact = losses(False, torch.float32)
    assert len(set(exact)) == 3, "training changes nothing"
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        assert losses(autocast, dtype) == pytest.approx(exact, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@each("family", tiny.MODELS)
def test_another_dtype_after_conversion(family: str, dtype: torch.dtype) -> None:
    """Everything follows `model.to`, and with every expert the model is the dense one in it."""
    model = converted(family, gate="linear", top_k=5).to(dtype)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {dtype}
    batch = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs(family).items()}
    routed = model(**batch).logits
    with moduli.dense(model):
        assert torch.equal(model(**batch).logits, routed)
    moduli.set_top_k(model, 2)
    chosen = model(**batch).logits
    assert chosen.dtype == dtype
    assert bool(chosen.isfinite().all())
    assert not torch.equal(chosen, routed)


@each("case", SETTINGS)
@each("family", tiny.MODELS)
def test_copies_are_independent(family: str, case: str) -> None:
    model = converted(family, **SETTINGS[case])
    gradients(model, inputs(family))
    twin = copy.deepcopy(model.eval())
    layers = routed_layers(model), routed_layers(twin)
    assert layers[0].keys() == layers[1].keys()
    for one, other in zip(*(found.values() for found in layers), strict=True):
        assert other.shared is not one.shared
        assert other.ffn.block is not one.ffn.block
        assert other.ffn.block in set(twin.modules())
    with torch.no_grad():
        expected = model(**inputs(family)).logits
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(**inputs(family)).logits, expected)
        moduli.set_top_k(twin, 5)
    assert all(layer.router.rule.top_k == 2 for layer in routed_layers(model).values())
    moduli.merge(twin)
    assert moduli.is_modular(model)


def test_copies_with_adapters_are_independent() -> None:
    adapter = LoraConfig(r=2, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(converted("llama", gate="linear"), adapter).eval()
    twin = copy.deepcopy(model)
    before = model(**inputs("llama")).logits
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_" in name or "router" in name:
                parameter.mul_(3.0)
        assert not torch.allclose(twin(**inputs("llama")).logits, before, atol=1e-2)
    assert torch.equal(model(**inputs("llama")).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
@pytest.mark.parametrize("family", LARGE)
def test_the_ordinary_part_loads_by_device_map(
    family: str, device_map: str, tmp_path: Path
) -> None:
    model = converted(family, gate="linear")
    moduli.save(model, tmp_path / "saved")
    loaded = LARGE[family].from_pretrained(tmp_path / "saved", device_map=device_map).eval()
    with moduli.dense(model):
        expected = model(**inputs(family)).logits
    found = loaded(**inputs(family)).logits.to("cpu")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    moduli.convert(loaded, moduli.EMoE(num_experts=5, top_k=5, layers="all"))
    found = loaded(**inputs(family)).logits.to("cpu")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
