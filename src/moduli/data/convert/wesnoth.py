"""Dialogues of the game Battle for Wesnoth and their translations as a table of parallel text."""

from __future__ import annotations

import gettext
import re
from pathlib import Path

from moduli.data.convert.parallel import sentence_pairs
from moduli.data.convert.tables import write_table
from moduli.errors import FetchError

_FORMAT = re.compile(r"[<>$|{}]")  # markup, variables and what the game replaces


def wesnoth_to_table(source: Path, out: Path) -> None:
    """Write messages of campaigns to `wesnoth.parquet`, a row for every pair of sentences.

    Columns: `source` (English), `target`, `language` ("cs", ...), `campaign` ("ttb", ...) and
    `message` (the number of the message in the campaign that the sentence is from; the same in
    all languages). Messages with markup or variables are left out, and which sentences are kept
    says `sentence_pairs`. Rows are in order of language, campaign and message.

    Args:
        source: a directory per campaign with a catalogue of gettext per language,
            `LANGUAGE.mo`, and with the package's `copyright` in `CAMPAIGN.copyright`, which is
            copied.
        out: an existing directory.

    Raises:
        FetchError: a catalogue cannot be read.
    """
    rows: list[tuple[str, str, str, str, int]] = []
    for directory in (path for path in source.iterdir() if path.is_dir()):
        catalogues = {path.stem: _messages(path) for path in directory.glob("*.mo")}
        texts = sorted({text for messages in catalogues.values() for text in messages})
        numbers = {text: number for number, text in enumerate(texts)}
        for language, messages in catalogues.items():
            for text, translated in messages.items():
                if _FORMAT.search(text + translated):
                    continue
                for a, b in sentence_pairs(_said(text), _said(translated)):
                    rows.append((a, b, language, directory.name, numbers[text]))
    rows.sort(key=lambda row: (row[2], row[3], row[4]))
    names = ("source", "target", "language", "campaign", "message")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    write_table(out / "wesnoth.parquet", columns)
    for path in source.glob("*.copyright"):
        (out / path.name).write_bytes(path.read_bytes())


def _messages(path: Path) -> dict[str, str]:
    """The translated messages of a catalogue of gettext; without its header, and plurals."""
    try:
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)
    except (OSError, UnicodeError, ValueError, IndexError) as error:
        name = f"{path.parent.name}/{path.name}"
        raise FetchError(f"{name} cannot be read as a catalogue of gettext: {error}") from error
    # gettext has no public way to list what is in a catalogue
    entries: dict[object, str] = catalogue._catalog  # type: ignore[attr-defined]
    return {
        text: translated
        for text, translated in entries.items()
        if isinstance(text, str) and text and translated
    }


def _said(text: str) -> str:
    """A message without the note for translators before a circumflex."""
    return text.rpartition("^")[2]
