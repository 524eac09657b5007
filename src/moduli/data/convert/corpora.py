"""Two collections of English text as tables: the Brown corpus and the State of the Union."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from moduli.data.convert.tables import write_table
from moduli.errors import FetchError


def brown_to_table(source: Path, out: Path) -> None:
    """Write the Brown corpus to `brown.parquet`, a row for every sentence.

    Columns: `text` (the tokens joined by spaces: the corpus says no more of spacing), `tokens`,
    `tags` (the corpus's own part-of-speech tags, such as `np-tl`; the part before `-` or `+` is
    the word's own), `genre` (15) and `document` (500, such as `ca01`). Rows are in the order of
    the documents and sentences; documents, not sentences, are what a split should keep apart.

    Args:
        source: directory with `cats.txt` (document and genre) and the documents in `texts/`, a
            sentence a line and `token/tag` in it; the corpus's `README` is copied.
        out: an existing directory.

    Raises:
        FetchError: a document has no genre, or a token no tag.
    """
    lines = (source / "cats.txt").read_text(encoding="utf-8").splitlines()
    genres = dict(line.split() for line in lines if line.strip())
    columns: dict[str, list[Any]] = {
        name: [] for name in ("text", "tokens", "tags", "genre", "document")
    }
    for path in sorted((source / "texts").iterdir()):
        if path.name not in genres:
            raise FetchError(f"The document {path.name} has no genre in cats.txt.")
        for line in path.read_text(encoding="utf-8").splitlines():
            # a token may have a slash of its own, so the tag is what follows the last
            pairs = [item.rpartition("/")[::2] for item in line.split()]
            if not pairs:
                continue
            if not all(token and tag for token, tag in pairs):
                raise FetchError(f"A token of {path.name} has no tag: {line.strip()!r}.")
            tokens, tags = (list(part) for part in zip(*pairs, strict=True))
            values = (" ".join(tokens), tokens, tags, genres[path.name], path.name)
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
    write_table(out / "brown.parquet", columns)
    shutil.copyfile(source / "README", out / "README")


def sotu_to_table(source: Path, out: Path) -> None:
    """Write the State of the Union addresses to `sotu.parquet`, a row for every speech.

    Columns: `text`, `year` (a whole number), `president` and `party` (in full, or "none").
    Rows are in order of year and president. A year of two presidents has two speeches.

    Args:
        source: directory with one JSON file per speech in `speeches/`; other files are copied.
        out: an existing directory.
    """
    speeches = [
        json.loads(path.read_text(encoding="utf-8")) for path in (source / "speeches").iterdir()
    ]
    speeches.sort(key=lambda speech: (speech["year"], speech["name"]))
    columns = {
        "text": [speech["text"] for speech in speeches],
        "year": [speech["year"] for speech in speeches],
        "president": [speech["name"] for speech in speeches],
        "party": [speech["party"] for speech in speeches],
    }
    write_table(out / "sotu.parquet", columns)
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, out / path.name)
