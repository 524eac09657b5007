"""Figures say what the records say, in little space and in no colour of their own."""

from __future__ import annotations

import dataclasses
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from moduli.errors import ConfigError
from moduli.inspect.charts import Bars, HeatMap
from moduli.inspect.figures import (
    EXPERTS,
    ROWS,
    all_charts,
    by_class,
    coselection,
    distance,
    figures,
    load,
    overlap,
    selection,
    spread,
)
from moduli.inspect.record import Inspection, Selection
from moduli.inspect.svg import STRENGTHS, chart_svg
from moduli.inspect.tables import overlap_rows
from moduli.inspect.text import layer_names, shortened, visible
from tests.inspect.made import made_inspection

NAMES = {"load", "domains", "classes", "coselection", "selection", "overlap", "activations"}


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return made_inspection()


def painted(svg: str) -> dict[tuple[int, int], float]:
    """(row, column) -> opacity of the cells of a heat map, read back from its SVG."""
    cells = {}
    root = ElementTree.fromstring(svg)
    for path in root.find("g").iter("path"):
        opacity = float(path.get("fill-opacity", "nan"))
        for c, r, run in re.findall(r"M(\d+) (\d+)h(\d+)", path.get("d", "")):
            for column in range(int(c), int(c) + int(run)):
                assert (int(r), column) not in cells
                cells[int(r), column] = opacity
    return cells


def test_every_part_of_a_record_has_its_figure(inspection: Inspection) -> None:
    assert set(all_charts(inspection)) == NAMES
    assert len(load(inspection)) == len(inspection.layers)


def test_a_record_without_parts_has_no_figures_of_them(inspection: Inspection) -> None:
    layers = tuple(
        dataclasses.replace(layer, coselection=None, by_domain={}, by_class={})
        for layer in inspection.layers[:1]
    )
    bare = Inspection(title="bare", layers=layers, overlap=((1.0,),))
    assert set(all_charts(bare)) == {"load"}
    assert all_charts(Inspection(title="none", layers=())) == {}


def test_load_is_in_equal_shares(inspection: Inspection) -> None:
    for chart, layer in zip(load(inspection), inspection.layers, strict=True):
        assert np.mean(chart.values) == pytest.approx(chart.line)
        assert np.argmax(chart.values) == np.argmax(layer.load)


def test_coselection_leaves_out_its_diagonal_and_layers_of_one_choice(
    inspection: Inspection,
) -> None:
    first = coselection(inspection)[0]
    assert [r for r, row in enumerate(first.values) if row[r] is not None] == []
    single = tuple(dataclasses.replace(layer, top_k=1) for layer in inspection.layers)
    assert coselection(dataclasses.replace(inspection, layers=single)) == []


def test_panels_of_several_methods_share_one_scale(inspection: Inspection) -> None:
    held = inspection.selection
    assert held is not None
    layer = next(iter(held.shares))
    flat = Selection(held.steps, {layer: tuple((1 / 16,) * 16 for _ in held.steps)})
    one, other = selection({"EMoE": held, "flat": flat}, layer)
    assert (one.title, other.title) == ("EMoE", "flat")
    assert one.end == other.end > 1
    assert other.values[0] == pytest.approx([1.0] * 16)
    with pytest.raises(ConfigError, match=r"not recorded for encoder\.layer\.3.*encoder\.layer\.8"):
        selection({"EMoE": held}, "encoder.layer.3")


def test_overlap_stands_beside_that_by_chance_on_one_scale(inspection: Inspection) -> None:
    found, chance = overlap(inspection)
    assert found.values[0][1] == inspection.overlap[0][1]
    assert chance.values[0][1] == inspection.overlap_by_chance[0][1]
    assert found.values[1][1] is chance.values[1][1] is None
    assert found.end == chance.end == inspection.overlap[0][1]
    before = dataclasses.replace(inspection, overlap_by_chance=())
    assert [chart.values for chart in overlap(before)] == [found.values]
    rows = overlap_rows(inspection)
    assert rows[1] == ("layer 8", "layer 10", f"{inspection.overlap[0][1]:.3f}", "0.040")
    assert len(overlap_rows(before)) == 1  # titles only


def test_the_layer_most_alike_is_that_furthest_above_chance() -> None:
    """Not that of the largest overlap: more experts alone would make it so."""
    three = made_inspection(L=3)
    lifted = dataclasses.replace(
        three,
        overlap=((1.0, 0.5, 0.3), (0.5, 1.0, None), (0.3, None, 1.0)),
        overlap_by_chance=((0.1, 0.45, 0.02), (0.45, 0.1, None), (0.02, None, 0.1)),
    )
    assert [row[:2] for row in overlap_rows(lifted)[1:]] == [
        ("layer 8", "layer 12"),
        ("layer 10", "layer 8"),
        ("layer 12", "layer 8"),
    ]


def test_of_many_classes_the_least_alike_are_shown(inspection: Inspection) -> None:
    layer = inspection.layers[0]
    usual = {f"usual {i}": layer.load for i in range(ROWS)}
    apart = tuple(float(e == 0) for e in range(layer.num_experts))
    many = dataclasses.replace(layer, by_class={**usual, "apart": apart})
    (chart,) = by_class(dataclasses.replace(inspection, layers=(many,)))
    assert len(chart.rows) == ROWS
    assert "apart" in chart.rows


