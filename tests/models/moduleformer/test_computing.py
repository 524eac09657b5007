"""The same function by every experts backend, in other types, compiled, and spread over devices."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor
from transformers import AutoModelForCausalLM

import moduli
from moduli.models.moduleformer import attention
from moduli.models.stick_breaking import stick_breaking_attention
from tests.models.moduleformer import small

KINDS: dict[str, dict[str, Any]] = {"projections": {}, "published": small.PUBLISHED_KIND}
ROOT = Path(__file__).parents[3]
BACKENDS = ("eager", "grouped_mm", "batched_mm", "moduli", "moduli:eager")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


def step(model: Any) -> dict[str, Tensor]:
    """Logits, loss and all gradients."""
    ids = small.tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model.zero_grad()
    out = model(ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].float(), tensor.float(), rtol=tolerance, atol=tolerance, msg=name
        )


def test_attention_gets_one_type_under_autocast(
    kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels take one, and a cache of another would be twice as large."""
    seen: set[torch.dtype] = set()

    def spy(*tensors: Tensor, **options: Any) -> Any:
        seen.update(tensor.dtype for tensor in tensors)
        return stick_breaking_attention(*tensors, **options)

    monkeypatch.setattr(attention, "stick_breaking_attention", spy)
    model = small.build(**kind)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(small.tokens(), use_cache=True)
    assert seen == {torch.bfloat16}
    assert out.past_key_values.layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_experts_backend_computes_the_same(kind: dict[str, Any], backend: str) -> None:
    moduli.register_experts("eager")
    model = small.build(**kind, aux_loss_weight=0.1)
    assert model.config._experts_implementation == "moduli"
    expected = step(model)
    model.set_experts_implementation(backend)
    assert model.config._experts_implementation == backend
    close(step(model), expected)


def test_a_backend_is_chosen_in_loading_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    small.build().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="batched_mm")
    assert model.config._experts_implementation == "batched_mm"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "moduli"
    with pytest.raises(ValueError, match="experts_implementation"):
        model.set_experts_implementation("modul")


def test_attention_weights_are_those_of_the_output(kind: dict[str, Any]) -> None:
    model, ids = small.build(**kind), small.tokens()
    out = model(ids, output_attentions=True)
    torch.testing.assert_close(out.logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    heads = model.config.n_head
    assert [tuple(a.shape) for a in out.attentions] == [(2, 2, heads, 12, 12)] * 2
    for weights in out.attentions:
        assert (weights.triu(1) == 0).all()
        assert (weights.sum(-1) <= 1 + 1e-5).all()
    out.attentions[0].retain_grad()
    out.logits.sum().backward()
    assert out.attentions[0].grad.abs().max() > 0


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_bfloat16_is_near(kind: dict[str, Any], way: str) -> None:
    # All experts, or rounding would choose others for some tokens.
    model = small.build(**kind, k_att=4, k_mlp=5)
    expected = model(small.tokens()).logits
    if way == "weights":
        found = model.to(torch.bfloat16)(small.tokens()).logits
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = model(small.tokens()).logits
    assert found.dtype == torch.float32
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 0.03


def test_training_under_autocast_gives_gradients_of_the_weights_type(kind: dict[str, Any]) -> None:
    model, ids = small.build(**kind), small.tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_published_dtype_is_kept(tmp_path: Path) -> None:
    small.build().to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("where", ["cpu", "auto", "offloaded"])
@pytest.mark.usefixtures("without_shape_checks")  # accelerate builds outputs from a dictionary
def test_device_maps(kind: dict[str, Any], where: str, tmp_path: Path) -> None:
    model = small.build(**kind)
    model.save_pretrained(tmp_path)
    ids = small.tokens()
    options: dict[str, Any] = {"device_map": "auto" if where == "offloaded" else where}
    if where == "offloaded":
        block = sum(p.numel() * p.element_size() for p in model.transformer.h[0].parameters())
        options |= {"max_memory": {"cpu": int(2.2 * block)}, "offload_folder": tmp_path / "off"}
    found = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    if where == "offloaded":
        assert "disk" in found.hf_device_map.values()
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(found.generate(ids, **settings), model.generate(ids, **settings))


def test_masks_follow_a_block_to_its_device() -> None:
    """By the hook with which accelerate spreads a model over devices."""
    model, ids = small.build(), small.tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    block = model.transformer.h[1].to("meta")
    add_hook_to_module(block, AlignDevicesHook(execution_device="meta"))
    seen: list[Any] = []
    block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model.transformer.ln_f.to("meta")
    model.lm_head.to("meta")
    for masks in ({"attention_mask": mask}, {"position_ids": torch.arange(12)[None] % 5}):
        assert model(ids, **masks).logits.is_meta
    padded, packed = seen
    assert all(t.is_meta for t in (padded.keys, padded.real, packed.segments))


@pytest.mark.gpu
def test_a_model_on_two_devices(kind: dict[str, Any], tmp_path: Path) -> None:
    model = small.build(**kind)
    model.save_pretrained(tmp_path)
    places = {"transformer.wte": 0, "transformer.h.0": 0, "transformer.h.1": "cpu"}
    places |= {"transformer.ln_f": "cpu", "lm_head": 0}
    found = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    ids = small.tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for masks in ({"attention_mask": mask}, {"position_ids": torch.arange(12)[None] % 5}):
        on_device = {name: value.to(0) for name, value in masks.items()}
        logits = found(ids.to(0), **on_device).logits.cpu()
        torch.testing.assert_close(logits, model(ids, **masks).logits, rtol=1e-3, atol=1e-3)


def test_a_copy_is_independent() -> None:
    model, ids = small.build(), small.tokens()
    expected = model(ids).logits
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.transformer.h[0].mlpf.experts.up_proj)
    assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(other(ids).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", KINDS)
def test_compiled_in_one_graph_is_eager(name: str, backend: str) -> None:
    worker = Path(__file__).with_name("compile_worker.py")
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(worker), name, backend],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
