"""Quantised projections (torchao, int8 weights): converted in place, or quantised afterwards.

What a routed layer computes is put together here from the dequantised weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TorchAoConfig

import moduli
from moduli.errors import ModelError
from moduli.surgery.fast import path_of
from moduli.surgery.modular import routed_layers
from moduli.surgery.projection import weight_rows
from tests import tiny

torchao = pytest.importorskip("torchao.quantization", reason="needs moduli[quant]")

SETTINGS: dict[str, dict[str, Any]] = {
    "live gate": {},
    "learned gate": {"gate": "linear"},
    "kept gate": {"gate_momentum": 0.5},
}
FAMILIES = ("bert", "vit", "llama")


def quantise(model: Any) -> Any:
    """All linear layers of the FFNs, in place."""
    parts = ("intermediate.dense", "output.dense", "fc1", "fc2", "_proj")

    def chosen(module: nn.Module, name: str) -> bool:
        inside = "attention" not in name and "attn" not in name
        return isinstance(module, nn.Linear) and inside and name.endswith(parts)

    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=chosen)
    return model


def convert(model: Any, top_k: int = 2, **settings: Any) -> Any:
    settings = {"num_experts": 5, "top_k": top_k, "layers": "all", **settings}
    moduli.convert(model, moduli.EMoE(**settings))
    return model


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    found: Tensor = model.eval()(**tiny.batch(tiny.rows(family, 4))).logits
    return found


def matrix(module: Any) -> Tensor:
    """What int8 weights stand for."""
    assert type(module.weight).__name__ == "Int8Tensor"
    full: Tensor = module.weight.dequantize()
    return full


@torch.no_grad()
def by_hand(layer: Any, x: Tensor) -> Tensor:
    """The output of a routed FFN without its residual, from dequantised weights."""
    first, last, up = layer.ffn.first, layer.ffn.last, layer.ffn.up
    keys, labels = matrix(first), layer.labels
    if labels is None:
        labels = torch.arange(len(layer.sizes)).repeat_interleave(torch.tensor(layer.sizes))
    means = torch.stack([keys[labels == e].mean(0) for e in range(len(layer.sizes))])
    chosen = (x @ means.T).topk(2).indices
    mask = (labels[None, :, None] == chosen[:, None, :]).any(-1)
    bias = 0 if first.bias is None else first.bias
    hidden = layer.activation(x @ keys.T + bias) * mask
    hidden = hidden if up is None else hidden * (x @ matrix(up).T)
    return hidden @ matrix(last).T + (0 if last.bias is None else last.bias)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_routing_by_hand(family: str, when: str) -> None:
    model = tiny.build(family)
    model = convert(quantise(model)) if when == "before" else quantise(convert(model))
    seen: list[tuple[Any, Tensor, Tensor]] = []
    for layer in routed_layers(model).values():
        assert (layer.labels is not None) == (when == "before")
        assert path_of(layer).startswith("masked")
        inputs: list[Tensor] = []
        layer.ffn.first.register_forward_pre_hook(
            lambda module, args, to=inputs: to.append(args[0].flatten(0, 1))
        )
        layer.ffn.last.register_forward_hook(
            lambda module, args, y, of=layer, x=inputs: seen.append((of, x[0], y.flatten(0, 1)))
        )
    logits(model, family)
    assert len(seen) == tiny.LAYERS
    for layer, x, y in seen:
        torch.testing.assert_close(y, by_hand(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_conversion_of_quantised_layers(family: str, case: str) -> None:
    """With every expert it is the dense quantised model; merging gives that back."""
    expected = logits(quantise(tiny.build(family)), family)
    model = convert(quantise(tiny.build(family)), 5, **SETTINGS[case])
    assert torch.equal(logits(model, family), expected)
    moduli.set_top_k(model, 2)
    assert not torch.allclose(logits(model, family), expected, atol=1e-3)
    moduli.merge(model)
    assert torch.equal(logits(model, family), expected)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantising_a_converted_model(family: str, case: str) -> None:
    """Scales belong to rows: moving neurons first or quantising first is the same function."""
    model = quantise(convert(tiny.build(family), 5, **SETTINGS[case]))
    expected = logits(quantise(tiny.build(family)), family)
    torch.testing.assert_close(logits(model, family), expected, rtol=1e-4, atol=1e-4)
    moduli.set_top_k(model, 2)
    routed = logits(model, family)
    with pytest.raises(ModelError, match="merge before quantising"):
        moduli.merge(model)
    assert torch.equal(logits(model, family), routed), "it is left as it was"


def test_keys_of_quantised_layers_are_what_they_apply() -> None:
    model = convert(quantise(tiny.build("bert")), gate_momentum=0.0)
    layer = next(iter(routed_layers(model).values()))
    torch.testing.assert_close(weight_rows(layer.ffn.first), matrix(layer.ffn.first))
    layer.router.stale = True
    layer.router.update()
    means = [matrix(layer.ffn.first)[layer.labels == e].mean(0) for e in range(5)]
    torch.testing.assert_close(layer.router.gate, torch.stack(means))
    assert layer._input is None, "reading the keys is no forward of the layer"


def test_only_transformers_writes_quantised_weights(tmp_path: Path) -> None:
    model = convert(quantise(tiny.build("bert")))
    with pytest.raises(ModelError, match=r"Int8Tensor.*TorchAoConfig"):
        moduli.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def loaded(path: Path) -> Any:
    tiny.build("llama").save_pretrained(path)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config).eval()


@pytest.mark.parametrize("case", SETTINGS)
def test_saving_what_transformers_has_quantised(case: str, tmp_path: Path) -> None:
    model = convert(loaded(tmp_path / "base"), **SETTINGS[case])
    routed = logits(model, "llama")
    moduli.save(model, tmp_path / "out")
    assert torch.equal(logits(moduli.load(tmp_path / "out"), "llama"), routed)
    with moduli.dense(model):
        dense = logits(model, "llama")
    ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(ordinary, "llama"), dense)


@pytest.mark.parametrize("case", SETTINGS)
def test_adapters_on_quantised_converted_layers(case: str, tmp_path: Path) -> None:
    model = convert(loaded(tmp_path / "base"), **SETTINGS[case])
    targets = ["gate_proj", "up_proj", "down_proj"]
    adapter = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(model, adapter).train()
    model(**tiny.batch(tiny.rows("llama", 4))).loss.backward()
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(factors) == 2 * len(targets) * tiny.LAYERS
    for name, factor in factors.items():
        assert factor.grad is not None, name
        assert bool(factor.grad.any()), name
    with moduli.dense(model):
        expected = logits(model, "llama")
    moduli.merge(model)
    assert torch.equal(logits(model, "llama"), expected)
