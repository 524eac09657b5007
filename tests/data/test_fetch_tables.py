"""Converters of data on a few rows made here: what they read, what they write, what they refuse."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from moduli.data.convert import CONVERTERS
from moduli.data.convert.emoji import concepts_of, icons_of, svg
from moduli.data.convert.manpages import plain_text
from moduli.errors import FetchError

needs_groff = pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")


def read(path: Path) -> Dataset:
    return Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))


BOX = '<path d="M0 0h4v8H0z"/>'  # the left half of an 8 x 8 square, in black
NAMES = {
    "1f600": "big-smile",
    "1f449": "hand-right",
    "1f448": "hand-left",
    "1f44d-1f3fb": "thumb-light",
    "1f468-200d-1f373": "cook",
    "1f1eb-1f1f7": "flag-fr",
    "31-20e3": "keycap-1",
}
GROUPS = {
    "Smileys": ["big-smile"],
    "People": ["hand-right", "hand-left", "thumb-light", "cook"],
    "Flags": ["flag-fr"],
    "Symbols": ["keycap-1"],
}


def vendor(directory: Path, icons: list[str], names: Any = (), **more: Any) -> None:
    directory.mkdir()
    drawn = {"icons": {name: {"body": BOX} for name in icons}, "width": 8, "height": 8} | more
    info = {"author": {"name": "A"}, "license": {"spdx": "MIT"}, "palette": True}
    for name, content in (("icons", drawn), ("chars", names), ("info", info)):
        (directory / f"{name}.json").write_text(json.dumps(content))


def test_emoji_of_vendors_become_tables_of_pictures(places: tuple[Path, Path]) -> None:
    source, out = places
    vendor(source / "noto", list(NAMES.values()), NAMES)
    (source / "noto" / "metadata.json").write_text(json.dumps({"categories": GROUPS}))
    # no code points: found by name, by the name without hyphens, and by an alias that mirrors
    aliases = {"hand-left": {"parent": "hand-right", "hFlip": True}}
    vendor(source / "other", ["bigsmile", "hand-right", "unknown"], [], aliases=aliases)
    CONVERTERS["emoji"](source, out)
    noto, other = read(out / "noto.parquet"), read(out / "other.parquet")
    assert noto.column_names == ["image", "name", "codepoint", "group", "vendor"]
    # no skin tone, no joined sequence, no flag; in order of code points
    assert noto["codepoint"][:] == ["31-20e3", "1f448", "1f449", "1f600"]
    assert noto["group"][:] == ["Symbols", "People", "People", "Smileys"]
    assert set(noto["vendor"]) == {"noto"}
    assert other["codepoint"][:] == ["1f448", "1f449", "1f600"]
    assert other["name"][:] == ["hand-left", "hand-right", "big-smile"]
    left, right = (np.asarray(other[n]["image"].convert("RGB")) for n in (0, 1))
    assert right.shape == (64, 64, 3)
    assert (right[:, :32] == 0).all()  # the left half is black, on white
    assert (right[:, 32:] == 255).all()
    assert (left == right[:, ::-1]).all()
    licences = json.loads((out / "licences.json").read_text())
    assert licences["other"] == {"author": {"name": "A"}, "license": {"spdx": "MIT"}}


def test_the_reference_decides_what_a_concept_is() -> None:
    concepts = concepts_of(NAMES, {"categories": GROUPS})
    assert set(concepts) == {"1f600", "1f449", "1f448", "31-20e3"}
    assert concepts["31-20e3"] == ("keycap-1", "Symbols")


def test_a_vendor_with_code_points_is_not_searched_by_name() -> None:
    icons = {"icons": {"big-smile": {}, "grin": {}}}
    assert icons_of(icons, {"1f600": "grin"}, ["1f600", "1f449"], [NAMES]) == {"1f600": "grin"}
    assert icons_of(icons, {}, ["1f600", "1f449"], [NAMES]) == {"1f600": "big-smile"}


def test_a_drawing_that_is_no_square_is_centred_and_other_changes_are_refused() -> None:
    icons = {"icons": {"flat": {"body": BOX, "height": 4}}, "width": 8, "height": 8}
    assert 'viewBox="0 -2 8 8"' in svg(icons, "flat")
    turned = icons | {"aliases": {"turned": {"parent": "flat", "rotate": 1}}}
    with pytest.raises(FetchError, match=r"'turned' changes rotate"):
        svg(turned, "turned")


def test_brown_becomes_a_row_for_every_sentence(places: tuple[Path, Path]) -> None:
    source, out = places
    (source / "README").write_text("BROWN")
    (source / "cats.txt").write_text("ca01 news\ncb02 humor\n")
    (source / "texts").mkdir()
    (source / "texts" / "cb02").write_text("\n\n\tHe/pps ran/vbd 1/2/cd mile/nn ./.\n\n")
    (source / "texts" / "ca01").write_text("\tThe/at jury/nn\n\n\n\t``/`` No/rb ''/''\n")
    CONVERTERS["brown"](source, out)
    table = read(out / "brown.parquet")
    assert table["text"][:] == ["The jury", "`` No ''", "He ran 1/2 mile ."]
    assert table["tags"][2] == ["pps", "vbd", "cd", "nn", "."]
    assert table["tokens"][2] == ["He", "ran", "1/2", "mile", "."]
    assert table["genre"][:] == ["news", "news", "humor"]
    assert table["document"][:] == ["ca01", "ca01", "cb02"]
    (source / "texts" / "cb02").write_text("untagged\n")
    with pytest.raises(FetchError, match="'untagged'"):
        CONVERTERS["brown"](source, out)
    (source / "texts" / "cz99").write_text("a/at\n")
    (source / "texts" / "cb02").unlink()
    with pytest.raises(FetchError, match="cz99 has no genre"):
        CONVERTERS["brown"](source, out)


def test_speeches_become_rows_in_order_of_years(places: tuple[Path, Path]) -> None:
    source, out = places
    (source / "speeches").mkdir()
    (source / "NOTICE").write_text("notice")
    for year, name in ((1961, "B"), (1961, "A"), (1790, "C")):
        speech = {"year": year, "name": name, "party": "none", "text": f"{name} spoke."}
        (source / "speeches" / f"{year}_{name}.json").write_text(json.dumps(speech))
    CONVERTERS["sotu"](source, out)
    table = read(out / "sotu.parquet")
    assert table["president"][:] == ["C", "A", "B"]
    assert table["year"][:] == [1790, 1961, 1961]
    assert table["text"][0] == "C spoke."
    assert (out / "NOTICE").read_text() == "notice"


PAGE = """\
.\\" a comment
.TH ŻÓŁW 1 "2022" "made here" "Podręcznik"
.SH NAZWA
żółw \\- chodzi \\fBpowoli\\fP
.SH OPIS
Pierwszy wiersz akapitu, po którym bez przerwy
następuje drugi wiersz tego samego akapitu i jeszcze dość słów, aby zwykła strona była za wąska.
.TP
\\fB\\-v\\fP
gadatliwie
.TS
allbox;
l l.
a	b
.TE
"""


@needs_groff
def test_a_manual_page_becomes_text_with_whole_paragraphs() -> None:
    text = plain_text(PAGE.encode())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert lines[:3] == ["NAZWA", "żółw - chodzi powoli", "OPIS"]
    assert lines[3].startswith("Pierwszy wiersz")
    assert lines[3].endswith("była za wąska.")
    assert any(line.split() == ["-v", "gadatliwie"] for line in lines)
    assert any(line.replace("│", " ").split() == ["a", "b"] for line in lines)
    assert "made here" not in text  # header and footer
    assert "comment" not in text
    assert "\x1b" not in text
    assert "\x08" not in text


@needs_groff
def test_manual_pages_become_rows_with_their_language(places: tuple[Path, Path]) -> None:
    source, out = places
    for language, name in (("pl", "żółw.1"), ("de", "a.b.5")):
        (source / language).mkdir()
        (source / language / f"{name}.gz").write_bytes(gzip.compress(PAGE.encode()))
        (source / f"{language}.copyright").write_text(language)
    CONVERTERS["manpages"](source, out)
    table = read(out / "manpages.parquet")
    assert table["language"][:] == ["de", "pl"]
    assert table["page"][:] == ["a.b", "żółw"]
    assert table["section"][:] == ["5", "1"]
    assert (out / "pl.copyright").read_text() == "pl"
    with pytest.raises(FetchError, match="header and a footer"):
        plain_text(b".TH A 1\n")


def test_tables_of_the_same_columns_are_the_same_bytes(tmp_path: Path) -> None:
    from moduli.data.convert.tables import write_table

    for name in ("a", "b"):
        write_table(tmp_path / name, {"text": ["x", "y"], "tokens": [["x"], []], "n": [1, 2]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read(tmp_path / "a")["tokens"][:] == [["x"], []]
