"""Descriptions of Debian packages and their translations as a table of parallel text.

A description has a line of its own, the short one, and paragraphs. A translation names the English
description that it belongs to by an MD5.
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from moduli.data.cells import same_text
from moduli.data.convert.parallel import one_line, sentence_pairs
from moduli.data.convert.tables import write_table
from moduli.errors import FetchError

Stanza = dict[str, list[str]]
"""The fields of a package: the value, and lines that continue it as they are."""

_ITEM = re.compile(r" {2}|\s*[-*+•]\s")  # a line of a list or set as it is
_ITEM_O = re.compile(r"\s*o\s")  # in English; other languages have it as a word


def debian_descriptions_to_table(source: Path, out: Path) -> None:
    """Write descriptions and translations to `debian-descriptions.parquet`, a row for every pair.

    Columns: `source` (English), `target`, `language` ("cs", ...), `part` ("short" for the line
    that names a package's purpose, "sentence" for those of its paragraphs), `package` (the first
    that has this description) and `projects` (`project_of` the source packages of all that have
    this English text in any description, with spaces between them; the same in every language).
    Equal pairs are there once per language and part; short ones that were not
    translated are left out, and which sentences are kept says `sentence_pairs`: of paragraphs
    where both sides have equally many, without lists. Rows are in order of language, part, and
    package.

    Args:
        source: directory with the lists `Translation-en`, `Translation-LANGUAGE` and `Packages`
            (which has the source packages), and with `InRelease`, which is copied: it says of
            which state of the release they are, with the hash of every list and a signature.
        out: an existing directory.

    Raises:
        FetchError: a list cannot be read.
    """
    english = _descriptions(source / "Translation-en", "en")
    origins = {
        stanza["Package"][0]: stanza.get("Source", stanza["Package"])[0].split()[0]
        for stanza in stanzas(source / "Packages")
    }
    rows: list[tuple[str, str, str, str, str]] = []
    owners: dict[str, set[str]] = defaultdict(set)
    for path in sorted(source.glob("Translation-*")):
        language = path.name.removeprefix("Translation-")
        if language == "en":
            continue
        seen: set[tuple[str, str, str]] = set()
        for md5, (_, lines) in _descriptions(path, language).items():
            if md5 not in english:
                continue  # of an older version of the package
            packages, original = english[md5]
            projects = {project_of(origins.get(package, package)) for package in packages}
            for part, a, b in _pairs(original, lines):
                owners[same_text(a)] |= projects
                if (part, a, b) not in seen:
                    seen.add((part, a, b))
                    rows.append((a, b, language, part, packages[0]))
    rows.sort(key=lambda row: (row[2], row[3] != "short", row[4], row[0], row[1]))
    names = ("source", "target", "language", "part", "package")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    columns["projects"] = [" ".join(sorted(owners[same_text(row[0])])) for row in rows]
    write_table(out / "debian-descriptions.parquet", columns)
    shutil.copyfile(source / "InRelease", out / "InRelease")


def project_of(package: str) -> str:
    """The name of a source package without versions: "gcc-12-cross-ports" is "gcc-cross-ports".

    Packages of one project, in whatever version, describe themselves in the same words.
    """
    parts = [re.sub(r"[\d.]+$", "", part) for part in package.casefold().split("-")]
    return "-".join(part for part in parts if part) or package.casefold()


def stanzas(path: Path) -> Iterator[Stanza]:
    """The packages of a list, one after the other.

    Raises:
        FetchError: a line is neither a field nor the continuation of one.
    """
    fields: Stanza = {}
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            line = line.rstrip("\n")
            name, colon, value = line.partition(":")
            if not line:
                if fields:
                    yield fields
                fields, lines = {}, []
            elif line[0] in " \t" and fields:
                lines.append(line)
            elif colon and line[0] not in " \t":
                lines = fields[name] = [value.strip()]
            else:
                raise FetchError(f"{path.name} is no list of packages: line {number} is {line!r}.")
    if fields:
        yield fields


def _descriptions(path: Path, language: str) -> dict[str, tuple[list[str], list[str]]]:
    """By MD5 of the English, the packages that have it and the lines of the description."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for stanza in stanzas(path):
        try:
            (md5,), lines = stanza["Description-md5"], stanza[f"Description-{language}"]
            found.setdefault(md5, ([], lines))[0].append(stanza["Package"][0])
        except (KeyError, ValueError):
            raise FetchError(
                f"{path.name} is no list of descriptions in {language!r}: a package of it has the "
                f"fields {', '.join(stanza)}."
            ) from None
    return found


def _pairs(original: list[str], translated: list[str]) -> Iterator[tuple[str, str, str]]:
    """What corresponds in a description and its translation: (part, English, translation)."""
    short = one_line(original[0]), one_line(translated[0])
    if all(short) and short[0] != short[1]:
        yield "short", *short
    one, other = _paragraphs(original[1:]), _paragraphs(translated[1:])
    if len(one) != len(other):
        return
    for a, b in zip(one, other, strict=True):
        is_list = any(map(_ITEM.match, (*a, *b))) or any(map(_ITEM_O.match, a))
        if not is_list:
            for pair in sentence_pairs("\n".join(a), "\n".join(b)):
                yield "sentence", *pair


def _paragraphs(lines: list[str]) -> list[list[str]]:
    """The lines of every paragraph; a line with nothing but a full stop separates them."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == ".":
            found.append([])
        else:
            found[-1].append(line)
    return found
