"""The page is one file, says what the record carries, and shows text from data as text."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moduli.errors import CheckpointError
from moduli.inspect.page import HUES, PANELS, render_page, write_page
from moduli.inspect.record import Inspection, LayerInspection, TokenTrace
from moduli.inspect.wording import headline
from tests.inspect.made import PIECES, made_inspection

COMMAND = ["moduli", "inspect", "my model", "--data", "sentiment"]
HOSTILE = "<script>alert('x\")</script>\0\u202e\u2066&amp;\ud800\n{{ 7*7 }}"


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return made_inspection()


@pytest.fixture(scope="module")
def page(inspection: Inspection) -> str:
    return render_page(inspection, command=COMMAND)


class Reader(HTMLParser):
    """Elements that were opened and closed, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def with_layers(inspection: Inspection, **changes: object) -> Inspection:
    layers = tuple(dataclasses.replace(layer, **changes) for layer in inspection.layers)
    return dataclasses.replace(inspection, layers=layers)


def even(layer: LayerInspection) -> LayerInspection:
    share = (1 / layer.num_experts,) * layer.num_experts
    return dataclasses.replace(layer, load=share, dead=(), duplicates=(), by_domain={}, by_class={})


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    assert "<script" not in page
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert "moduli inspect &#39;my model&#39; --data sentiment" in page


def test_the_page_is_well_formed_and_every_figure_has_a_name(page: str) -> None:
    reader = Reader(page)
    assert not reader.open
    figures = [attributes for tag, attributes in reader.seen if tag == "svg"]
    assert figures
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in figures)


def test_colours_of_figures_are_the_pages(page: str) -> None:
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert not re.search(r"#[0-9a-f]{3}", svg)
        for variable in set(re.findall(r"var\((--[\w-]+)\)", svg)):
            assert f"{variable}:" in page


def test_every_token_has_its_text_and_the_number_of_its_first_expert(
    inspection: Inspection, page: str
) -> None:
    tokens = page[page.index("<h2>Tokens") :]
    shown = re.findall(r"<bdi>(.*?)</bdi><small>(.*?)</small>", tokens)
    (trace,) = inspection.tokens
    expected = [
        (piece, str(experts[0]))
        for rows in trace.experts.values()
        for piece, experts in zip(PIECES, rows, strict=True)
    ]
    assert shown == expected


def test_an_expert_has_one_hue_and_hues_are_few(inspection: Inspection) -> None:
    (trace,) = made_inspection(E=64).tokens
    html = render_page(dataclasses.replace(inspection, tokens=(trace, trace)), command=COMMAND)
    for text in ("Text 1", "Text 2"):
        assert text in html
    layers = html[html.index("<h2>Tokens") :].split("<h3>")[1:]
    assert len(layers) == 2 * len(trace.experts)
    for layer in layers:
        found = re.findall(r'<span(?: class="t(\d+)")? title.*?<small>(\d+)<', layer)
        assert len(found) == len(PIECES)
        hues = {expert: hue for hue, expert in found}
        assert all(hues[expert] == hue for hue, expert in found)
        coloured = [hue for hue in hues.values() if hue]
        assert len(set(coloured)) == len(coloured) <= HUES


def test_a_dropped_token_is_shown_without_an_expert(inspection: Inspection) -> None:
    name = inspection.layers[0].name
    trace = TokenTrace(("a", "b"), {name: ((), (3,))}, {name: ((), (1.0,))})
    html = render_page(dataclasses.replace(inspection, tokens=(trace,)), command=COMMAND)
    assert '<span title="no expert"><bdi>a</bdi><small>–</small>' in html


def test_hostile_text_is_text(inspection: Inspection) -> None:
    trace = inspection.tokens[0]
    hostile = dataclasses.replace(
        inspection,
        title=HOSTILE,
        layers=tuple(
            dataclasses.replace(
                layer,
                name=f"{HOSTILE}{i}",
                by_domain={HOSTILE: layer.load, "b": layer.load},
                by_class={HOSTILE: layer.load, "b": layer.load},
            )
            for i, layer in enumerate(inspection.layers)
        ),
        domains=(HOSTILE, "b"),
        tokens=(dataclasses.replace(trace, pieces=(HOSTILE, *trace.pieces[1:])),),
    )
    html = render_page(hostile, command=["moduli", HOSTILE])
    html.encode("utf-8")
    assert not re.search("[\0\u202e\u2066]", html)
    reader = Reader(html)
    assert not reader.open
    assert not [tag for tag, _ in reader.seen if tag == "script"]
    assert any("{{ 7*7 }}" in text for text in reader.texts)
    assert any("<script>alert('x\")</script>␀⟨U+202E⟩" in text for text in reader.texts)
    # Text in attributes cannot end them: no element has an attribute but those that are ours.
    allowed = {"title", "class", "aria-label", "scope", "role", "style", "d", "x", "y", "lang"}
    for tag, attributes in reader.seen:
        if tag in ("span", "svg", "td", "th"):
            assert set(attributes) <= allowed | {"viewbox"}


