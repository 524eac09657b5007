"""Files in the published format: what is read, what is written, and what is kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from moduli.models.moduleformer import (
    ModuleFormerConfig,
    ModuleFormerForCausalLM,
    ModuleFormerForSequenceClassification,
    ModuleFormerModel,
)
from moduli.models.moduleformer.naming import dead_buffers
from tests.models.moduleformer import small

STORED = Path(__file__).parents[2] / "parity" / "data" / "moduleformer"
# Fields in which the published models differ, and what their files say of themselves: bytes in
# bfloat16 with the masks, and parameters without.
MOLM = {"att_hidden": 1024, "n_head": 1, "gating_size": 256, "n_att_experts": 16}
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "350M-4B": ({}, 388, 8_360_550_400, 4_142_526_464),
    "700M-4B": ({"k_att": 4, "k_mlp": 4}, 388, 8_360_550_400, 4_142_526_464),
    "700M-8B": ({"n_layer": 48}, 772, 16_515_088_384, 8_182_046_720),
}


def written(model: Any, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("case", ["lm_mlp_mi", "lm_molm_layout"])
def test_a_published_checkpoint_comes_out_as_it_went_in(case: str, tmp_path: Path) -> None:
    model, found = AutoModelForCausalLM.from_pretrained(STORED / case, output_loading_info=True)
    assert isinstance(model, ModuleFormerForCausalLM)
    assert not any(found.values())
    assert same(load_file(STORED / case / "model.safetensors"), written(model, tmp_path))
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (STORED / case, tmp_path)
    )
    del before["transformers_version"]  # that of the writer
    assert before.items() <= after.items()  # left-over fields that mean nothing too


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_of_the_published_models(name: str) -> None:
    changes, tensors, size, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = ModuleFormerForCausalLM(ModuleFormerConfig(**MOLM, **changes)).to(torch.bfloat16)
        state = revert_weight_conversion(model, model.state_dict())
        state |= dead_buffers(model.config, "transformer.", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(state) == tensors
    assert sum(t.numel() * t.element_size() for t in state.values()) == size
    layers = range(model.config.n_layer)
    layer = {
        "ln_1.weight": [1024], "ln_1.bias": [1024], "ln_2.weight": [1024], "ln_2.bias": [1024],
        "attn.q_proj.experts.weight": [16, 1024, 1024],
        "attn.q_proj.output_experts.weight": [16, 1024, 1024],
        "attn.q_proj.gate.w_gate.0.weight": [256, 1024],
        "attn.q_proj.gate.w_gate.0.bias": [256],
        "attn.q_proj.gate.w_gate.3.weight": [16, 256],
        "mlpf.experts.weight": [32, 1024, 2048],
        "mlpf.output_experts.weight": [32, 2048, 1024],
        "mlpf.gate.w_gate.0.weight": [256, 1024],
        "mlpf.gate.w_gate.0.bias": [256],
        "mlpf.gate.w_gate.3.weight": [32, 256],
        "attn.mask": [1024, 1024], "attn.cum_weight": [1024, 1024],
    }  # fmt: skip
    whole = {
        "transformer.wte.weight": [50295, 1024], "lm_head.weight": [50295, 1024],
        "transformer.ln_f.weight": [1024], "transformer.ln_f.bias": [1024],
    }  # fmt: skip
    whole |= {f"transformer.h.{i}.{name}": shape for i in layers for name, shape in layer.items()}
    assert {name: list(tensor.shape) for name, tensor in state.items()} == whole


@pytest.mark.parametrize(
    ("gate", "names"),
    [
        ("mlp", {"w_gate.0.weight": [8, 32], "w_gate.0.bias": [8], "w_gate.3.weight": [4, 8]}),
        ("linear", {"w_gate.0.weight": [4, 32]}),
        ("gmm", {"w_gate.weight": [8, 32], "expert_centroids": [4, 8], "temperature": [1]}),
    ],
)
def test_names_of_routers_and_projections(
    gate: str, names: dict[str, list[int]], tmp_path: Path
) -> None:
    files = written(small.build(gate_type=gate), tmp_path)
    prefix = "transformer.h.1.attn.q_proj.gate."
    found = {n.removeprefix(prefix): list(t.shape) for n, t in files.items() if prefix in n}
    assert found == names
    assert list(files["transformer.h.0.attn.k_proj.weight"].shape) == [16, 32]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = small.tokens()
    assert torch.equal(again(ids).logits, small.build(gate_type=gate)(ids).logits)


@pytest.mark.parametrize("buffers", [True, False])
def test_the_dead_masks_are_written_if_wanted_and_never_read(
    buffers: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small.build(legacy_buffers=buffers)
    files = written(model, tmp_path)
    mask = files.get("transformer.h.0.attn.mask")
    weight = files.get("transformer.h.0.attn.cum_weight")
    if buffers:
        assert mask is not None
        assert weight is not None
        assert torch.equal(mask, torch.ones(16, 16).tril().to(torch.int8))
        assert torch.equal(weight, torch.ones(16, 16).tril(-1))
    else:
        assert mask is weight is None
    for logger in ("transformers", "transformers.modeling_utils"):
        logging.getLogger(logger).propagate = True
    with caplog.at_level(logging.WARNING):
        again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert "attn.mask" not in caplog.text
    assert same(dict(model.state_dict()), dict(again.state_dict()))


@pytest.mark.parametrize("keys", ["wte", "lm_head", "both"])
def test_tied_embeddings_are_found_under_either_name(keys: str, tmp_path: Path) -> None:
    model = small.build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    files = written(model, tmp_path)
    assert "lm_head.weight" not in files  # as the reference writes it
    table = files.pop("transformer.wte.weight")
    if keys != "lm_head":
        files["transformer.wte.weight"] = table
    if keys != "wte":
        files["lm_head.weight"] = table.clone()
    save_file(files, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert again.lm_head.weight is again.transformer.wte.weight
    assert torch.equal(again.lm_head.weight, table)


def test_untied_embeddings_stay_apart(tmp_path: Path) -> None:
    model = small.build()
    files = written(model, tmp_path)
    assert not torch.equal(files["lm_head.weight"], files["transformer.wte.weight"])
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(dict(model.state_dict()), dict(again.state_dict()))


def test_the_decoder_and_a_classifier_load_from_a_language_model(tmp_path: Path) -> None:
    model = small.build()
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert isinstance(decoder, ModuleFormerModel)
    assert same(dict(model.transformer.state_dict()), dict(decoder.state_dict()))
    decoder.save_pretrained(tmp_path / "decoder")
    files = load_file(tmp_path / "decoder" / "model.safetensors")
    assert {"wte.weight", "h.0.mlpf.output_experts.weight", "h.1.attn.mask"} <= files.keys()
    classifier, found = ModuleFormerForSequenceClassification.from_pretrained(
        tmp_path / "decoder", output_loading_info=True
    )
    assert set(found["missing_keys"]) == {"score.weight"}
    assert torch.equal(classifier.transformer.wte.weight, model.transformer.wte.weight)


def test_numbers_of_experts_that_differ_by_layer(tmp_path: Path) -> None:
    model = small.build(att_experts_per_layer=[4, 2], mlp_experts_per_layer=[3, 5])
    files = written(model, tmp_path)
    assert [len(files[f"transformer.h.{i}.mlpf.experts.weight"]) for i in (0, 1)] == [3, 5]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(dict(model.state_dict()), dict(again.state_dict()))


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    model = small.build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written(model, tmp_path / "one").keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(dict(model.state_dict()), dict(again.state_dict()))


def test_fields_have_their_usual_names_too() -> None:
    config = AutoConfig.for_model("moduleformer", n_embd=64, n_layer=3, n_head=2, att_hidden=8)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 2)
    assert config.head_size == 4
