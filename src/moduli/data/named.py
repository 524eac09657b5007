"""Tasks that have a name: what is fetched for them, and the rows they are made of.

sentiment    sentences that people rated, in four domains
emoji        pictures of the same concepts by many vendors; what group a concept belongs to
brown        the documents of the Brown corpus, by genre, to learn the language of
brown-pos    its sentences, with a part of speech for every word
debian-descriptions    what packages of Debian are for, from English into other languages
debian-sentences       sentences of their longer descriptions
wesnoth                dialogues of a game, with a campaign to test on
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moduli.data.kinds import data_kind
from moduli.data.media import image_cell
from moduli.data.rows import Row
from moduli.data.sentiment import DOMAINS, LABEL_NAMES, sentiment_rows
from moduli.data.task import Splits
from moduli.data.translation import LANGUAGES, debian_rows, mark_hard, wesnoth_rows

_VENDORS_FIRST = "noto"


@dataclass(frozen=True)
class Content:
    """The rows of a task.

    Attributes:
        rows: all of them.
        label_names: in the order of their integers.
        domains: in the order to show them.
        usual: those of them that a task has where nobody says which; None: all.
    """

    rows: list[Row]
    label_names: tuple[str, ...]
    domains: tuple[str, ...]
    usual: tuple[str, ...] | None = None


Wanted = tuple[str, ...] | None
Read = Callable[..., Content]
"""From the directory of the package, and the domains asked for: rows of others may be left out."""


@dataclass(frozen=True)
class NamedTask:
    """A task that is known by name.

    Attributes:
        package: what `moduli.data.fetch` brings for it.
        kind: of the task.
        read: its rows, see `Read`.
        together: whether its domains are trained on together, where nobody says otherwise.
        add: from the domains with their splits, the same with what is known from all of them.
    """

    package: str
    kind: str
    read: Read
    together: bool = False
    add: Callable[[dict[str, Splits]], dict[str, Splits]] = lambda domains: domains


def _sentiment(directory: Path, wanted: Wanted = None) -> Content:
    return Content(sentiment_rows(directory), LABEL_NAMES, DOMAINS)


def _emoji(directory: Path, wanted: Wanted = None) -> Content:
    """A concept is a document, so those to be tested on are unseen in every vendor's style."""
    tables = {path.stem: _table(path) for path in sorted(directory.glob("*.parquet"))}
    groups = sorted({group for table in tables.values() for group in table["group"]})
    rows = []
    for vendor, table in tables.items():
        for image, group, point in zip(
            table["image"], table["group"], table["codepoint"], strict=True
        ):
            cell = image_cell(image, None)
            values = {"image": cell, "label": groups.index(group)}
            rows.append(Row(values, cell["digest"], domain=vendor, group=point))
    order = sorted(tables, key=lambda vendor: (vendor != _VENDORS_FIRST, vendor))
    return Content(rows, tuple(groups), tuple(order))


def _brown(directory: Path, wanted: Wanted = None) -> Content:
    """A row is a document, its sentences joined by line breaks."""
    table = _table(directory / "brown.parquet")
    texts: dict[str, list[str]] = {}
    genres: dict[str, str] = {}
    for text, genre, document in zip(table["text"], table["genre"], table["document"], strict=True):
        texts.setdefault(document, []).append(text)
        genres[document] = genre
    kind = data_kind("language-modeling")
    rows = []
    for document, sentences in texts.items():
        values: dict[str, Any] = {"text": "\n".join(sentences)}
        rows.append(Row(values, kind.content(values), domain=genres[document], group=document))
    return Content(rows, (), _genres(table))


def _brown_pos(directory: Path, wanted: Wanted = None) -> Content:
    """A row is a sentence.

    Sentences of one document stay together. A short sentence that several documents have ("Yes .")
    does not tie these documents to each other.
    """
    table = _table(directory / "brown.parquet")
    tags = [[_base(tag) for tag in sentence] for sentence in table["tags"]]
    names = sorted({tag for sentence in tags for tag in sentence})
    number = {name: i for i, name in enumerate(names)}
    kind = data_kind("token-classification")
    rows = []
    for words, sentence, genre, document in zip(
        table["tokens"], tags, table["genre"], table["document"], strict=True
    ):
        values = {"tokens": words, "tags": [number[tag] for tag in sentence]}
        content = f"{document}\n{kind.content(values)}"
        rows.append(Row(values, content, domain=genre, group=document))
    return Content(rows, tuple(names), _genres(table))


def _base(tag: str) -> str:
    """The word's own tag: without negation, contraction, and where the word stands (title, ...)."""
    return tag.split("-")[0].split("+")[0].rstrip("*") or tag


def _genres(table: dict[str, list[Any]]) -> tuple[str, ...]:
    """In the corpus's own order, press first."""
    return tuple(dict.fromkeys(table["genre"]))


def _debian(part: str) -> Read:
    def read(directory: Path, wanted: Wanted = None) -> Content:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        file = directory / "debian-descriptions.parquet"
        table = pq.read_table(file, filters=[("part", "=", part)])
        known = table["language"].unique().to_pylist()
        chosen = pc.field("language").isin(list(wanted or LANGUAGES))
        return _languages(debian_rows(table.filter(chosen).to_pydict()), known)

    return read


def _wesnoth(directory: Path, wanted: Wanted = None) -> Content:
    table = _table(directory / "wesnoth.parquet")
    return _languages(wesnoth_rows(table, wanted or LANGUAGES), table["language"])


def _languages(rows: list[Row], known: Iterable[str]) -> Content:
    return Content(rows, (), (*LANGUAGES, *sorted(set(known) - set(LANGUAGES))), LANGUAGES)


def _table(path: Path) -> dict[str, list[Any]]:
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    return columns


NAMED: dict[str, NamedTask] = {
    "sentiment": NamedTask("sentiment", "classification", _sentiment),
    "emoji": NamedTask("emoji", "image-classification", _emoji),
    "brown": NamedTask("brown", "language-modeling", _brown),
    "brown-pos": NamedTask("brown", "token-classification", _brown_pos),
    "debian-descriptions": NamedTask(
        "debian-descriptions", "translation", _debian("short"), together=True, add=mark_hard
    ),
    "debian-sentences": NamedTask(
        "debian-descriptions", "translation", _debian("sentence"), together=True
    ),
    "wesnoth": NamedTask("wesnoth", "translation", _wesnoth, together=True),
}
