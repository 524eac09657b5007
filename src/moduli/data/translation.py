"""Tasks of translation from English: their rows, and what of a test is hard.

A row begins with the language to translate into, ">>cs<< text file viewer", so that one model can
learn several. Every language is a domain. A text of which any sentence is to be tested on is in
training for no language.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moduli.data.cells import same_text
from moduli.data.rows import Row
from moduli.data.task import Splits

if TYPE_CHECKING:
    from datasets import Dataset

LANGUAGES = ("es", "cs", "ru", "pl")
"""Those that are learnt where nobody says otherwise: in Debian they have few rows each."""
HELD_OUT = "ttb"
"""The campaign of Wesnoth to be tested on, "A Tale of Two Brothers"."""
HARD = "hard"
"""Domain of the test rows that resemble no row of training, of all languages."""

TAG = re.compile(r">>(\S+)<<\s*")


def tagged(language: str, text: str) -> str:
    """The text with the language it is to be translated into before it."""
    return f">>{language}<< {text}"


def language_of(source: str) -> str | None:
    """The language that a tagged text is to be translated into, or None without a tag."""
    found = TAG.match(source)
    return None if found is None else found[1]


def debian_rows(table: dict[str, list[Any]], part: str) -> list[Row]:
    """Rows of `debian-descriptions.parquet`; a project (its source packages) is a document.

    Args:
        table: columns as `moduli.data.convert.debian` writes them.
        part: "short" or "sentence".
    """
    columns = (table[name] for name in ("source", "target", "language", "project", "part"))
    return [
        Row(_values(a, b, language), same_text(a), domain=language, group=project)
        for a, b, language, project, its in zip(*columns, strict=True)
        if its == part
    ]


def wesnoth_rows(table: dict[str, list[Any]]) -> list[Row]:
    """Rows of `wesnoth.parquet`; a message is a document, and one campaign is for testing.

    Args:
        table: columns as `moduli.data.convert.wesnoth` writes them.
    """
    columns = (table[name] for name in ("source", "target", "language", "campaign", "message"))
    return [
        Row(
            _values(a, b, language),
            same_text(a),
            domain=language,
            group=f"{campaign} {message}",
            split="test" if campaign == HELD_OUT else None,
        )
        for a, b, language, campaign, message in zip(*columns, strict=True)
    ]


def _values(source: str, target: str, language: str) -> dict[str, Any]:
    return {"source": tagged(language, source), "target": target}


def core(source: str) -> str:
    """What a description is about, without tag, brackets, and what follows a dash.

    Many descriptions are made from one pattern: "KDE calendar (data)" and "KDE calendar -
    development files" are both "kde calendar".
    """
    text = re.sub(r"\s*\([^)]*\)", "", TAG.sub("", source))
    return same_text(re.split(r"\s-+\s", text)[0])


def with_hard_part(domains: dict[str, Splits]) -> dict[str, Splits]:
    """The domains, and one more for testing: test rows whose `core` no training row has.

    Args:
        domains: of the languages that are learnt together.
    """
    from datasets import concatenate_datasets

    known = set(_cores(splits.train for splits in domains.values()))
    tests = [splits.test for splits in domains.values() if splits.test is not None]
    if not tests:
        return domains
    test = concatenate_datasets(tests)
    hard = [i for i, its in enumerate(_cores([test])) if its not in known]
    return domains | {HARD: Splits(None, None, test.select(hard))} if hard else domains


def _cores(tables: Iterable[Dataset | None]) -> list[str]:
    return [core(source) for table in tables if table is not None for source in table["source"]]
