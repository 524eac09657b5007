"""`moduli generate`: text as the model writes it, with and without cache, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

import moduli
from moduli.cli import main
from moduli.errors import ConfigError
from moduli.study.writing import WritingSettings, write_on
from moduli.training.architectures import Architecture, fresh_config, fresh_model
from moduli.training.tokenizer import train_tokenizer

Run = Callable[..., Any]
TEXTS = ["the horse sleeps in the barn", "the judge sleeps in the court"] * 2
SMALL = {"n_layer": 2, "n_embd": 32, "att_hidden": 32, "ffd_hidden": 24, "gating_size": 16}


def ids_of(tokenizer: Any) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories: a ModuleFormer, a dense model, the same split into experts, and a T5."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(TEXTS, 280)
    found = {}
    architectures: tuple[Architecture, ...] = ("moduleformer", "dense")
    for name in architectures:
        model = fresh_model(fresh_config(name, "tiny", SMALL, **ids_of(tokenizer)), seed=0)
        with torch.no_grad():  # so that some tokens are much likelier than others
            model.get_input_embeddings().weight.mul_(20)
        found[name] = root / name
        model.save_pretrained(found[name])
    moduli.convert(model, moduli.EMoE(num_experts=4, top_k=2, split="contiguous"))
    found["split"] = root / "split"
    moduli.save(model, found["split"], tokenizer)
    small = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    found["t5"] = root / "t5"
    T5ForConditionalGeneration(
        T5Config(**small, decoder_start_token_id=1, **ids_of(tokenizer))
    ).save_pretrained(found["t5"])
    for path in found.values():
        tokenizer.save_pretrained(path)
    return found


def options(path: Path, *more: str) -> list[str]:
    return ["generate", "--model", str(path), "--text", "the horse", "--max-new-tokens", "8", *more]


@pytest.mark.parametrize("name", ["moduleformer", "dense", "split", "t5"])
def test_tokens_and_their_probabilities_are_the_model_s(
    name: str, models: dict[str, Path], run_json: Run
) -> None:
    (found,) = run_json(*options(models[name], "--json", "--temperature", "0.5"))["written"]
    assert 1 <= len(found["ids"]) == len(found["tokens"]) == len(found["log_probabilities"]) <= 8
    tokenizer = AutoTokenizer.from_pretrained(models[name])
    assert found["continuation"] == tokenizer.decode(found["ids"], skip_special_tokens=True)
    if name == "t5":
        model = T5ForConditionalGeneration.from_pretrained(models[name])
        given: dict[str, Any] = {"decoder_input_ids": torch.tensor([[1, *found["ids"]]])}
        given["input_ids"] = torch.tensor([tokenizer("the horse")["input_ids"]])
    else:
        load = moduli.load if name == "split" else AutoModelForCausalLM.from_pretrained
        model = load(models[name])
        prompt = tokenizer("the horse")["input_ids"]
        given = {"input_ids": torch.tensor([[*prompt, *found["ids"]]])}
    with torch.no_grad():
        logits = model.eval()(**given).logits[0, -len(found["ids"]) - 1 : -1]
    want = logits.log_softmax(-1).gather(1, torch.tensor(found["ids"])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found["log_probabilities"]), want, rtol=1e-3, atol=1e-4)


def test_beams_find_a_text_at_least_as_likely_as_greedy_choice(
    models: dict[str, Path], run_json: Run
) -> None:
    def total(*more: str) -> float:
        (found,) = run_json(*options(models["dense"], "--json", *more))["written"]
        assert len(found["ids"]) == 8
        return sum(found["log_probabilities"])

    assert total("--beams", "16") >= total("--temperature", "0") - 1e-4


@pytest.mark.parametrize("name", ["moduleformer", "split"])
def test_the_cache_changes_nothing(name: str, models: dict[str, Path], run_json: Run) -> None:
    fast, slow = (
        run_json(*options(models[name], "--json", *more))["written"][0]["ids"]
        for more in ([], ["--no-cache"])
    )
    assert fast == slow


def test_a_seed_decides_what_is_drawn(models: dict[str, Path], run_json: Run) -> None:
    def drawn(*more: str) -> Any:
        return run_json(*options(models["dense"], "--json", *more))["written"]

    hot = ["--temperature", "5"]
    assert drawn(*hot) == drawn(*hot)
    assert drawn(*hot) != drawn(*hot, "--seed", "7")
    assert drawn(*hot, "--top-k", "1") == drawn("--temperature", "0")
    one, two = drawn(*hot, "--text", "the horse", "the horse")
    assert one["ids"] != two["ids"]


def test_what_is_shown_is_text_and_continuation(
    models: dict[str, Path], run_json: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    command = options(models["dense"], "--text", "the horse", "a judge", "--temperature", "0")
    found = run_json(*command, "--json")["written"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown == "\n\n".join(one["text"] + one["continuation"] for one in found) + "\n"


def test_text_is_shown_in_pieces_as_it_grows(models: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["dense"])
    tokenizer = AutoTokenizer.from_pretrained(models["dense"])
    pieces: list[str] = []
    settings = WritingSettings(max_new_tokens=60, temperature=5.0)
    state = torch.get_rng_state()
    found = write_on(model, tokenizer, "the horse", settings, on_text=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == found.continuation
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_have_to_fit_the_positions(models: dict[str, Path], fails: Run) -> None:
    line = fails(2, *options(models["dense"], "--max-new-tokens", "5000"))
    assert "2048 positions" in line


def test_what_cannot_write_is_refused(
    models: dict[str, Path], minilm_path: Path, tmp_path: Path, fails: Run
) -> None:
    assert "no model that writes" in fails(4, *options(minilm_path))
    assert "is empty" in fails(2, *options(models["dense"], "--text", ""))
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(models["dense"]).save_pretrained(bare)
    assert "no tokenizer" in fails(4, *options(bare))
    assert "nowhere" in fails(4, *options(tmp_path / "nowhere"))


def test_a_setting_that_cannot_work_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "m", "--text", "a", "--temperature", "-1"]) == 2
    assert "temperature is -1" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"beams": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}]
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        WritingSettings(**wrong)
