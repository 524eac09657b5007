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
from transformers import AutoModelForCausalLM, DynamicCache

from moduli.errors import CheckpointError, ConfigError, UnknownNameError
from moduli.models.moduleformer.files import CONVERT
from tests.models.moduleformer import small


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_att": 5}, r"k_att is 5, but there are 4 att experts.*at most 4"),
        ({"k_mlp": 6}, r"k_mlp is 6, but there are 5 mlp experts.*at most 5"),
        ({"k_mlp": 0}, r"k_mlp is 0; it is a whole number of 1 or more"),
        ({"mlp_experts_per_layer": [5, 1]}, r"k_mlp is 2, but there are 1"),
        ({"att_experts_per_layer": [4]}, r"has 1 numbers for 2 layers"),
        ({"n_head": 3}, r"att_hidden is 16, which 3 heads.*choose n_head=2"),
        ({"sample_topk": 3}, r"sample_topk is 3; it is a part of the k_att = 2"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small.config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 0}, r"^n_head is 0; it is a whole number of 1 or more \(the default is 8\)$"),
        ({"n_head": None}, r"n_head is None; it is a whole number of 1 or more"),
        ({"n_head": "2"}, r"n_head is '2'; it is a whole number"),
        ({"n_head": 2.0}, r"n_head is 2\.0; it is a whole number"),
        ({"k_att": True}, r"k_att is True; it is a whole number"),
        ({"n_layer": -1}, r"n_layer is -1; it is a whole number of 1 or more"),
        ({"gating_size": 0}, r"gating_size is 0"),
        ({"sample_topk": -1}, r"sample_topk is -1; it is a whole number of 0 or more"),
        ({"moe_pdrop": 2.0}, r"moe_pdrop is 2\.0; it is a number from 0 to 1"),
        ({"aux_loss_weight": "high"}, r"aux_loss_weight is 'high'; it is a number of 0 or more"),
        ({"aux_loss_weight": float("nan")}, r"aux_loss_weight is nan"),
        ({"aux_loss_type": None}, r"aux_loss_type is None; it is a name: 'mi'"),
        ({"legacy_buffers": "no"}, r"legacy_buffers is 'no'; it is true or false"),
        ({"att_experts_per_layer": 4}, r"att_experts_per_layer is 4; it is a list"),
        ({"mlp_experts_per_layer": [5, "5"]}, r"mlp_experts_per_layer is \[5, '5'\]; it is a list"),
        ({"gate_type": None}, r"gate_type is None\. Known names: gmm, linear, mlp"),
        ({"gate_type": ["mlp"]}, r"gate_type is \['mlp'\]\. Did you mean 'mlp'"),
        ({"activation_function": "gelu_nu"}, r"activation_function is 'gelu_nu'.*'gelu_new'"),
        ({"activation_function": None}, r"activation_function is None\. Known names: gelu"),
    ],
)
def test_fields_of_another_type_or_out_of_bounds(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small.config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_type": "linaer"}, "Did you mean 'linear'"),
        ({"sample_topk": 9}, "sample_topk is 9"),
        ({"k_att": 5}, "k_att is 5"),
        ({"num_attention_heads": 3}, "att_hidden is 16, which 3 heads"),
    ],
)
def test_fields_are_checked_however_they_are_changed(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    small.build().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, **changes)
    config = small.config()
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_config(config)


def test_fields_by_the_names_of_transformers_are_known_before_they_are_checked() -> None:
    names = {"n_layer": 24, "num_hidden_layers": 3, "att_experts_per_layer": [4, 3, 4]}
    assert small.config(**names).n_layer == 3


def test_left_over_fields_of_published_files_are_kept() -> None:
    left = {"att_func": "stickbreaking", "local_size": 1, "universal": False, "world_size": None}
    made = small.config(**left, aux_loss_weight=0, embd_pdrop=0)
    assert {name: getattr(made, name) for name in left} == left


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


def test_a_past_that_is_no_cache(without_shape_checks: None) -> None:
    model, ids = small.build(), small.tokens()
    states = ((torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8)),) * 2
    with pytest.raises(ConfigError, match=r"past_key_values is a tuple; .*DynamicCache\(\)"):
        model(ids, past_key_values=states, use_cache=True)


def test_labels_need_all_logits() -> None:
    model, ids = small.build(), small.tokens()
    with pytest.raises(ConfigError, match=r"labels are of 12 tokens.*logits of 1; leave out one"):
        model(ids, labels=ids, logits_to_keep=1)
    whole = model(ids, labels=ids)
    assert torch.equal(model(ids, labels=ids, logits_to_keep=12).loss, whole.loss)


def test_a_cache_of_fixed_length_is_refused_with_one_that_works() -> None:
    model, ids = small.build(), small.tokens(1)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with pytest.raises(ConfigError, match=r"static cache.*choose 'dynamic'"):
        model.generate(ids, cache_implementation="static", **settings)
    found = model.generate(ids, cache_implementation="dynamic", **settings)
    assert torch.equal(found, model.generate(ids, **settings))


def test_packed_sequences_leave_no_cache_to_go_on_from() -> None:
    model, ids = small.build(), small.tokens(1)
    positions = torch.tensor([[*range(5), *range(7)]])
    assert model(ids, position_ids=positions, use_cache=True).past_key_values is None
    with pytest.raises(ConfigError, match=r"holds several sequences.*row of its own"):
        model(ids, position_ids=positions, use_cache=True, past_key_values=DynamicCache())
    alone = model(ids, position_ids=torch.arange(12)[None], use_cache=True)
    assert alone.past_key_values.get_seq_length() == 12


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