def test_of_many_windows_neighbours_are_averaged() -> None:
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.ones(4), 95)
    held = Selection(tuple(range(10, 960, 10)), {"mlp": tuple(map(tuple, shares.tolist()))})
    (chart,) = selection({"m": held}, "mlp")
    assert len(chart.rows) == ROWS
    assert chart.rows[-1] == "950"
    first = int(chart.rows[0]) // 10
    assert chart.values[0] == pytest.approx(4 * shares[:first].mean(0))
    assert np.sum(chart.values, axis=1) == pytest.approx(np.full(ROWS, 4.0))


def test_of_many_experts_the_most_used_are_paired() -> None:
    big = made_inspection(E=100, L=1)
    (chart,) = coselection(big)
    (layer,) = big.layers
    assert len(chart.values) == EXPERTS
    kept = set(map(int, chart.rows))
    left = set(range(100)) - kept
    assert min(layer.load[e] for e in kept) >= max(layer.load[e] for e in left)
    assert layer.coselection is not None
    i, j = int(chart.rows[3]), int(chart.columns[7])
    assert chart.values[3][7] == pytest.approx(100 * layer.coselection[i][j])


def test_a_cell_is_as_strong_as_its_value() -> None:
    values = np.random.default_rng(1).random((12, 16))
    values[values < 0.2] = 0.0
    chart = HeatMap("t", values.tolist(), "x", "y", "u", top=1.0)
    cells = painted(chart_svg(chart))
    for (r, c), value in np.ndenumerate(values):
        assert cells.get((r, c), 0.0) == pytest.approx(value, abs=0.5 / STRENGTHS + 1e-3)


def test_empty_cells_are_not_zero() -> None:
    cells = painted(chart_svg(HeatMap("t", [[None, 0.0, 1.0]], "x", "y", "u")))
    assert set(cells) == {(0, 0), (0, 2)}
    assert np.isnan(cells[0, 0])


@pytest.mark.parametrize("size", [1, 5, 64])
def test_heat_maps_are_small_and_well_formed(size: int) -> None:
    values = np.random.default_rng(0).random((size, size)).tolist()
    svg = chart_svg(HeatMap("noise", values, "expert", "expert", "share"))
    ElementTree.fromstring(svg)
    assert len(svg) < 80_000
    assert "#" not in svg


def test_flat_data_can_be_drawn() -> None:
    nothing = HeatMap("t", [[0.0, 0.0]], "x", "y", "u")
    assert painted(chart_svg(nothing)) == {}
    ElementTree.fromstring(chart_svg(Bars("t", [0.0], "x", "u", 0.0, "l")))


@pytest.mark.parametrize("values", [[], [[]], [[1.0], [1.0, 2.0]]])
def test_tables_that_are_none_are_refused(values: list[list[float]]) -> None:
    with pytest.raises(ConfigError, match="rows of one length"):
        HeatMap("t", values, "x", "y", "u")


def test_names_must_be_as_many_as_rows() -> None:
    with pytest.raises(ConfigError, match="3 names for 1 rows"):
        HeatMap("t", [[1.0]], "x", "y", "u", rows=("a", "b", "c"))


def test_matplotlib_draws_the_same_numbers(inspection: Inspection) -> None:
    drawn = figures(inspection)
    assert set(drawn) == NAMES
    bars = load(inspection)[0].values
    heights = [patch.get_height() for patch in drawn["load"].axes[0].patches]
    assert heights == pytest.approx(bars)
    image = drawn["domains"].axes[0].get_images()[0].get_array()
    assert np.allclose(image, all_charts(inspection)["domains"][0].values)


def test_matplotlib_takes_a_dollar_sign_as_text(inspection: Inspection) -> None:
    layer = inspection.layers[0]
    odd = dataclasses.replace(layer, by_domain={r"$\frac": layer.load, "b$": layer.load})
    drawn = figures(Inspection(title="t", layers=(odd,), domains=(r"$\frac", "b$")))
    drawn["domains"].draw_without_rendering()


def test_distance_is_what_has_to_move() -> None:
    assert distance((0.5, 0.5), (0.5, 0.5)) == 0
    assert distance((1.0, 0.0), (0.0, 1.0)) == 1
    assert distance((0.7, 0.3), (0.5, 0.5)) == pytest.approx(0.2)


@pytest.mark.parametrize("count", [0, 1, 8, 9, 100])
def test_spread_is_even_and_bounded(count: int) -> None:
    found = spread(count, 8)
    assert len(found) == min(count, 8)
    assert found == sorted(set(found))
    assert all(0 <= i < count for i in found)


def test_layers_are_called_by_their_number_where_that_is_enough() -> None:
    assert layer_names(["bert.encoder.layer.8", "bert.encoder.layer.10"]) == ["layer 8", "layer 10"]
    both = ["encoder.block.0", "decoder.block.0"]
    assert layer_names(both) == both
    assert layer_names(["mlp"]) == ["mlp"]


def test_hidden_characters_are_shown() -> None:
    assert visible("a\0b\n") == "a␀b␊"
    assert visible("\u202ex\ud800") == "⟨U+202E⟩x⟨U+D800⟩"
    assert visible("naïve 👩‍🚀 שלום") == "naïve 👩‍🚀 שלום"
    assert shortened("a" * 30, 10) == "a" * 9 + "…"
