"""LoRA and DoRA on converted layers: trained, merged, saved, and loaded on the original base."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

import moduli
from moduli.errors import CheckpointError, ModelError
from moduli.surgery.modular import routed_layers
from tests import tiny
from tests.training.ddp_worker import arguments

TARGETS = {
    "bert": r".*layer\.\d+\.(intermediate|output)\.dense",
    "vit": r".*fc[12]",
    "gpt2": r".*mlp\.c_(fc|proj)",
    "llama": r".*(gate|up|down)_proj",
}
FAMILIES = list(TARGETS)
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}}


def adapter(family: str, **changes: Any) -> LoraConfig:
    settings = {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": TARGETS[family],
        "fan_in_fan_out": family == "gpt2",
    }
    return LoraConfig(**{**settings, **changes})


def adapted(family: str, emoe: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A routed model (ragged experts) with adapters on all of its FFNs."""
    model = tiny.build(family)
    settings = {"num_experts": 5, "top_k": 2, "layers": "all", **(emoe or {})}
    moduli.convert(model, moduli.EMoE(**settings))
    return get_peft_model(model, adapter(family, **changes)).eval()


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    return tiny.batch(tiny.rows(family, 4, seed=1))


@torch.no_grad()
def logits(model: Any, family: str) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**inputs_of(family)).logits
    return found


def train(model: Any, family: str, folder: Path) -> None:
    """A few steps of the stock Trainer, large enough to move everything."""
    changes = {"learning_rate": 0.05, "optim": "adamw_torch", "lr_scheduler_type": "constant"}
    rows = tiny.rows(family, 8)
    Trainer(model=model, args=arguments(folder, **changes), train_dataset=rows).train()
    model.eval()


