"""Tasks of translation from English: their rows, and what of a test is hard.

A row begins with the language to translate into, ">>cs<< text file viewer", so that one model can
learn several. Every language is a domain. The split is that of the English side: what is tested on
in one language is in training for none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from moduli.data.cells import same_text
from moduli.data.rows import Row
from moduli.data.task import Splits

LANGUAGES = ("es", "cs", "ru", "pl")
"""Those that are learnt where nobody says otherwise: in Debian they have few rows each."""
HELD_OUT = "ttb"
"""The campaign of Wesnoth to be tested on, "A Tale of Two Brothers"."""
TEST, VALIDATION = 0.1, 0.05
"""Shares of the projects; of Wesnoth's other campaigns, both are for validation."""
HARD = "hard"
"""Column of test rows: whether a row resembles no row of training in any language."""

Columns = Mapping[str, list[Any]]
TAG = re.compile(r">>(\S+)<<\s*")


def tagged(language: str, text: str) -> str:
    """The text with the language it is to be translated into before it."""
    return f">>{language}<< {text}"


def language_of(source: str) -> str | None:
    """The language that a tagged text is to be translated into, or None without a tag."""
    found = TAG.match(source)
    return None if found is None else found[1]


def debian_rows(table: Columns) -> list[Row]:
    """Rows of `debian-descriptions.parquet`; a project is a document, and lies in one split.

    Args:
        table: columns as `moduli.data.convert.debian` writes them, of some languages.
    """
    columns = (table[name] for name in ("source", "target", "language", "project"))
    return [
        Row(_values(a, b, language), same_text(a), language, project, split_of(project))
        for a, b, language, project in zip(*columns, strict=True)
    ]


def wesnoth_rows(table: Columns, languages: Collection[str]) -> list[Row]:
    """Rows of `wesnoth.parquet`; a message is a document, and one campaign is for testing.

    What is said in that campaign, in any language, is left out of the others.

    Args:
        table: columns as `moduli.data.convert.wesnoth` writes them, of all languages.
        languages: whose rows to return.
    """
    spoken = zip(table["source"], table["campaign"], strict=True)
    held_out = {same_text(source) for source, campaign in spoken if campaign == HELD_OUT}
    columns = (table[name] for name in ("source", "target", "language", "campaign", "message"))
    rows = []
    for a, b, language, campaign, message in zip(*columns, strict=True):
        if language not in languages:
            continue
        document, text, split = f"{campaign} {message}", same_text(a), "test"
        if campaign != HELD_OUT:
            if text in held_out:
                continue
            split = "train" if split_of(document) == "train" else "validation"
        rows.append(Row(_values(a, b, language), text, language, document, split))
    return rows


def split_of(document: str) -> str:
    """The split of a document: the same one whichever languages are learnt, and for everybody."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    return "test" if share < TEST else "validation" if share < TEST + VALIDATION else "train"


def _values(source: str, target: str, language: str) -> dict[str, Any]:
    return {"source": tagged(language, source), "target": target}


def core(source: str) -> str:
    """What a description is about, without tag, brackets, and what follows a dash.

    Many descriptions are made from one pattern: "KDE calendar (data)" and "KDE calendar -
    development files" are both "kde calendar".
    """
    text = re.sub(r"\s*\([^)]*\)", "", TAG.sub("", source))
    return same_text(re.split(r"\s-+\s", text)[0])


def mark_hard(domains: dict[str, Splits]) -> dict[str, Splits]:
    """The domains, with a column `HARD` in their tests: no training row has the row's `core`.

    Args:
        domains: of the languages that are learnt together.
    """
    tables = [splits.train for splits in domains.values() if splits.train is not None]
    known = {core(source) for table in tables for source in table["source"]}
    marked = {}
    for name, splits in domains.items():
        if (test := splits.test) is not None:
            test = test.add_column(HARD, [core(source) not in known for source in test["source"]])
        marked[name] = replace(splits, test=test)
    return marked
