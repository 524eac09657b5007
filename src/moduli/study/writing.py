"""What a language model writes on from a text, with the probability of every token it chose.

Texts are continued one after the other, so that each is written as if it was alone, and can be
shown while it grows.
    N new tokens, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moduli.errors import CheckpointError, ConfigError
from moduli.training.batches import use_padding

KINDS = ("language-modeling", "seq2seq", "translation")


@dataclass(frozen=True)
class WritingSettings:
    """How tokens are chosen.

    Raises:
        ConfigError: a value that cannot work.
    """

    max_new_tokens: int = 100
    """Tokens at most; fewer where the model ends the text."""
    temperature: float | None = None
    """Logits are divided by it before a token is drawn; 0: always the likeliest token. Default:
    0.8, and 0 with --beams."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0: from all."""
    beams: int = 1
    """Search for the likeliest text along so many; it is shown when it is complete."""
    seed: int = 0
    """Of what is drawn."""
    cache: bool = True
    """Keep keys and values of earlier tokens instead of computing them again."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "beams"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it has to be 1 or more.")
        if self.temperature is not None and self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}; it has to be 0 or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: a probability, above 0 and at most 1.")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; give 1 or more, or 0 for all tokens.")

    @property
    def drawn_at(self) -> float:
        """The temperature, 0 if nothing is drawn."""
        if self.temperature is not None:
            return self.temperature
        return 0.8 if self.beams == 1 else 0.0

    def arguments(self) -> dict[str, Any]:
        """For `generate` of transformers."""
        found: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.beams,
            "use_cache": self.cache,
            "do_sample": self.drawn_at > 0,
        }
        if self.drawn_at > 0:
            found |= {"temperature": self.drawn_at, "top_p": self.top_p, "top_k": self.top_k}
        return found


@dataclass(frozen=True)
class Written:
    """What was written on from one text."""

    text: str
    continuation: str
    tokens: tuple[str, ...]
    """N, the ends of texts among them."""
    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    """Of the chosen tokens by the model itself: before temperature, top-p and top-k. Nats."""


def load_writer(name: str) -> tuple[Any, Any]:
    """A model that writes, and its tokenizer.

    Args:
        name: a directory, modular ones included, or what `moduli fetch` or the hub knows.

    Raises:
        CheckpointError: no such model, no language model, or one without a tokenizer.
    """
    from moduli.study import tuned
    from moduli.surgery.files import MARKER

    kind = tuned.model_kind(name)
    if kind is None or kind.name not in KINDS:
        if kind is None:  # there may be no model at all, which loading says best
            tuned.load_any(name)
        what = "no model that writes" if kind is None else f"{kind.noun}, which writes nothing"
        raise CheckpointError(
            f"{name} is {what}; give a language model (`moduli pretrain` makes one) or a model "
            "from text to text."
        )
    directory = Path(name)
    modular = (directory / MARKER).is_file() or _splits(directory)
    model, tokenizer = tuned.load_tuned(name, kind, dense=not modular)
    return model.eval(), tokenizer


def write_on(
    model: Any,
    tokenizer: Any,
    text: str,
    settings: WritingSettings,
    *,
    on_text: Callable[[str], None] | None = None,
) -> Written:
    """Continue a text.

    Args:
        model: of `load_writer`.
        tokenizer: of it.
        text: to write on from; what a model from text to text starts from.
        settings: how tokens are chosen.
        on_text: called with every piece of text as soon as it is certain; with beams, at the end.

    Raises:
        ConfigError: the text has no tokens, or does not fit the model's positions.
    """
    use_padding(model, tokenizer)
    inputs = tokenizer([text], return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    length = inputs["input_ids"].shape[1]
    if not text or not length:
        raise ConfigError("The text is empty; give at least a word to write on from.")
    separate = bool(model.config.is_encoder_decoder)
    _require_room(model, length, settings.max_new_tokens, separate)
    streamed = on_text is not None and settings.beams == 1
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(settings.seed)
        found = model.generate(
            **inputs,
            **settings.arguments(),
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
            streamer=_streamer(tokenizer, on_text) if streamed else None,
        )
    start = found.sequences.shape[1] - len(found.logits) if separate else length
    ids = found.sequences[0, start:]
    continuation = tokenizer.decode(ids, skip_special_tokens=True)
    if on_text is not None and not streamed:
        on_text(continuation)
    chosen = ids.tolist()
    return Written(
        text=text,
        continuation=continuation,
        tokens=tuple(tokenizer.decode([one]) for one in chosen),
        ids=tuple(chosen),
        log_probabilities=tuple(_log_probabilities(found, ids)),
    )


def _log_probabilities(found: Any, ids: Tensor) -> list[float]:
    """Of the chosen tokens. With beams, every step has a row of logits for each of them."""
    rows = getattr(found, "beam_indices", None)
    values = []
    for step, (token, logits) in enumerate(zip(ids.tolist(), found.logits, strict=False)):
        row = 0 if rows is None else int(rows[0, step])
        values.append(float(logits[row].float().log_softmax(-1)[token]))
    return values


def _streamer(tokenizer: Any, on_text: Callable[[str], None] | None) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """The stock one, which knows when a word is certain, with another place to write to."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None and text:
                on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _require_room(model: Any, length: int, new: int, separate: bool) -> None:
    """Raise where a table of positions ends, instead of an index error in the middle."""
    positions = getattr(model.config, "max_position_embeddings", None)
    taken = 1 if separate else length
    if positions is not None and taken + new > positions:
        raise ConfigError(
            f"The text has {length} tokens and the model {positions} positions; "
            f"max_new_tokens is {new}, at most {max(0, positions - taken)} fit."
        )


def _splits(directory: Path) -> bool:
    """Whether the weights of a directory are those of a split model, saved bare."""
    from transformers import AutoConfig

    return directory.is_dir() and hasattr(AutoConfig.from_pretrained(directory), "moduli")
