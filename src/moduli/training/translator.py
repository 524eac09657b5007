"""A small translator with random weights: Marian of transformers, and a tokenizer of its own.

Encoder and decoder, layer norm after each sublayer, sinusoidal positions, one matrix of embeddings
for both sides and the output: the transformer of Vaswani et al. (2017, arXiv 1706.03762). The size
"base" is that of THOR's run script for IWSLT'14 (2110.04260).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moduli.data.translation import language_of
from moduli.errors import ConfigError, DataError, UnknownNameError, nearest
from moduli.training.settings import FinetuneSettings

PREFIX = "translator:"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 128, "ffn": 256, "layers": 2, "dropout": 0.1},
    "small": {"d_model": 256, "ffn": 512, "layers": 3, "dropout": 0.1},
    "base": {"d_model": 512, "ffn": 1024, "layers": 6, "dropout": 0.3},
}
HEADS = 4
VOCABULARY = 4000
POSITIONS = 512
KINDS = ("translation", "seq2seq")

SETTINGS = FinetuneSettings(
    epochs=30,
    learning_rate=1e-3,
    schedule="inverse-sqrt",
    warmup=0.1,
    weight_decay=1e-4,
    adam_beta2=0.98,
    label_smoothing=0.1,
    max_length=128,
)
"""How a translator with random weights is trained, where nobody says otherwise."""


def size_of(model: str) -> str | None:
    """The size in the name of a model to begin with random weights, "translator:tiny"; None for
    other names.

    Raises:
        UnknownNameError: there is no such size.
    """
    if not model.startswith(PREFIX):
        return None
    size = model.removeprefix(PREFIX)
    if size not in SIZES:
        known = [PREFIX + name for name in SIZES]
        raise UnknownNameError(f"There is no model {model!r}. {nearest(model, known)}")
    return size


def fresh_translator(size: str, kind: str, rows: Any) -> tuple[Any, Any]:
    """A translator with random weights, from torch's own generator, and a tokenizer for its rows.

    Args:
        size: one of `SIZES`.
        kind: of the task.
        rows: to train on, with "source" and "target"; its tokenizer is learnt from them.

    Raises:
        ConfigError: the task is not one from text to text.
    """
    from transformers import AutoModelForSeq2SeqLM

    from moduli.training.pieces import train_pieces

    if kind not in KINDS:
        raise ConfigError(
            f"{PREFIX}{size} is for tasks of {' or '.join(KINDS)}, not of {kind}; "
            "for others name a pretrained model."
        )
    sources: Sequence[str] = rows["source"]
    tokenizer = train_pieces(list(sources), rows["target"], VOCABULARY)
    build: Any = AutoModelForSeq2SeqLM.from_config
    return build(translator_config(size, tokenizer)), tokenizer


def require_learnt(tokenizer: Any, tested: Sequence[Any]) -> None:
    """See to it, before anything is trained, that all that is tested will have been learnt.

    Args:
        tokenizer: of `fresh_translator`.
        tested: tables of rows.

    Raises:
        DataError: texts are to be translated into a language that no training row has.
    """
    from moduli.training.pieces import tags_of

    if not (learnt := tags_of(tokenizer)):
        return
    languages = {language_of(source) for rows in tested for source in rows["source"]}
    if unknown := sorted(language for language in languages - set(learnt) if language):
        raise DataError(
            f"The translator would learn {', '.join(learnt)} and be tested in "
            f"{', '.join(unknown)} as well, for which it has no token. Train on all languages "
            f"(--train-domain {','.join([*learnt, *unknown])}), or leave the others out of the "
            f"data (--domains {' '.join(learnt)})."
        )


def translator_config(size: str, tokenizer: Any) -> Any:
    """The configuration of a translator.

    Args:
        size: one of `SIZES`.
        tokenizer: for its number of tokens and its special ones.
    """
    from transformers import MarianConfig

    shape = SIZES[size]
    width, ffn, layers = shape["d_model"], shape["ffn"], shape["layers"]
    return MarianConfig(
        vocab_size=len(tokenizer),
        decoder_vocab_size=len(tokenizer),
        max_position_embeddings=POSITIONS,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        activation_function="relu",
        dropout=shape["dropout"],
        # of square matrices what Glorot's rule says, and of the scaled embeddings 1
        init_std=width**-0.5,
        scale_embedding=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
