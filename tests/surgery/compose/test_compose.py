"""Composed checkpoints: exact experts, exact function where mathematics says so, little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moduli
from moduli.surgery.compose import Source
from moduli.surgery.compose.sources import Checkpoint
from moduli.surgery.stock import STOCK, stock_for
from tests.surgery.compose.conftest import Make, logits, tensors, with_prompts

FAMILIES = sorted({stock.dense for stock in STOCK})


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_experts_compute_the_base(
    family: str, top_k: int, make: Make, tmp_path: Path
) -> None:
    base = make(family, 0)
    experts = with_prompts([base, base, base])
    moduli.compose(base, experts, tmp_path / "out", top_k=top_k, force=True)
    expected = logits(base)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_i_is_source_i_and_the_rest_is_the_base(
    family: str, make: Make, tmp_path: Path
) -> None:
    base, sources = make(family, 0), [make(family, seed) for seed in (1, 2, 3)]
    moduli.compose(base, sources, tmp_path / "out", gate="random")
    found, of_base = tensors(tmp_path / "out"), tensors(base)
    stock = stock_for(family)
    for i, source in enumerate(map(tensors, sources)):
        for layer in range(2):
            names = zip(stock.expert_tensors(layer, i), stock.dense_tensors(layer), strict=True)
            assert all(torch.equal(found[moe], source[dense]) for moe, dense in names)
    for name, tensor in of_base.items():
        if (copied := stock.copied(name)) is not None:
            assert torch.equal(found[copied], tensor)


def test_a_token_that_goes_to_one_expert_gets_that_expert(make: Make, tmp_path: Path) -> None:
    base, sources = make("llama", 0), [make("llama", seed) for seed in (1, 2)]
    moduli.compose(base, sources, tmp_path / "out", gate="random", top_k=1)
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    fine_tunes = [AutoModelForCausalLM.from_pretrained(source).eval() for source in sources]
    x = torch.randn(1, 7, 16)
    with torch.no_grad():
        block = moe.model.layers[1].mlp
        chosen = block.gate(x)[2].flatten().tolist()
        assert set(chosen) == {0, 1}
        each = [model.model.layers[1].mlp(x) for model in fine_tunes]
        expected = torch.stack([each[e][0, t] for t, e in enumerate(chosen)])
        torch.testing.assert_close(block(x)[0], expected, rtol=0, atol=1e-5)


def test_prompts_decide_where_tokens_go(make: Make, tmp_path: Path) -> None:
    base = make("llama", 0)
    experts = with_prompts([make("llama", seed) for seed in (1, 2, 3)])
    moduli.compose(base, experts, tmp_path / "out", gate="ffn_input", top_k=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for wanted, expert in enumerate(experts):
        ids = [1, *(int(word[1:]) for word in expert.positive_prompts[0].split())]
        seen: list[torch.Tensor] = []
        hook = model.model.layers[0].mlp.gate.register_forward_hook(
            lambda module, args, out: seen.append(out[0].mean(0))  # noqa: B023 - used at once
        )
        with torch.no_grad():
            model(torch.tensor([ids]))
        hook.remove()
        assert int(seen[0].argmax()) == wanted


def test_padding_does_not_count_unless_asked_for(make: Make, tmp_path: Path) -> None:
    base, sources = make("llama", 0), [make("llama", seed) for seed in (1, 2)]
    short, long = ("w3",), ("w3", "w20 w21 w22 w23 w24 w25")
    gates: dict[str, Any] = {}
    for mode in ("hidden_avg", "hidden_avg_padded"):
        for prompts in (short, long):
            experts = [
                Source(model=str(sources[0]), positive_prompts=prompts),
                Source(model=str(sources[1]), positive_prompts=("w50",)),
            ]
            out = tmp_path / f"{mode}-{len(prompts)}"
            moduli.compose(base, experts, out, gate=mode)
            gates[mode, len(prompts)] = tensors(out)["model.layers.0.block_sparse_moe.gate.weight"]
    assert torch.allclose(gates["hidden_avg", 1], gates["hidden_avg_padded", 1], atol=1e-6)
    assert not torch.allclose(gates["hidden_avg", 2], gates["hidden_avg_padded", 2], atol=1e-2)
    # In layer 0 states are embeddings, so that the mean can be computed by hand.
    table = tensors(base)["model.embed_tokens.weight"]
    mean = (table[[1, 3]].mean(0) + table[[1, 20, 21, 22, 23, 24, 25]].mean(0)) / 2
    expected = mean / mean.norm()
    torch.testing.assert_close(gates["hidden_avg", 2][0], expected, rtol=0, atol=1e-6)


def test_a_shared_expert_without_prompts_counts_fully(make: Make, tmp_path: Path) -> None:
    """With experts that are scaled to zero, what is left is the shared expert alone."""
    base = make("llama", 0)
    off = with_prompts([base, make("llama", 1)], residual_scale=0.0)
    moduli.compose(base, off, tmp_path / "out", shared=Source(model=str(base)))
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen2_moe"
    torch.testing.assert_close(logits(tmp_path / "out"), logits(base), rtol=0, atol=1e-5)


def test_averaging_the_rest(make: Make, tmp_path: Path) -> None:
    base, sources = make("mistral", 0), [make("mistral", seed) for seed in (1, 2, 3)]
    moduli.compose(base, sources, tmp_path / "out", gate="random", others="average")
    found = tensors(tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    mean = torch.stack([tensors(source)[name].double() for source in sources]).mean(0)
    assert torch.equal(found[name], mean.float())
    same = [base, base, base]
    moduli.compose(base, same, tmp_path / "same", gate="random", others="average", force=True)
    assert torch.equal(tensors(tmp_path / "same")[name], tensors(base)[name])


@pytest.mark.parametrize("vocab", ["pad", "zero_pad"])
def test_averaging_over_vocabularies(vocab: str, make: Make, tmp_path: Path) -> None:
    small, large = make("llama", 1), make("llama", 2, vocab_size=64)
    out = tmp_path / "out"
    moduli.compose(
        make("llama", 0), [small, large], out, gate="random", others="average", vocab=vocab
    )
    name = "model.embed_tokens.weight"
    found, few, many = tensors(out)[name], tensors(small)[name], tensors(large)[name]
    torch.testing.assert_close(found[:61], (few + many[:61]) / 2)
    torch.testing.assert_close(found[61:], many[61:] if vocab == "pad" else many[61:] / 2)
    assert (out / "tokenizer.json").read_text() == (large / "tokenizer.json").read_text()
    assert logits(out).shape[-1] == 64


def test_noise_is_the_same_for_the_same_seed(make: Make, tmp_path: Path) -> None:
    base = make("llama", 0)
    noisy = with_prompts([base, base], noise_scale=0.1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        moduli.compose(base, noisy, tmp_path / name, force=True, seed=seed)
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a[name.format(0)], c[name.format(0)])
    first = tensors(base)["model.layers.0.mlp.down_proj.weight"]
    spread = (a[name.format(0)] - first).std()
    assert 0.08 < spread < 0.12
    assert not torch.equal(a[name.format(0)], a[name.format(1)])


def test_dtype_of_the_result(make: Make, tmp_path: Path) -> None:
    base, sources = make("qwen3", 0), [make("qwen3", 1), make("qwen3", 2)]
    moduli.compose(base, sources, tmp_path / "out", gate="random", dtype="bf16")
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16


def test_shards_hold_the_same_tensors_and_load(make: Make, tmp_path: Path) -> None:
    base, sources = make("qwen2", 0), [make("qwen2", 1), make("qwen2", 2)]
    for name, size in (("one", "5GB"), ("many", "9KB")):
        moduli.compose(base, sources, tmp_path / name, gate="random", max_shard_size=size)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 12_000 for file in files)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[n], many[n]) for n in one)
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))


@pytest.mark.parametrize("others", ["base", "average"])
def test_two_source_tensors_at_a_time_are_in_memory(
    others: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    read = Checkpoint.read

    def tracked(self: Checkpoint, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", tracked)
    sources = [make("llama", seed) for seed in (1, 2, 3)]
    moduli.compose(make("llama", 0), sources, tmp_path / "out", gate="random", others=others)
    assert 1 <= most <= 2


SCRIPT = """
import sys
sys.modules["moduli"] = None  # importing it would raise
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w3 w4 w5", return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**ids, do_sample=False, eos_token_id=None, pad_token_id=0)
    print(type(model).__name__, out.shape[1])
