"""For every kind of task a tiny random model with its processor, and a few dozen real rows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.io import wavfile

WIDTH, NEURONS, LAYERS = 16, 32, 2
GOOD = ("excellent", "great", "lovely", "superb", "reliable")
BAD = ("terrible", "awful", "useless", "broken", "dreadful")
THINGS = {"shop": ("camera", "phone", "speaker", "battery"), "film": ("story", "plot", "actor")}
WORDS = ["the", "was", "truly", "and", "very", "unknownable", *GOOD, *BAD]
WORDS += [thing for things in THINGS.values() for thing in things]


def tokenizer() -> Any:
    """Words are tokens; an unknown word is cut into letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
    letters = list("abcdefghijklmnopqrstuvwxyz")
    pieces = [*special, *WORDS, *letters, *(f"##{c}" for c in letters)]
    backend = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]",
        pair="[BOS] $A [EOS] $B [EOS]",
        special_tokens=[("[BOS]", 2), ("[EOS]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_input_names=["input_ids", "attention_mask"],
    )


def _bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=NEURONS,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return transformers.BertModel(config), tokenizer()


def _llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config), tokenizer()


def _bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=len(tokenizer()),
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=NEURONS,
        decoder_ffn_dim=NEURONS,
        max_position_embeddings=64,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=3,
    )
    return transformers.BartForConditionalGeneration(config), tokenizer()


def _vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=NEURONS,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    # With the head of another task, as image models are handed on.
    return transformers.ViTForImageClassification(config), processor


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=8,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=NEURONS,
        decoder_ffn_dim=NEURONS,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=8,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return transformers.WhisperForAudioClassification(config), extractor


BUILDERS: dict[str, Callable[[], Any]] = {
    "classification": _bert,
    "multilabel": _bert,
    "regression": _bert,
    "token-classification": _bert,
    "language-modeling": _llama,
    "seq2seq": _bart,
    "translation": _bart,
    "image-classification": _vit,
    "audio-classification": _whisper,
}


def write_model(kind: str, directory: Path) -> Path:
    """A pretrained model without the head of the task; the same weights every time."""
    torch.manual_seed(0)
    model, processor = BUILDERS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # initial weights are so small that FFNs hardly matter
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def rows(kind: str) -> list[dict[str, Any]]:
    """Rows as a JSON-lines file has them, with a "domain"; sentences are of unequal length."""
    found = []
    for domain, things in THINGS.items():
        for i, thing in enumerate(things):
            for label, words in (("bad", BAD), ("good", GOOD)):
                for j, word in enumerate(words):
                    text = f"the {thing} was {word}" + " and very truly so" * ((i + j) % 4)
                    found.append({"domain": domain, "n": len(found), **_row(kind, text, label, j)})
    return found


def _row(kind: str, text: str, label: str, j: int) -> dict[str, Any]:
    good = label == "good"
    if kind == "classification":
        return {"text": text, "label": label}
    if kind == "multilabel":
        return {"text": text, "label": [label, *(["long"] if len(text) > 40 else [])]}
    if kind == "regression":
        return {"text": text, "label": (1.5 if good else -1.5) + 0.25 * j}
    if kind == "token-classification":
        words = text.split()
        return {"tokens": words, "tags": ["JUDGE" if w in GOOD + BAD else "O" for w in words]}
    if kind == "language-modeling":
        return {"text": text}
    if kind in ("seq2seq", "translation"):
        return {"source": text, "target": " ".join(w for w in text.split() if w in WORDS[6:])}
    raise AssertionError(kind)


def picture(seed: int, bright: bool) -> bytes:
    """A noisy PNG, light or dark."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 100, (20, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise + np.uint8(150 * bright)).save(buffer, "PNG")
    return buffer.getvalue()


def sound(seed: int, high: bool, rate: int = 16000) -> bytes:
    """Half a second of a noisy tone as 16-bit wav."""
    time = np.arange(rate // 2) / rate
    wave = 0.5 * np.sin(2 * np.pi * (1500 if high else 300) * time)
    wave += 0.05 * np.random.default_rng(seed).standard_normal(len(time))
    buffer = io.BytesIO()
    wavfile.write(buffer, rate, (wave * 32767 * 0.8).astype(np.int16))
    return buffer.getvalue()


def write_rows(kind: str, directory: Path) -> str:
    """The rows as a file, as `--data` takes it; pictures and sounds are files beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    if kind in ("image-classification", "audio-classification"):
        column, suffix, make = (
            ("image", "png", picture) if kind[0] == "i" else ("audio", "wav", sound)
        )
        table = []
        for i in range(40):
            name = f"{i}.{suffix}"
            (directory / name).write_bytes(make(i, i % 2 == 1))
            row = {column: name, "label": ("no", "yes")[i % 2], "domain": ("a", "b")[i // 20]}
            table.append(row)
    else:
        table = rows(kind)
    path = directory / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return f"jsonl:{path}"
