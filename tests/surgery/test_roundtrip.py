"""Dense to modular and back: nothing is lost, nothing is renamed, k = E is the dense model."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moduli
from moduli.surgery.modular import routed_layers
from tests.tiny import MODELS, NEURONS, batch, build, rows

FAMILIES = list(MODELS)

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "ragged": {"num_experts": 7, "top_k": 3},
    "random": {"split": "random"},
    "contiguous": {"split": "contiguous"},
    "paper": {"preset": "paper"},
    "learned": {"gate": "cosine"},
    "linear": {"gate": "linear", "aux": "switch"},
    "kept gate": {"gate_momentum": 0.5, "normalize_gate": True},
    "fast": {"path": "fast"},
}


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return build(family).to(dtype)


def inputs(family: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    examples = batch(rows(family, 3))
    examples.pop("labels")
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in examples.items()}


def emoe(**changes: Any) -> moduli.EMoE:
    return moduli.EMoE(**{"num_experts": 6, "top_k": 2, "layers": "last:2", **changes})


def digests(model: nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in model.state_dict().items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_convert_then_merge_restores_every_bit(family: str, variant: str) -> None:
    model = make(family)
    before, config = digests(model), model.config.to_dict()
    hooks = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    moduli.convert(model, emoe(**VARIANTS[variant]))
    moved = digests(model) != before
    assert moved is (variant != "contiguous"), "if nothing moved, the test proves nothing"
    report = moduli.merge(model)
    assert report.exact
    assert digests(model) == before
    assert model.config.to_dict() == config
    assert {name: len(m._forward_hooks) for name, m in model.named_modules()} == hooks
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert not moduli.is_modular(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_come_back_too(family: str, dtype: torch.dtype) -> None:
    model = make(family, dtype=dtype)
    before = digests(model)
    moduli.convert(model, emoe())
    model(**inputs(family, dtype=dtype))
    moduli.merge(model)
    assert digests(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_classes_of_parameters_stay(family: str) -> None:
    model = make(family)
    names = {n: (type(p), p.shape) for n, p in model.state_dict().items()}
    classes = {n: type(m) for n, m in model.named_modules()}
    moduli.convert(model, emoe())
    assert {n: (type(p), p.shape) for n, p in model.state_dict().items()} == names
    changed = {n for n, m in model.named_modules() if n in classes and type(m) is not classes[n]}
    assert len(changed) == 2
    assert all("act" in name for name in changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_is_the_dense_function(family: str) -> None:
    model, example = make(family), inputs(family)
    original = model(**example).logits
    moduli.convert(model, emoe(num_experts=7, top_k=7, path="masked"))
    with moduli.dense(model):
        full = model(**example).logits
    assert torch.equal(model(**example).logits, full)
    # Against the original only the order of the sum over neurons differs.
    torch.testing.assert_close(full, original, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", FAMILIES)
def test_fast_path_with_all_experts_per_layer(
    family: str, dtype: torch.dtype, bound: float
) -> None:
    model = make(family, dtype=dtype)
    moduli.convert(model, emoe(num_experts=7, top_k=7, path="fast"))
    for layer in routed_layers(model).values():
        x = torch.randn(50, layer.ffn.hidden, dtype=dtype)
        entry = getattr(layer.ffn.block, layer.ffn.family.entry or "")
        fast = entry(x)
        with moduli.dense(model):
            full = entry(x)
        assert float((fast - full).norm() / full.norm()) <= bound


@pytest.mark.parametrize(
    "variant", [{}, {"num_experts": 7}, {"gate": "cosine"}, {"choose": "not_top"}]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_fast_and_masked_paths_agree(family: str, variant: dict[str, Any]) -> None:
    model, example = make(family, dtype=torch.float64), inputs(family, dtype=torch.float64)
    moduli.convert(model, emoe(**variant, path="masked"))
    other = copy.deepcopy(model)
    for layer in routed_layers(other).values():
        layer.options = dataclasses_replace(layer.options, path="fast")
    grads = []
    for m in (model, other):
        out = m(**example).logits
        out.square().mean().backward()
        grads.append((out, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-10, atol=1e-12)
    assert grads[0][1].keys() == grads[1][1].keys()
    for name, grad in grads[0][1].items():
        torch.testing.assert_close(grad, grads[1][1][name], rtol=1e-8, atol=1e-12, msg=name)


def dataclasses_replace(options: Any, **changes: Any) -> Any:
    import dataclasses

    return dataclasses.replace(options, **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_experts_change_the_output_and_top_k_is_a_runtime_setting(family: str) -> None:
    model, example = make(family), inputs(family)
    moduli.convert(model, emoe(top_k=1))
    one = model(**example).logits
    with moduli.dense(model):
        full = model(**example).logits
    assert not torch.equal(one, full)
    moduli.set_top_k(model, 6)
    torch.testing.assert_close(model(**example).logits, full, rtol=1e-5, atol=1e-6)
    moduli.set_top_k(model, 1)
    assert torch.equal(model(**example).logits, one)


@pytest.mark.parametrize("family", FAMILIES)
def test_deepcopy_is_independent(family: str) -> None:
    model, example = make(family), inputs(family)
    moduli.convert(model, emoe(path="fast"))
    twin = copy.deepcopy(model)
    before = model(**example).logits
    assert torch.equal(twin(**example).logits, before)
    moduli.set_top_k(twin, 5)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    assert torch.equal(model(**example).logits, before)
    blocks = {id(m) for m in twin.modules()}
    assert all(id(layer.ffn.block) in blocks for layer in routed_layers(twin).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_avgk_routing_follows_weights_that_change_in_place(family: str) -> None:
    """A gate computed once would be stale; the live one is not."""
    for path in ("masked", "fast"):
        model, example = make(family), inputs(family)
        moduli.convert(model, emoe(path=path))
        name, layer = next(iter(routed_layers(model).items()))
        seen: list[torch.Tensor] = []
        layer.shared.record = lambda n, r, real, name=name, seen=seen: (
            seen.append(r.experts) if n == name else None
        )
        model(**example)
        with torch.no_grad():
            layer.ffn.keys().neg_()
            bias = layer.ffn.first.bias
            if bias is not None:
                bias.neg_()
        model(**example)
        assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_with_a_cache_equals_generation_without(family: str) -> None:
    model, example = make(family, dtype=torch.float64), inputs(family)
    moduli.convert(model, emoe())
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = example["input_ids"][:2]
    cached = model.generate(prompt, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))
    assert cached.shape[1] == prompt.shape[1] + 6


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model, example = make(family, dtype=torch.float64), inputs(family, dtype=torch.float64)
        moduli.convert(model, emoe())
        model.train()
        for module in model.modules():  # dropout would differ between the two runs
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**example).logits.square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_padding_does_not_matter_by_default_and_does_in_the_paper() -> None:
    """Capacity makes the reference's outputs depend on padding; ours have none unless asked."""
    model = make("bert")
    example = inputs("bert")
    short = {k: v[:2] for k, v in example.items()}
    padded = {k: torch.nn.functional.pad(v, (0, 12)) for k, v in short.items()}
    for config, equal in ((emoe(), True), (emoe(preset="paper", expert_dropout=0.0), False)):
        moduli.convert(model, config)
        alone, together = model(**short).logits, model(**padded).logits
        assert torch.allclose(alone, together, atol=1e-5) is equal
        moduli.merge(model)


