"""A tokenizer of one's own: byte-level BPE, trained on given texts.

Every byte is a token, so that no text is unknown; merges add the frequent ones. A text begins with
`<|endoftext|>`, from which its first token is predicted too, so that bits per byte count all bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moduli.errors import ConfigError

END, PAD = "<|endoftext|>", "<|pad|>"
SMALLEST = 256 + 2  # every byte, and the two above


def require_room(vocab_size: int) -> None:
    """Raise if not even the single bytes have room.

    Raises:
        ConfigError: they have not.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(
            f"vocab_size is {vocab_size}; bytes and special tokens alone are {SMALLEST}, give that "
            "or more."
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A fast tokenizer of transformers; `save_pretrained` writes an ordinary one.

    Args:
        texts: to learn merges from; rows to be tested on do not belong here.
        vocab_size: tokens at most; texts with few different words make fewer.

    Raises:
        ConfigError: not even the single bytes have room.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    require_room(vocab_size)
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD)
