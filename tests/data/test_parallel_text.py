"""Parallel text: what is paired, what is left out, and that nothing to be tested on is learnt."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from moduli.data import Task
from moduli.data.convert import CONVERTERS
from moduli.data.convert.debian import project_of
from moduli.data.convert.parallel import sentence_pairs
from moduli.data.kinds import data_kind
from moduli.data.splits import split_rows
from moduli.data.task import DataOptions, Splits
from moduli.data.translation import (
    core,
    debian_rows,
    language_of,
    mark_hard,
    tagged,
    wesnoth_rows,
)
from moduli.errors import FetchError

ENGLISH = """\
Package: freecell
Description-md5: aaa
Description-en: patience game (data)
 A game of cards.  It is played
 alone, by one person!
 .
 Features:
  * cards as big as a window
 .
 There are two sentences here. Their translation has one.

Package: freecell-2
Description-md5: aaa
Description-en: patience game (data)
 A game of cards.

Package: libfreecell1
Description-md5: bbb
Description-en: patience game - shared library
 Never translated.
"""
CZECH = """\
Package: freecell
Description-md5: aaa
Description-cs: karetní hra
 Karetní hra pro volný čas. Hraje se
 o samotě, v jediné osobě!
 .
 Vlastnosti:
  * karty velké jako okno
 .
 Dvě věty původního textu, a tady jen jedna.

Package: libfreecell1
Description-md5: bbb
Description-cs: patience game - shared library
 Ještě nepřeloženo.

Package: gone
Description-md5: ccc
Description-cs: čeho v angličtině už není
"""
PACKAGES = """\
Package: freecell
Source: patience-2 (2:1.0-1)
Version: 1