def test_many_layers_stay_a_small_page() -> None:
    big = made_inspection(E=64, K=8, L=16)
    html = render_page(big, command=COMMAND)
    assert len(html) < 3_000_000
    together = html[html.index("<h2>Experts chosen together") : html.index("<h2>Over training")]
    assert together.count("<svg") == PANELS
    assert f"{16 - PANELS} more" in together
    pairs = html[html.index("<h2>Neurons before") : html.index("<h2>Tokens")]
    assert pairs.count("original order</text>") == pairs.count("by expert</text>") == PANELS // 2


def test_overlap_by_chance_is_beside_overlap(inspection: Inspection, page: str) -> None:
    part = page[page.index("<h2>Layers against") : page.index("<h2>Neurons before")]
    assert part.count("<svg") == 2
    assert "By chance alone it is not 0" in part
    before = dataclasses.replace(inspection, overlap_by_chance=())
    html = render_page(before, command=COMMAND)
    assert "raise it by chance" in html
    assert "second map" not in html


def test_nothing_seen_is_said(inspection: Inspection) -> None:
    empty = Inspection(title="nothing", layers=())
    assert "No layer with experts was seen." in render_page(empty, command=COMMAND)
    unseen = with_layers(inspection, tokens=0)
    assert headline(unseen) == ["No token was seen, so nothing can be said of the experts."]


def test_headline_names_what_was_never_used(inspection: Inspection) -> None:
    dead = dataclasses.replace(
        even(inspection.layers[0]), load=(0.0, *(1 / 15,) * 15), dead=(0,), tokens=100
    )
    said = headline(Inspection(title="t", layers=(dead,)))
    assert said[0] == "1 of 16 experts of layer 8 was never used."
    rare = dataclasses.replace(dead, load=(0.0, 0.0001, *(0.9999 / 14,) * 14), dead=(0, 1))
    said = headline(Inspection(title="t", layers=(rare,)))
    assert said[0] == (
        "2 of 16 experts of layer 8 got less than 1 % of an equal share; 1 of them never."
    )


def test_headline_of_many_layers_is_a_sum() -> None:
    said = headline(made_inspection(E=64, L=8))
    dead = sum(len(layer.dead) for layer in made_inspection(E=64, L=8).layers)
    assert said[0].startswith(f"{dead} of 512 experts, in 8 of 8 layers, got less than")


def test_an_even_layer_is_not_called_uneven(inspection: Inspection) -> None:
    layers = tuple(map(even, inspection.layers))
    said = headline(Inspection(title="t", layers=layers))
    assert said[0].startswith("Every expert of every layer was used")
    assert len(said) == 2
    assert "1.0 times an equal share" in said[1]


def test_the_domain_least_like_the_others_is_the_one_that_is(inspection: Inspection) -> None:
    layer = even(inspection.layers[0])
    apart = (0.25, *(0.75 / 15,) * 15)
    moved = dataclasses.replace(layer, by_domain={"books": layer.load, "film": apart})
    said = headline(Inspection(title="t", layers=(moved,), domains=("books", "film")))
    assert said[-1] == (
        "The domain routed least like all data together is film, in layer 8: "
        "18.8 % of its selections go to other experts."
    )


def test_the_same_record_gives_the_same_bytes(inspection: Inspection, tmp_path: Path) -> None:
    again = Inspection.from_dict(inspection.to_dict())
    path = tmp_path / "deep" / "page.html"
    write_page(again, path, command=COMMAND)
    first = path.read_text(encoding="utf-8")
    write_page(again, path, command=COMMAND)
    assert path.read_text(encoding="utf-8") == first == render_page(again, command=COMMAND)
    assert list(path.parent.iterdir()) == [path]


def test_a_page_that_cannot_be_written_says_so(inspection: Inspection, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not write"):
        write_page(inspection, tmp_path / "file" / "page.html", command=COMMAND)


def test_classes_that_are_left_out_are_counted_where_they_were_seen(
    inspection: Inspection,
) -> None:
    """A task may name more classes than its rows have."""
    named = dataclasses.replace(inspection, classes=tuple(map(str, range(100))))
    assert "Of 100 classes" not in render_page(named, command=COMMAND)
    load = inspection.layers[0].load
    seen = with_layers(named, by_class={str(i): load for i in range(60)})
    assert "Of 60 classes the 40 least" in render_page(seen, command=COMMAND)