@pytest.mark.parametrize("path", ["masked", "auto", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_factors_on_converted_layers_get_gradients(family: str, path: str) -> None:
    model = adapted(family, {"path": path}, init_lora_weights=False)
    model.train()(**inputs_of(family)).loss.backward()
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}
    projections = 3 if family == "llama" else 2
    assert len(factors) == 2 * projections * tiny.LAYERS
    for name, factor in factors.items():
        assert factor.grad is not None and bool(factor.grad.any()), name  # noqa: PT018
    # Whatever the path, what is computed is the same.
    masked = adapted(family, {"path": "masked"}, init_lora_weights=False)
    masked.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, family), logits(masked, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_follows_the_adapters(family: str) -> None:
    model = adapted(family)
    layers = routed_layers(model)
    first = next(iter(layers))
    seen: list[torch.Tensor] = []
    layers[first].shared.record = lambda name, routing, real: (
        seen.append(routing.scores) if name == first else None
    )
    logits(model, family)
    block = layers[first].ffn
    with torch.no_grad():
        block.first.lora_B["default"].weight.normal_()
    logits(model, family)
    model.merge_adapter()  # the same keys, now in the weights
    logits(model, family)
    untouched, changed, merged = seen
    assert float((changed - untouched).abs().max()) > 0.1
    torch.testing.assert_close(changed, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_adapters_fit_the_original_base(family: str, kind: str, tmp_path: Path) -> None:
    model = adapted(family, **KINDS[kind])
    before = logits(model, family)
    train(model, family, tmp_path / "run")
    modular = logits(model, family)
    assert float((modular - before).abs().max()) > 0.1

    moduli.save(model, tmp_path / "saved")  # leaves the model as it is
    assert torch.equal(logits(model, family), modular)
    with moduli.dense(model):
        dense = logits(model, family)
    model.save_pretrained(tmp_path / "in expert order")
    moduli.merge(model)
    assert not moduli.is_modular(model)
    merged = logits(model, family)
    torch.testing.assert_close(merged, dense, rtol=1e-4, atol=1e-4)
    assert float((merged - modular).abs().max()) > 0.01  # routing made a difference
    model.save_pretrained(tmp_path / "merged")

    def on_original(folder: str) -> torch.Tensor:
        return logits(PeftModel.from_pretrained(tiny.build(family), tmp_path / folder), family)

    assert torch.equal(on_original("merged"), merged)
    assert torch.equal(on_original("saved"), merged)
    assert not torch.allclose(on_original("in expert order"), merged, atol=0.01)
    alone = model.merge_and_unload()
    torch.testing.assert_close(logits(alone, family), merged, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_unloading_first_and_merging_then(family: str, tmp_path: Path) -> None:
    model = adapted(family, init_lora_weights=False)
    with moduli.dense(model):
        expected = logits(model, family)
    plain = model.merge_and_unload()
    assert moduli.is_modular(plain)
    moduli.save(plain, tmp_path / "saved")
    moduli.merge(plain)
    assert type(plain) is type(tiny.build(family))
    torch.testing.assert_close(logits(plain, family), expected, rtol=1e-3, atol=1e-3)
    reloaded = type(plain).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(reloaded, family), logits(plain, family))


def test_several_adapters_and_their_biases(tmp_path: Path) -> None:
    model = adapted("bert", init_lora_weights=False, lora_bias=True)
    model.add_adapter("other", adapter("bert", r=2, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_()
    moduli.merge(model)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        model.set_adapter(name)
        fresh = PeftModel.from_pretrained(tiny.build("bert"), folder)
        assert torch.equal(logits(fresh, "bert"), logits(model, "bert"))


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_an_untrained_model_restores_the_base(family: str) -> None:
    model = adapted(family)
    moduli.merge(model)
    original = tiny.build(family).state_dict()
    found = model.unload().state_dict()
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], original[name]) for name in original)


@pytest.mark.parametrize("family", FAMILIES)
def test_conversion_leaves_the_names_of_parameters_alone(family: str) -> None:
    dense = get_peft_model(tiny.build(family), adapter(family))
    assert adapted(family).state_dict().keys() == dense.state_dict().keys()


def test_the_adapter_directory_is_no_model(tmp_path: Path) -> None:
    moduli.save(adapted("bert"), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"PeftModel\.from_pretrained"):
        moduli.load(tmp_path / "adapter")


def configs(family: str, kind: str) -> Any:
    """An adapter of some kind on all projections of all FFNs."""
    if kind != "ia3":
        return adapter(family, init_lora_weights=False, **KINDS[kind])
    outward = {"bert": r".*output\.dense", "vit": ".*fc2", "gpt2": r".*mlp\.c_proj"}
    return IA3Config(
        target_modules=TARGETS[family],
        feedforward_modules=outward.get(family, ".*down_proj"),
        fan_in_fan_out=family == "gpt2",
    )


def randomised(model: Any) -> Any:
    """With factors that are not those of a new adapter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(1 + torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", [*KINDS, "ia3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_may_come_first(family: str, kind: str, tmp_path: Path) -> None:
    """Adapters that were there at conversion move with the neurons, and back."""
    model = randomised(get_peft_model(tiny.build(family), configs(family, kind))).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original = logits(model, family)
    moduli.convert(model, moduli.EMoE(num_experts=5, top_k=5, layers="all"))
    assert any(
        not torch.equal(before[name], tensor)
        for name, tensor in model.state_dict().items()
        if "lora" in name or "ia3" in name
    ), "no adapter has moved"
    torch.testing.assert_close(logits(model, family), original, rtol=1e-4, atol=1e-5)
    moduli.set_top_k(model, 2)
    assert not torch.allclose(logits(model, family), original, atol=1e-3)
    moduli.save(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny.build(family), tmp_path / "out").eval()
    assert torch.equal(logits(loaded, family), original)
    moduli.merge(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_ia3_after_conversion_fits_the_original_base(family: str, tmp_path: Path) -> None:
    model = tiny.build(family)
    moduli.convert(model, moduli.EMoE(num_experts=5, top_k=2, layers="all"))
    model = randomised(get_peft_model(model, configs(family, "ia3"))).eval()
    with moduli.dense(model):
        expected = logits(model, family)
    moduli.save(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny.build(family), tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded, family), expected, rtol=1e-4, atol=1e-5)


def test_adapters_of_unknown_kind_leave_the_model_whole(tmp_path: Path) -> None:
    model = tiny.build("bert")
    moduli.convert(model, moduli.EMoE(num_experts=5, top_k=2, layers="all"))
    model = get_peft_model(model, LoHaConfig(target_modules=["intermediate.dense"], r=2))
    before = logits(model, "bert")
    for act in (moduli.merge, lambda m: moduli.save(m, tmp_path / "out")):
        with pytest.raises(ModelError, match="LoRA, DoRA and IA3"):
            act(model)
    assert not (tmp_path / "out").exists()
    assert torch.equal(logits(model, "bert"), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_independent(family: str) -> None:
    model = adapted(family, init_lora_weights=False)
    model.train()(**inputs_of(family)).loss.backward()
    twin = copy.deepcopy(model)
    expected = logits(model, family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, family), expected)
    moduli.merge(twin)
    assert moduli.is_modular(model)