def test_paper_bias_is_averaged_when_trained_and_the_report_says_so() -> None:
    model = make("bert")
    moduli.convert(model, emoe(preset="paper"))
    layer = next(iter(routed_layers(model).values()))
    assert layer.out_bias is not None
    with torch.no_grad():
        layer.out_bias.add_(torch.randn_like(layer.out_bias))
    expected = 2 * layer.out_bias.detach().mean(0)
    report = moduli.merge(model)
    assert not report.exact
    assert len(report.averaged) == 1
    torch.testing.assert_close(layer.ffn.last.bias.detach(), expected)


def test_real_minilm_round_trip_is_bit_identical(minilm_path: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm_path)
    before = digests(model)
    moduli.convert(model, moduli.EMoE(num_experts=16, top_k=4, layers="every:2"))
    assert digests(model) != before
    moduli.merge(model)
    assert digests(model) == before


@pytest.mark.slow
def test_real_smollm2_round_trip_is_bit_identical() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import moduli.data

    path = moduli.data.fetch("smollm2")
    model = AutoModelForCausalLM.from_pretrained(path)
    before = digests(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    example = tokenizer("The capital of France is", return_tensors="pt")
    report = moduli.convert(
        model, moduli.EMoE(num_experts=16, top_k=8, layers="every:10"), batch=dict(example)
    )
    assert report is not None
    assert all(0 < (layer.error or 0) < 1 for layer in report.layers)
    moduli.merge(model)
    assert digests(model) == before


def test_widths_of_the_tiny_models() -> None:
    """The ragged variant must really be ragged."""
    assert NEURONS % 7