"""


def test_generates_in_a_process_without_moduli(make: Make, tmp_path: Path) -> None:
    folders = [tmp_path / f"out-{family}" for family in FAMILIES]
    for family, folder in zip(FAMILIES, folders, strict=True):
        experts = with_prompts([make(family, 1), make(family, 2)])
        moduli.compose(make(family, 0), experts, folder)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # The base's generation settings, 7 new tokens, came along.
    expected = [f"{stock_for(family).architecture} 10" for family in FAMILIES]
    assert done.stdout.splitlines() == expected


def test_the_record_has_names_and_no_paths(make: Make, tmp_path: Path) -> None:
    experts = with_prompts([make("llama", 1), make("llama", 2)])
    report = moduli.compose(make("llama", 0), experts, tmp_path / "out")
    for file in ("moduli_compose.json", "README.md", "config.json"):
        assert str(tmp_path) not in (tmp_path / "out" / file).read_text()
    record = json.loads((tmp_path / "out/moduli_compose.json").read_text())
    assert record["experts"] == ["llama-1", "llama-2"]
    assert record["recipe"]["experts"][0]["positive_prompts"] == ["w3 w4 w5", "w6"]
    assert record["conditions"] == list(report.conditions)


def test_totals_are_those_of_the_loaded_model(make: Make, tmp_path: Path) -> None:
    sources = [make("llama", seed, tie_word_embeddings=True) for seed in (1, 2, 3)]
    base = make("llama", 0, tie_word_embeddings=True)
    report = moduli.compose(base, sources, tmp_path / "out", gate="random", top_k=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report.plan.total_parameters == model.num_parameters()
    dense = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    routers = 2 * 3 * 16
    assert report.plan.active_parameters == dense + routers


def test_what_is_dropped_is_measured(make: Make, tmp_path: Path) -> None:
    base, other = make("llama", 0), make("llama", 1)
    report = moduli.compose(base, [base, other], tmp_path / "out", gate="random")
    of_base, of_other = tensors(base), tensors(other)
    rest = [n for n in of_base if ".mlp." not in n]
    far = sum(float((of_other[n] - of_base[n]).square().sum()) for n in rest)
    size = sum(float(of_base[n].square().sum()) for n in rest)
    assert report.dropped[0] == 0
    assert report.dropped[1] == pytest.approx((far / size) ** 0.5, rel=1e-5)
    assert "left out" in str(report)


def test_prompts_that_are_too_alike_are_reported(make: Make, tmp_path: Path) -> None:
    base, sources = make("llama", 0), [make("llama", 1), make("llama", 2)]
    alike = [
        Source(model=str(sources[0]), positive_prompts=("w3 w4 w5 w6 w7 w8",)),
        Source(model=str(sources[1]), positive_prompts=("w3 w4 w5 w6 w7 w9",)),
    ]
    report = moduli.compose(base, alike, tmp_path / "alike", gate="cheap_embed")
    assert min(report.conditions) > 5
    assert "too alike" in str(report)
    apart = with_prompts(sources)
    report = moduli.compose(base, apart, tmp_path / "apart", gate="cheap_embed")
    assert max(report.conditions) < 5
    assert not report.warnings
