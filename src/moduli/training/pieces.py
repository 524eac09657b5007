"""A tokenizer for translation: pieces of words of all languages, and a token for each language.

Pieces are learnt by SentencePiece's unigram model, whose result is the same every time; what is
written is an ordinary fast tokenizer, which needs neither SentencePiece nor moduli. Every character
of the texts is a piece, so that they come back as they were (but for Unicode's composed form).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

from moduli.data.translation import TAG, language_of, tagged
from moduli.errors import DataError

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
LONGEST_LINE = 1 << 20  # bytes; SentencePiece leaves out longer texts without a word


def train_pieces(sources: Sequence[str], targets: Iterable[str], vocab_size: int) -> Any:
    """A fast tokenizer of transformers for both sides; `save_pretrained` writes an ordinary one.

    A text ends with `</s>`; a language tag before a source (">>cs<<") is one token.

    Args:
        sources: to learn pieces from, without their tags; rows to be tested on do not belong here.
        targets: the same.
        vocab_size: pieces, beside the tags: fewer for few texts, and at least twice as many as
            there are characters.

    Raises:
        DataError: the texts are empty.
    """
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    texts = [unicodedata.normalize("NFC", text) for text in (*map(_untagged, sources), *targets)]
    characters = {character for text in texts for character in text}
    if not characters - {" "}:
        raise DataError("There is no text to learn a tokenizer from.")
    written = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        model_type="unigram",
        vocab_size=max(vocab_size, 2 * len(characters)),
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        max_sentence_length=LONGEST_LINE,
        num_threads=1,  # sums in one order
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        pad_piece=PAD, eos_piece=END, unk_piece=UNKNOWN,
        minloglevel=2,
    )  # fmt: skip
    learnt = SentencePieceProcessor(model_proto=written.getvalue())
    pieces = [(learnt.id_to_piece(i), learnt.get_score(i)) for i in range(learnt.get_piece_size())]
    tokenizer: Any = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    languages = sorted({found for source in sources if (found := language_of(source))})
    tokenizer.add_special_tokens(
        [
            AddedToken(tagged(language, "").strip(), rstrip=True, special=True)
            for language in languages
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, 1)]
    )
    made: Any = PreTrainedTokenizerFast
    return made(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
    )


def tags_of(tokenizer: Any) -> list[str]:
    """The languages that a tokenizer has a tag for, or none if its models take texts without."""
    tokens: dict[str, int] = tokenizer.get_vocab()
    return sorted(found for token in tokens if (found := language_of(token)) is not None)


def _untagged(source: str) -> str:
    return TAG.sub("", source, count=1)
