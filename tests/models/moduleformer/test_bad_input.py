"""What is refused, and what the message says then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moduli.errors import CheckpointError, ConfigError, UnknownNameError
from moduli.models.moduleformer.files import CONVERT
from tests.models.moduleformer import small


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_att": 5}, r"k_att is 5, but there are 4 att experts.*at most 4"),
        ({"k_mlp": 6}, r"k_mlp is 6, but there are 5 mlp experts.*at most 5"),
        ({"k_mlp": 0}, r"k_mlp is 0.*at least 1"),
        ({"mlp_experts_per_layer": [5, 1]}, r"k_mlp is 2, but there are 1"),
        ({"att_experts_per_layer": [4]}, r"has 1 numbers for 2 layers"),
        ({"n_head": 3}, r"att_hidden is 16, which 3 heads"),
        ({"sample_topk": 3}, r"sample_topk is 3; it is a part of the k_att = 2"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small.config(**changes)


def test_a_gate_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"gate_type is 'gnm'.*Did you mean 'gmm'"):
        small.config(gate_type="gnm")
    small.build().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"gate_type": "lineal"}))
    with pytest.raises(UnknownNameError, match="Did you mean 'linear'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("wanted", [{}, {"use_safetensors": False}])
def test_pickled_weights_are_refused_and_the_way_out_works(
    wanted: dict[str, bool], tmp_path: Path
) -> None:
    model = small.build()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    for i, part in enumerate((names[::2], names[1::2])):
        torch.save({n: state[n] for n in part}, tmp_path / f"pytorch_model-0000{i}-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"pickle only \(pytorch_model-00000.*") as error:
        AutoModelForCausalLM.from_pretrained(tmp_path, **wanted)
    assert str(error.value).endswith(CONVERT)
    code = CONVERT.removeprefix('python -c "').removesuffix('"')
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **wanted)
    ids = small.tokens()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_pickled_weights_are_not_read_beside_safetensors(tmp_path: Path) -> None:
    model = small.build()
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_truncated_file(tmp_path: Path) -> None:
    small.build().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_empty_directory_is_an_error_of_transformers(tmp_path: Path) -> None:
    small.config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_past_of_another_batch() -> None:
    model, ids = small.build(), small.tokens()
    past = model(ids, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match=r"is of 2 sequences and the input has 3.*reorder_cache"):
        model(small.tokens(3, 1), past_key_values=past, use_cache=True)


def test_a_mask_that_does_not_span_past_and_present() -> None:
    model, ids = small.build(), small.tokens()
    with pytest.raises(ConfigError, match=r"shape \(2, 11\).*\(2, 12\): 2 rows, 0 tokens of the"):
        model(ids, attention_mask=torch.ones(2, 11))
    past = model(ids, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match=r"shape \(2, 1\).*12 tokens of the cache and 1 new"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=past, use_cache=True)


def test_neither_or_both_of_tokens_and_embeddings() -> None:
    model, ids = small.build(), small.tokens()
    with pytest.raises(ConfigError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ConfigError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.transformer.wte(ids))


def test_several_texts_to_classify_and_nothing_says_where_they_end() -> None:
    from moduli.models.moduleformer import ModuleFormerForSequenceClassification as Classifier

    model = small.build(auto=Classifier)
    with pytest.raises(ConfigError, match=r"2 texts.*attention_mask, or set config.pad_token_id"):
        model(small.tokens())


def test_a_checkpoint_of_a_hub_with_pickled_weights_only(tmp_path: Path) -> None:
    """As it lies in the cache of the hub's client, read without a network."""
    entry = tmp_path / "models--someone--pickled"
    snapshot = entry / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("abc")
    model = small.build()
    model.config.save_pretrained(snapshot)
    torch.save(model.state_dict(), snapshot / "pytorch_model.bin")
    script = (
        "import moduli\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained('someone/pickled')\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | offline
    )
    assert "CheckpointError: someone/pickled has no safetensors" in done.stderr
    assert "hf download someone/pickled" in done.stderr
