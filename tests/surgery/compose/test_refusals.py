"""What cannot be composed is refused before anything is written, with the exact reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moduli
from moduli.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    ModuliError,
    UnknownNameError,
)
from moduli.surgery.compose import Recipe, Source, plan, read_recipe
from moduli.surgery.compose.write import size_in_bytes
from tests.surgery.compose.conftest import Make, with_prompts
from tests.surgery.compose.tiny_sources import tiny_tokenizer


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 32}, "hidden_size is 32, the base has 16"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, the base has 2"),
        ({"num_attention_heads": 4, "num_key_value_heads": 1}, "num_attention_heads is 4"),
        ({"intermediate_size": 40}, "intermediate_size is 40"),
        ({"vocab_size": 64}, "vocab_size is 64, the base has 61; vocab='pad'"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_parameters is .*500000",
        ),
    ],
)
def test_a_source_of_another_shape(
    changes: dict[str, Any], reason: str, make: Make, tmp_path: Path
) -> None:
    base, good, bad = make("llama", 0), make("llama", 1), make("llama", 2, **changes)
    with pytest.raises(ModelError, match=rf"expert 1 \(.*\).*{reason}"):
        moduli.compose(base, [good, bad], tmp_path / "out", gate="random")
    assert not (tmp_path / "out").exists()


def test_a_source_of_another_family(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model_type is 'mistral', the base has 'llama'"):
        moduli.compose(
            make("llama", 0),
            [make("llama", 1), make("mistral", 2)],
            tmp_path / "out",
            gate="random",
        )


def test_a_tokenizer_with_other_ids(make: Make, tmp_path: Path) -> None:
    base, good, bad = (make("llama", seed) for seed in (0, 1, 2))
    text = (bad / "tokenizer.json").read_text()
    data = json.loads(text)
    vocab = data["model"]["vocab"]
    vocab["w3"], vocab["w4"] = vocab["w4"], vocab["w3"]
    (bad / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match="2 tokens have another id, for example 'w3'"):
        moduli.compose(base, [good, bad], tmp_path / "out", gate="random")
    tiny_tokenizer(58).save_pretrained(bad)
    with pytest.raises(ModelError, match="3 tokens are in one only, for example 'w58'"):
        moduli.compose(base, [good, bad], tmp_path / "out", gate="random")
    moduli.compose(base, [good, bad], tmp_path / "out", gate="random", vocab="pad")


def test_sources_without_a_tokenizer_are_noted(make: Make) -> None:
    base, good, bare = (make("llama", seed) for seed in (0, 1, 2))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    experts = (Source(model=str(good)), Source(model=str(bare)))
    notes = plan(Recipe(base=str(base), experts=experts, gate="random")).notes
    assert len(notes) == 1
    assert "expert 1 (llama-2): tokenizers were not compared" in notes[0]


def _pickle_only(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _without_a_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors")


def _with_another_shape(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(36, 15)
    save_file(state, folder / "model.safetensors")


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_pickle_only, "pickle only"),
        (_without_a_tensor, r"expert 1 \(llama-2\) has no tensor model.layers.1.mlp.up_proj"),
        (_with_another_shape, r"as \[36, 15\], not \[36, 16\]"),
        (_truncated, "truncated"),
        (_adapter, "PEFT adapter; merge it"),
        (_no_config, "no config.json"),
    ],
)
def test_a_damaged_source(
    damage: Callable[[Path], None], reason: str, make: Make, tmp_path: Path
) -> None:
    base, good, bad = (make("llama", seed) for seed in (0, 1, 2))
    damage(bad)
    with pytest.raises(CheckpointError, match=reason):
        moduli.compose(base, [good, bad], tmp_path / "out", gate="random")
    assert not (tmp_path / "out").exists()


def test_a_base_that_no_stock_class_holds(make: Make, tmp_path: Path) -> None:
    folders = [make("llama", seed, attention_bias=True) for seed in (0, 1, 2)]
    with pytest.raises(ModelError, match="attention_bias is True"):
        moduli.compose(folders[0], folders[1:], tmp_path / "out", gate="random")
    config = json.loads((folders[0] / "config.json").read_text()) | {"model_type": "gpt2"}
    (folders[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no MoE class of transformers holds a 'gpt2'"):
        moduli.compose(folders[0], folders[1:], tmp_path / "out", gate="random")


def test_a_shared_expert_where_there_is_no_place(make: Make, tmp_path: Path) -> None:
    folders = [make("qwen3", seed) for seed in (0, 1, 2)]
    shared = Source(model=str(folders[0]))
    with pytest.raises(ModelError, match="qwen3_moe has no shared expert"):
        moduli.compose(folders[0], folders[1:], tmp_path / "out", gate="random", shared=shared)


def test_averaging_tied_with_untied(make: Make, tmp_path: Path) -> None:
    base, sources = make("llama", 0), [make("llama", 1), make("llama", 2, tie_word_embeddings=True)]
    with pytest.raises(ModelError, match="tie_word_embeddings=True, the base False"):
        moduli.compose(base, sources, tmp_path / "out", gate="random", others="average")


@pytest.mark.usefixtures("without_shape_checks")
def test_settings_that_cannot_work(make: Make, tmp_path: Path) -> None:
    base, one, two = (make("llama", seed) for seed in (0, 1, 2))
    experts = with_prompts([one, two])
    same = [Source(model=str(m), positive_prompts=("w3",)) for m in (one, two)]
    out = tmp_path / "out"
    cases: list[tuple[Any, dict[str, Any], type[ModuliError], str]] = [
        ([one], {}, ConfigError, "at least 2"),
        (experts, {"top_k": 3}, ConfigError, "choose 1 to 2"),
        (experts, {"gate": "hiden"}, UnknownNameError, "'hidden'"),
        (experts, {"gat": "hidden"}, UnknownNameError, "'gate'"),
        (experts, {"target": "mixtrall"}, UnknownNameError, "'mixtral'"),
        (experts, {"dtype": "int8"}, UnknownNameError, "float32"),
        (experts, {"rule": "probabilities"}, ConfigError, "renormalised"),
        ([one, two], {}, ConfigError, r"expert 0 \(llama-1\) has no positive prompts"),
        ([one, two], {"gate": "uniform_random", "max_shard_size": "x"}, ConfigError, "5GB"),
        (with_prompts([one, one]), {}, ConfigError, "all experts are llama-1"),
        (same, {}, ConfigError, "prompts of all experts are the same"),
    ]
    for sources, settings, kind, reason in cases:
        with pytest.raises(kind, match=reason):
            moduli.compose(base, sources, out, **settings)
        assert not out.exists()
    moduli.compose(base, same, out, force=True)
    shutil.rmtree(out)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not written by moduli"):
        moduli.compose(base, experts, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_prompts_need_a_tokenizer(make: Make, tmp_path: Path) -> None:
    base, sources = make("llama", 0), [make("llama", 1), make("llama", 2)]
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer, which prompts need"):
        moduli.compose(base, with_prompts(sources), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("base_model: a", DataError, "has no experts"),
        ("[1, 2]", DataError, "holds no keys"),
        ("{", DataError, "cannot be read"),
        ("{base_model: a, experts: [], gate: hidden, gatemode: x}", UnknownNameError, "gate_mode"),
        ("{base_model: a, experts: [{positive_prompts: [b]}]}", DataError, "no source_model"),
        ("{base_model: a, experts: [{source_model: b, prompts: [c]}]}", UnknownNameError, "_pro"),
        ("{base_model: a, experts: [{source_model: b, positive_prompts: c}]}", ConfigError, "list"),
        ("{base_model: a, experts: [{source_model: 3}]}", ConfigError, "source_model is 3"),
        (
            "{base_model: a, experts: [], shared_experts: [{source_model: b}, {source_model: c}]}",
            ConfigError,
            "2 shared experts",
        ),
    ],
)
def test_recipes_that_cannot_be_read(
    text: str, kind: type[ModuliError], reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(kind, match=reason):
        read_recipe(file)


def test_a_recipe_of_mergekit_is_read_with_all_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "base_model: base\ngate_mode: cheap_embed\ndtype: bfloat16\nexperts_per_token: 1\n"
        "architecture: qwen\nexperts:\n- source_model: a\n  positive_prompts: [x, y]\n"
        "  negative_prompts: [z]\n  noise_scale: 0.1\n  residual_scale: 0.5\n"
        "- {source_model: b, positive_prompts: [w]}\n"
        "shared_experts:\n- {source_model: base, positive_prompts: [v]}\n"
    )
    assert read_recipe(file, lambda name: f"at/{name}", seed=3) == Recipe(
        base="at/base",
        experts=(
            Source(
                model="at/a",
                positive_prompts=("x", "y"),
                negative_prompts=("z",),
                noise_scale=0.1,
                residual_scale=0.5,
            ),
            Source(model="at/b", positive_prompts=("w",)),
        ),
        shared=Source(model="at/base", positive_prompts=("v",)),
        target="qwen2_moe",
        top_k=1,
        gate="cheap_embed",
        dtype="bfloat16",
        seed=3,
    )


def test_sizes() -> None:
    assert size_in_bytes("5GB") == 5_000_000_000
    assert size_in_bytes("300 mb") == 300_000_000
    with pytest.raises(ConfigError, match="500MB"):
        size_in_bytes("0GB")
