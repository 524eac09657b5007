"""Tasks of translation from English: their rows, and what of a test is hard.

A row begins with the language to translate into, ">>cs<< text file viewer", so that one model can
learn several. Every language is a domain. The split is that of the English side: what is tested on
in one language is in training for none.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
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
STRICTEST = ("test", "validation", "train")
"""Which split keeps a text of Wesnoth that several have."""
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
    """Rows of `debian-descriptions.parquet`; a project lies in one split.

    Texts that projects of several splits share are left out.

    Args:
        table: columns as `moduli.data.convert.debian` writes them, of some languages.
    """
    rows = []
    columns = (table[name] for name in ("source", "target", "language", "projects"))
    for a, b, language, projects in zip(*columns, strict=True):
        splits = {split_of(project) for project in projects.split(" ")}
        if len(splits) == 1:
            rows.append(Row(_values(a, b, language), same_text(a), language, None, splits.pop()))
    return rows


def wesnoth_rows(table: Columns, languages: Collection[str]) -> list[Row]:
    """Rows of `wesnoth.parquet`; a message lies in one split, and one campaign is for testing.

    What messages of several splits say, in whatever language they were translated, is kept in the
    test, else in the validation rows only.

    Args:
        table: columns as `moduli.data.convert.wesnoth` writes them, of all languages.
        languages: whose rows to return.
    """
    homes: dict[str, set[str]] = defaultdict(set)
    found = []
    columns = (table[name] for name in ("source", "target", "language", "campaign", "message"))
    for a, b, language, campaign, message in zip(*columns, strict=True):
        text, split = same_text(a), "test"
        if campaign != HELD_OUT:
            split = "train" if split_of(f"{campaign} {message}") == "train" else "validation"
        homes[text].add(split)
        if language in languages:
            found.append(Row(_values(a, b, language), text, language, None, split))
    return [row for row in found if row.split == min(homes[row.content], key=STRICTEST.index)]


def split_of(document: str) -> str:
    """The split of a document: the same one whichever languages are learnt, and for everybody."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    return "test" if share < TEST else "validation" if share < TEST + VALIDATION else "train"


def _values(source: str, target: str, language: str) -> dict[str, Any]:
    return {"source": tagged(language, source), "target": target}


def core(source: str) -> str:
    """What a description is about, without tag, brackets, and what follows a dash or a colon.

    Many descriptions are made from one pattern: "KDE calendar (data)", "KDE calendar: icons" and
    "KDE calendar - development files" are all "kde calendar".
    """
    text = re.sub(r"\s*\([^)]*\)", "", TAG.sub("", source))
    return same_text(re.split(r"\s[-–—]+\s|:\s", text)[0])


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
