"""What stands in one cell of a table: texts, words, labels, numbers, and how each is read.

A cell that cannot be read raises `ValueError` with the end of a sentence, "column 'x' holds int at
row 3 (7), ...", because only the caller knows the column and the row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moduli.data.media import audio_cell, image_cell


@dataclass(frozen=True)
class Cell:
    """One column of a task.

    Attributes:
        name: of the column in the task.
        option: the field of `DataOptions` that names the column of the file.
        what: the word for its content in messages.
        read: the content from the value in the file and the folder of the file.
        empty: whether there is nothing in the cell.
        key: the content as it counts for repetition, for inputs.
    """

    name: str
    option: str
    what: str
    read: Callable[[Any, Path | None], Any]
    empty: Callable[[Any], bool]
    key: Callable[[Any], str] = str


def nothing(value: Any) -> bool:
    """Nothing in this cell: None, NaN or white space."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and not value.strip()


def no_label(value: Any) -> bool:
    """Nothing, or the word that tables write for nothing."""
    return nothing(value) or (isinstance(value, str) and value.strip().lower() == "nan")


def _absent(value: Any) -> bool:
    """Only None: an empty list, or an empty cell, says that no label applies."""
    return value is None


def _no_words(value: Any) -> bool:
    return nothing(value) or (isinstance(value, (list, tuple)) and not value)


def _text(value: Any, _folder: Path | None) -> str:
    if not isinstance(value, str):
        raise ValueError("not text")
    return value


def same_text(text: str | None) -> str:
    """The text as it counts for repetition: case and white space do not make another text."""
    return " ".join((text or "").casefold().split())


def _class(value: Any, _folder: Path | None) -> str | int | float:
    """A label as read: words stripped, whole numbers as int."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return str(value).strip()


def _number(value: Any, _folder: Path | None) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError("not a number") from None
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def _items(value: Any, what: str) -> list[Any]:
    """The items of a list, or of a text that is a JSON list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"a list of {what} that is not closed or not JSON") from None
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"not a list of {what}")
    return list(value)


def _labels(value: Any, _folder: Path | None) -> list[Any] | str:
    """A list of labels; a text with several is cut later, when the whole column is known."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return "" if value.strip().lower() == "nan" else value
    return [_class(item, None) for item in _items(value, "labels")]


def _words(value: Any, _folder: Path | None) -> list[str]:
    """A list of words, or a text with white space between them."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return value.split()
    words = _items(value, "words")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError("a list with something else than words in it")
    return words


def _tags(value: Any, _folder: Path | None) -> list[Any]:
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return list(value.split())
    return [_class(item, None) for item in _items(value, "tags")]


def _content_digest(cell: dict[str, Any]) -> str:
    return str(cell["digest"])


TEXT = Cell("text", "text_column", "text", _text, nothing, same_text)
PAIR = Cell("text_pair", "text_pair_column", "text", _text, nothing, same_text)
SOURCE = Cell("source", "source_column", "text", _text, nothing, same_text)
TARGET = Cell("target", "target_column", "text", _text, nothing)
TOKENS = Cell(
    "tokens", "tokens_column", "words", _words, _no_words, lambda words: same_text(" ".join(words))
)
TAGS = Cell("tags", "tags_column", "tags", _tags, _no_words)
IMAGE = Cell("image", "image_column", "image", image_cell, nothing, _content_digest)
AUDIO = Cell("audio", "audio_column", "sound", audio_cell, nothing, _content_digest)
CLASS = Cell("label", "label_column", "label", _class, no_label)
LABELS = Cell("label", "label_column", "label", _labels, _absent)
NUMBER = Cell("label", "label_column", "label", _number, no_label)
