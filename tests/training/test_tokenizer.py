"""A tokenizer made of texts is an ordinary fast one, loses nothing, and keeps to its size."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moduli.errors import ConfigError
from moduli.training.tokenizer import END, PAD, SMALLEST, train_tokenizer

TEXTS = ["the horse and the house", "the mouse in the house"] * 3
TOKENIZER = train_tokenizer(TEXTS, 280)


@given(st.text())
@settings(deadline=None, max_examples=50)
def test_every_text_comes_back(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(ids[1:]) == text


def test_frequent_words_are_one_token_and_special_ones_have_their_ids() -> None:
    assert TOKENIZER.tokenize(" the house") == ["Ġthe", "Ġhouse"]
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token) == (END, PAD)
    assert (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (0, 1)
    assert len(TOKENIZER) <= 280


def test_it_is_saved_as_an_ordinary_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "a mouse, ümlauts and 漢字"
    assert again(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert again.pad_token_id == TOKENIZER.pad_token_id


def test_the_same_texts_make_the_same_tokenizer() -> None:
    assert train_tokenizer(TEXTS, 280).get_vocab() == TOKENIZER.get_vocab()


def test_bytes_alone_need_room() -> None:
    assert len(train_tokenizer(TEXTS, SMALLEST)) == SMALLEST
    with pytest.raises(ConfigError, match=f"{SMALLEST}"):
        train_tokenizer(TEXTS, 100)