Package: libfreecell1
Version: 1
"""


def lists(source: Path, **texts: str) -> None:
    (source / "InRelease").write_text("Codename: bookworm\n")
    given = {"Packages": PACKAGES, "Translation-en": ENGLISH, "Translation-cs": CZECH}
    for name, text in (given | {k.replace("_", "-"): v for k, v in texts.items()}).items():
        (source / name).write_text(text, encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    return Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache")).to_list()


def test_descriptions_are_paired_by_what_they_translate(places: tuple[Path, Path]) -> None:
    source, out = places
    lists(source)
    CONVERTERS["debian"](source, out)
    rows = read(out / "debian-descriptions.parquet")
    assert [(row["part"], row["source"], row["target"]) for row in rows] == [
        ("short", "patience game (data)", "karetní hra"),
        ("sentence", "A game of cards.", "Karetní hra pro volný čas."),
        ("sentence", "It is played alone, by one person!", "Hraje se o samotě, v jediné osobě!"),
        ("sentence", "Never translated.", "Ještě nepřeloženo."),
    ]
    assert {row["language"] for row in rows} == {"cs"}
    # the source package without its version; a package that no list knows is its own
    assert [row["projects"] for row in rows] == [
        "freecell patience",
        "freecell patience",
        "freecell patience",
        "libfreecell",
    ]
    assert rows[0]["package"] == "freecell"
    assert (out / "InRelease").read_text() == "Codename: bookworm\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("Translation_cs", "Package: a\nDescription-md5: x\nDescription-de: b\n", "in 'cs'"),
        ("Translation_cs", "<html>no list</html>\n", "line 1 is '<html>"),
        ("Packages", " a line that continues nothing\n", "line 1"),
    ],
)
def test_what_is_no_list_of_packages_is_refused(
    places: tuple[Path, Path], name: str, text: str, message: str
) -> None:
    source, out = places
    lists(source, **{name: text})
    with pytest.raises(FetchError, match=message):
        CONVERTERS["debian"](source, out)


def test_versions_do_not_make_another_project() -> None:
    assert project_of("gcc-12-cross-ports") == project_of("gcc-11-cross-ports")
    assert project_of("python3.11") == "python"
    assert project_of("0ad") == "0ad"
    assert project_of("2048") == "2048"


def test_sentences_are_paired_where_both_texts_have_equally_many() -> None:
    assert list(sentence_pairs("First one here. The second?", "Erster Satz hier. Der zweite?")) == [
        ("First one here.", "Erster Satz hier."),
        ("The second?", "Der zweite?"),
    ]
    assert list(sentence_pairs("One sentence in here.", "Zwei sind hier. Nicht nur einer.")) == []
    assert list(sentence_pairs("The same in both.", "The same in both.")) == []
    assert list(sentence_pairs("Too short", "Zu kurz, aber lang genug")) == []
    assert list(sentence_pairs("x" * 12, "y" * 40)) == []
    assert list(sentence_pairs("x" * 301, "y" * 300)) == []
    # no space after a full stop in Japanese
    assert len(list(sentence_pairs("a" * 15 + ". " + "b" * 15, "あ" * 12 + "。" + "い" * 12))) == 2


def catalogue(messages: dict[str, str]) -> bytes:
    """A compiled catalogue of gettext: a header of seven numbers, two tables, and the texts."""
    header = "Content-Type: text/plain; charset=UTF-8\n"
    pairs = sorted((k.encode(), v.encode()) for k, v in ({"": header} | messages).items())
    start = 28 + 16 * len(pairs)
    texts, tables = b"", ([], [])  # type: ignore[var-annotated]
    for side, table in zip((0, 1), tables, strict=True):
        for pair in pairs:
            table.append(struct.pack("<II", len(pair[side]), start + len(texts)))
            texts += pair[side] + b"\0"
    numbers = (0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return struct.pack("<7I", *numbers) + b"".join(tables[0]) + b"".join(tables[1]) + texts


def campaigns(source: Path) -> None:
    said = "We march at dawn, my friends. Be ready for it!"
    for campaign, messages in {
        "ttb": {said: "Vyrážíme za úsvitu. Buďte připraveni!", "Stay where you are.": "Ani hnout!"},
        "dm": {
            "Stay where you are.": "Zůstaň, kde jsi!",
            "name^The old mill at the river": "Starý mlýn u řeky",
            "<b>Bold words of a hero</b>": "<b>Smělá slova hrdiny</b>",
            "You have $gold gold pieces.": "Máte $gold zlatých.",
            "Nobody has translated this.": "",
        },
    }.items():
        (source / campaign).mkdir()
        (source / f"{campaign}.copyright").write_text("GPL-2+")
        (source / campaign / "cs.mo").write_bytes(catalogue(messages))


def test_messages_of_a_campaign_become_pairs_of_sentences(places: tuple[Path, Path]) -> None:
    source, out = places
    campaigns(source)
    CONVERTERS["wesnoth"](source, out)
    rows = read(out / "wesnoth.parquet")
    assert [(row["campaign"], row["source"], row["target"]) for row in rows] == [
        ("dm", "Stay where you are.", "Zůstaň, kde jsi!"),
        ("dm", "The old mill at the river", "Starý mlýn u řeky"),
        ("ttb", "Stay where you are.", "Ani hnout!"),
        ("ttb", "We march at dawn, my friends.", "Vyrážíme za úsvitu."),
        ("ttb", "Be ready for it!", "Buďte připraveni!"),
    ]
    assert rows[3]["message"] == rows[4]["message"] != rows[2]["message"]
    assert (out / "ttb.copyright").read_text() == "GPL-2+"
    (source / "dm" / "cs.mo").write_bytes(b"no catalogue at all")
    with pytest.raises(FetchError, match=r"dm/cs\.mo cannot be read"):
        CONVERTERS["wesnoth"](source, out)


def test_a_source_begins_with_its_language() -> None:
    assert tagged("pt_BR", "file viewer") == ">>pt_BR<< file viewer"
    assert language_of(">>pt_BR<< file viewer") == "pt_BR"
    assert language_of("file viewer") is None
    assert language_of("a >> b << c") is None


def test_a_core_is_without_the_pattern_a_description_is_made_by() -> None:
    assert core(">>cs<< KDE calendar - development files") == "kde calendar"
    assert core("KDE  calendar (documentation) -- old") == core("kde calendar")
    assert (
        core(">>cs<< KDE calendar: icons (old)") == core("KDE calendar – icons") == "kde calendar"
    )
    assert core("read-only file system") == "read-only file system"
    assert core("std::vector viewer") == "std::vector viewer"


def made_up(languages: str = "abc", projects: int = 60) -> dict[str, list[Any]]:
    """A table of descriptions: projects have several packages, and patterns recur among them.

    One text is that of all projects, and each text of the first ten is that of another as well.
    """
    rows = []
    for project in range(projects):
        for package, pattern in enumerate(("tool {}", "tool {} - library", "tool {} (data)")):
            # every third project has the words of another before the pattern
            text = pattern.format(project if project % 3 else f"shared {project // 6}")
            text += "" if project % 2 else " - second"
            for language in languages[: 1 + (project + package) % len(languages)]:
                owners = f"p{project} p{project + 30}" if project < 10 else f"p{project}"
                rows.append((text, f"{language} {text}", language, owners))
    rows.append(("common files", "a", "a", " ".join(f"p{project}" for project in range(projects))))
    names = ("source", "target", "language", "projects")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def split(table: dict[str, list[Any]]) -> dict[str, Splits]:
    domains, notes = split_rows(debian_rows(table), (), DataOptions(), data_kind("translation"))
    assert not notes  # nothing had to be taken out to keep the splits apart
    return domains


def test_no_text_and_no_project_is_both_learnt_and_tested_in_any_language() -> None:
    table = made_up()
    projects_of_text = dict(zip(table["source"], table["projects"], strict=True))
    homes: dict[str, set[str]] = {}
    found = 0
    for splits in split(table).values():
        for name in ("train", "validation", "test"):
            part = getattr(splits, name)
            for source in [] if part is None else part["source"]:
                found += 1
                text = source.split("<< ")[1]
                for key in (text, *projects_of_text[text].split()):
                    homes.setdefault(key, set()).add(name)
    assert "common files" not in homes  # which would tie all projects together
    assert 0.8 * len(table["source"]) < found < len(table["source"])
    assert all(len(names) == 1 for names in homes.values())
    assert {name for names in homes.values() for name in names} == {"train", "validation", "test"}


def test_the_split_does_not_depend_on_which_languages_are_learnt() -> None:
    table = made_up()
    alone = {
        name: [v for v, its in zip(values, table["language"], strict=True) if its == "a"]
        for name, values in table.items()
    }
    one, several = split(alone)["a"], split(table)["a"]
    for name in ("train", "test"):
        assert sorted(getattr(one, name)["source"]) == sorted(getattr(several, name)["source"])


def test_a_text_of_two_projects_belongs_to_both_in_every_language(
    places: tuple[Path, Path],
) -> None:
    source, out = places
    twice = ENGLISH.replace("patience game - shared library", "Patience  game (data)")
    czech = CZECH.replace("patience game - shared library", "také karetní hra")
    german = "Package: libfreecell1\nDescription-md5: bbb\nDescription-de: Kartenspiel\n"
    lists(source, Translation_en=twice, Translation_cs=czech, Translation_de=german)
    CONVERTERS["debian"](source, out)
    short = [r for r in read(out / "debian-descriptions.parquet") if r["part"] == "short"]
    assert [(row["language"], row["projects"]) for row in short] == [
        (language, "freecell libfreecell patience") for language in ("cs", "cs", "de")
    ]


def test_hard_is_what_of_the_tests_shares_its_core_with_nothing_learnt() -> None:
    domains = split(made_up())
    marked = mark_hard(domains)
    assert list(marked) == list(domains)  # it is a part of the tests, not a place out of domain
    learnt = {core(s) for d in domains.values() for s in d.train["source"]}  # type: ignore[index]
    tests = [d.test for d in marked.values() if d.test is not None]
    found = [row["hard"] for test in tests for row in test]
    assert found == [core(source) not in learnt for test in tests for source in test["source"]]
    assert 0 < sum(found) < len(found)
    for name, splits in marked.items():
        assert splits.train is domains[name].train
        before, after = domains[name].test, splits.test
        assert before is None or (after is not None and before["source"] == after["source"])


def test_a_campaign_is_held_out_with_everything_said_in_it(places: tuple[Path, Path]) -> None:
    source, out = places
    campaigns(source)
    CONVERTERS["wesnoth"](source, out)
    columns = Dataset.from_parquet(
        str(out / "wesnoth.parquet"), cache_dir=str(out / "cache")
    ).to_dict()
    kind = data_kind("translation")
    domains, notes = split_rows(wesnoth_rows(columns, {"cs"}), (), DataOptions(), kind)
    cs = domains["cs"]
    assert cs.test is not None
    assert len(cs.test) == 3
    parts = [part for part in (cs.train, cs.validation) if part is not None]
    assert [s for part in parts for s in part["source"]] == [">>cs<< The old mill at the river"]
    assert not notes
    # whatever language was asked for, what is said in the campaign is learnt by none
    columns["language"] = ["de" if c == "ttb" else "cs" for c in columns["campaign"]]
    (row,) = wesnoth_rows(columns, {"cs"})
    assert row.values["source"] == ">>cs<< The old mill at the river"


def test_the_split_of_dialogues_does_not_depend_on_which_languages_are_learnt() -> None:
    sentences = [(f"m{number}", f"Sentence {number} is said.") for number in range(200)]
    # a message has one more sentence, that of another message, in language b only
    sentences += [(f"m{number}", f"Sentence {number * 7 % 200} is said.") for number in range(200)]
    rows = [
        (text, f"{language} {text}", language, "ttb" if int(message[1:]) < 20 else "dm", message)
        for language in "ab"
        for message, text in (sentences if language == "b" else sentences[:200])
    ]
    names = ("source", "target", "language", "campaign", "message")
    table = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    kind = data_kind("translation")
    alone, together = (
        split_rows(wesnoth_rows(table, wanted), (), DataOptions(), kind) for wanted in ("a", "ab")
    )
    assert not alone[1] + together[1]  # nothing had to be taken out to keep the splits apart
    texts = {}
    for name in ("train", "validation", "test"):
        one, several = (getattr(found[0]["a"], name)["source"] for found in (alone, together))
        assert sorted(one) == sorted(several)
        parts = (getattr(splits, name)["source"] for splits in together[0].values())
        texts[name] = {source.split("<< ")[1] for part in parts for source in part}
    assert not texts["train"] & (texts["validation"] | texts["test"])
    assert not texts["validation"] & texts["test"]


def test_a_task_names_what_is_trained_on_together() -> None:
    from moduli.study.plan import source_groups

    domains = mark_hard(split(made_up()))
    task = Task("made up", "translation", (), domains, sources=("a", "b", "c"))
    assert source_groups(task, ()) == [("a", "b", "c")]
    assert source_groups(task, (("b",),)) == [("b",)]
    assert source_groups(Task("made up", "translation", (), domains), ()) == [("a",)]
