"""The report is one file, a pure function of the runs, and says what the numbers carry."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest

import moduli
from moduli.errors import ConfigError, UnknownNameError
from moduli.inspect.record import Inspection, LayerInspection, Selection
from moduli.inspect.svg import VARIABLES
from moduli.study.compare import Study
from moduli.study.plan import Planned, also_tested, arm
from moduli.study.records import INSPECTION, Failure, RunRecord
from moduli.study.report import render_report, summary_dict, write_report
from moduli.study.table import tabulate
from moduli.study.wording import MINUS, headline
from tests.study.fakes import DOMAINS, emoe, made_study, two_arms

COMMAND = ["moduli", "compare", "--data", "csv:my file.csv"]


def render(study: Study, **inspections: Inspection) -> str:
    return render_report(study, inspections=inspections, command=COMMAND)


def with_accuracy(values: dict[str, list[float]]) -> Study:
    """Dense and EMoE with these accuracies by seed, on all domains."""

    def score(run: Planned, domain: str) -> float:
        return values[run.spec.method.name][run.spec.seed]

    return made_study(score=score, seeds=range(len(values["dense"])))


class Page(HTMLParser):
    """Text of every element with `data-runs`, anchors, and whether tags are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, int | None]] = []
        self.cells: list[tuple[str, list[str], str]] = []
        self.anchors: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors += [given["id"] or ""] if "id" in given else []
        self.links += [given["href"] or ""] if tag == "a" else []
        if tag in ("meta", "br", "link"):
            return
        index = None
        if "data-runs" in given:
            index = len(self.cells)
            self.cells.append((tag, (given["data-runs"] or "").split(), ""))
        self.open.append((tag, index))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, index in reversed(self.open):
            if index is not None:
                tag, runs, text = self.cells[index]
                self.cells[index] = (tag, runs, text + data)
                return


def section(html: str, name: str) -> str:
    """From the heading with this id to the next."""
    start = html.index(f'<h2 id="{name}">')
    end = html.find("<h2", start + 4)
    return html[start : end if end > 0 else len(html)]


def test_columns_are_in_domain_then_the_mean_of_the_others_then_each() -> None:
    study = made_study()
    table = tabulate(study)
    assert [c.title for c in table.columns] == ["shop", "out-of-domain mean", "film", "food"]
    assert [row.label for row in table.rows] == ["dense", "emoe", "emoe (merged)"]
    run, record = study.finished(0)[1]
    expected = (record.scores["film"]["accuracy"] + record.scores["food"]["accuracy"]) / 2
    assert table.rows[0].cells[1].values[run.unit, 1] == pytest.approx(expected)
    assert all(cell.difference is None for cell in table.rows[0].cells)
    assert all(cell.difference is not None for cell in table.rows[1].cells)


def test_a_clear_difference_is_said_and_an_unclear_one_is_not() -> None:
    clear = with_accuracy({"dense": [0.70, 0.71, 0.72], "emoe": [0.80, 0.811, 0.822]})
    said = " ".join(headline(tabulate(clear)))
    assert "emoe scored higher than dense out of domain by 10.1 points" in said
    unclear = with_accuracy({"dense": [0.70, 0.71, 0.72], "emoe": [0.80, 0.60, 0.75]})
    for sentence in headline(tabulate(unclear)):
        assert sentence.startswith("No difference between emoe")
    html = render(unclear)
    assert "scored higher" not in html
    assert "This study resolves differences of about" in html


def test_a_real_study_has_a_whole_report(study: Study, root: Path, tmp_path: Path) -> None:
    write_report(study, tmp_path / "report.html", root=root, command=COMMAND)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    names = ("scores", "differences", "domains", "costs", "edits", "settings", "runs")
    for name in (*names, "selection", "experts-by-domain", "activations"):
        assert section(html, name)
    assert "What emoe changed in the model" in html
    # a run leaves an inspection, so that something is known of its experts
    assert 'id="domains"' in html
    assert "no inspection was found" not in html


def test_the_page_needs_nothing_but_itself() -> None:
    html = render(made_study())
    assert "<script" not in html
    assert not re.search(r"""(?:src|href)=["'](?!#)""", html)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "prefers-color-scheme: dark" in html
    for placeholder in VARIABLES:
        assert placeholder not in html
    for variable in VARIABLES.values():
        assert html.count(variable.removeprefix("var(").removesuffix(")") + ":") == 3
    # Text in the figure takes the page's colour: a fixed black would vanish in the dark.
    figure = html[html.index("<svg") : html.index("</svg>")]
    assert "<text" in figure
    for style in re.findall(r'<text[^>]*style="([^"]*)"', figure):
        assert "fill: var(--ink)" in style
    assert "moduli compare --data &#39;csv:my file.csv&#39;" in html


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    study = made_study()
    write_report(study, tmp_path / "report.html", root=tmp_path, command=COMMAND)
    again = dataclasses.replace(study, records=dict(reversed(study.records.items())))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(again)


def mean_score(records: list[RunRecord], *, trained: bool) -> float:
    """Mean over runs of the mean over the domains that each was trained on, or the others."""
    return statistics.mean(
        statistics.mean(
            r.scores[d]["accuracy"] for d in DOMAINS if (d in r.spec.train_domains) == trained
        )
        for r in records
    )


def test_numbers_follow_from_the_runs_that_they_name() -> None:
    study = made_study(sources=(("shop",), ("film",)), rates=(1e-5, 5e-5))
    page = Page(section(render(study), "scores"))
    checked = 0
    for tag, keys, text in page.cells:
        runs = [study.records[key] for key in keys]
        by_method = {
            name: [r for r in runs if r.spec.method.name == name] for name in ("dense", "emoe")
        }
        dense, emoe = by_method["dense"], by_method["emoe"]
        if tag == "td":
            wanted = [100 * mean_score(runs, trained=trained) for trained in (True, False)]
        elif tag == "small":
            assert {(r.spec.trained_on, r.spec.seed) for r in dense} == {
                (r.spec.trained_on, r.spec.seed) for r in emoe
            }
            wanted = [
                100 * (mean_score(emoe, trained=trained) - mean_score(dense, trained=trained))
                for trained in (True, False)
            ]
        else:
            continue
        # the made merged models have a tenth of a point less everywhere
        wanted += [one - 0.1 for one in wanted]
        shown = float(text.split()[0].replace(MINUS, "-"))
        assert min(abs(shown - one) for one in wanted) < 0.0501, text
        checked += 1
    assert checked == 10  # three rows in two places, two of them with differences


def test_every_key_leads_to_the_appendix() -> None:
    study = made_study(sources=(("shop",), ("film",)), rates=(1e-5, 5e-5), fractions=(1.0, 0.5))
    page = Page(render(study))
    named = {key for _, keys, _ in page.cells for key in keys}
    assert named
    assert {f"run-{key}" for key in named} <= set(page.anchors)
    assert {link.removeprefix("#") for link in page.links} <= set(page.anchors)
    assert {f"run-{run.spec.key}" for run in study.runs} <= set(page.anchors)
    for tag, keys, _ in page.cells:
        assert keys or tag == "td", "a number without a run"


def test_every_learning_rate_is_shown_with_what_the_rule_saw() -> None:
    def score(run: Planned, domain: str) -> float:
        return 0.7 + 0.01 * run.arm + (0.1 if run.spec.settings.learning_rate == 3e-5 else 0)

    study = made_study(score=score, rates=(1e-5, 3e-5, 9e-5))
    html = section(render(study), "scores")
    assert "<strong>3e-05: 80.0</strong>" in html
    assert "1e-05: 70.0" in html
    counting = {r.spec.key for r in study.records.values() if r.spec.settings.learning_rate == 3e-5}
    table = tabulate(study)
    assert {key for row in table.rows for cell in row.cells for key in cell.runs} == counting


def test_the_oracle_is_marked_at_the_top_and_unknown_rules_are_named() -> None:
    study = made_study(rates=(1e-5, 3e-5))
    marked = render_report(study, inspections={}, rule="oracle", command=COMMAND)
    assert "oracle: sees the test domain" in marked[: marked.index("<h2")]
    assert "oracle" not in render(study)
    nothing_chosen = render_report(made_study(), inspections={}, rule="oracle", command=COMMAND)
    assert "oracle: sees" not in nothing_chosen
    with pytest.raises(UnknownNameError, match="training-domain"):
        render_report(study, inspections={}, rule="training-domains", command=COMMAND)


def test_a_search_shows_validation_scores_and_says_so() -> None:
    study = made_study()
    tested = {
        key: dataclasses.replace(
            r, scores={d: {**s, "accuracy": 0.111} for d, s in r.scores.items()}
        )
        for key, r in study.records.items()
    }
    study = dataclasses.replace(study, records=tested)
    html = render_report(study, inspections={}, split="validation", command=COMMAND)
    assert "no test score is shown" in html
    assert "11.1" not in html
    assert "no test score is shown" not in render(study)
    assert summary_dict(study, split="validation")["split"] == "validation"


def test_several_sources_have_tables_of_their_own_and_ranks() -> None:
    arms = (*two_arms(), arm(emoe(top_k=8)))
    study = made_study(arms, sources=(("shop",), ("film",), ("food",)))
    html = render(study)
    assert "Trained on film" in section(html, "sources")
    ranks = section(html, "ranks")
    assert "6 test sets" in ranks
    assert "Friedman" in ranks
    shown = [float(x) for x in re.findall(r'<td class="n">(\d\.\d\d)</td>', ranks)]
    assert sum(shown) == pytest.approx(6, abs=0.02)  # ranks 1 + 2 + 3


def test_domains_of_one_name_are_told_apart_by_their_tasks_everywhere() -> None:
    study = made_study(tasks=("old", "new"))
    titles = ["old: film", "old: food", "new: film", "new: food"]
    html = render(study)
    rows = [re.findall(rf'<th scope="row">{title}</th>', html) for title in titles]
    assert all(rows)
    assert '<th scope="row">film</th>' not in html
    cells = summary_dict(study)["tables"][0]["rows"][0]["cells"]
    assert [cell["column"] for cell in cells][2:] == titles
    for cell in cells[2:]:  # each from the runs of its own task only
        tasks = {study.records[key].spec.task for key in cell["runs"]}
        assert tasks == {cell["column"].split(":")[0]}


def test_the_summary_for_machines_has_the_same_numbers() -> None:
    study = made_study(also_tested(two_arms(), pruned=True, cross=True), rates=(1e-5, 3e-5))
    summary = summary_dict(study)
    assert json.loads(json.dumps(summary)) is not None
    table = tabulate(study)
    row = next(i for i, r in enumerate(table.rows) if r.label == "emoe")
    cell = summary["tables"][0]["rows"][row]["cells"][0]
    assert cell["mean"] == table.rows[row].cells[0].summary.mean
    assert cell["runs"] == list(table.rows[row].cells[0].runs)
    difference = table.rows[row].cells[0].difference
    assert difference is not None
    assert [one["value"] for one in cell["difference"]["values"]] == list(difference.values)
    assert [analysis["name"] for analysis in summary["analyses"]] == ["train-and-test"]
    assert {one["arm"] for one in summary["selection"]["groups"]} == {"dense", "emoe"}
    assert [cost["label"] for cost in summary["costs"]] == ["dense", "emoe"]
    assert len(summary["power"]) == 1


def test_the_summary_lists_every_setting_tried_not_only_those_chosen() -> None:
    study = made_study(rates=(1e-5, 3e-5))
    tried = summary_dict(study)["tried"]
    rates = [(label, rate) for label in ("dense", "emoe") for rate in (1e-5, 3e-5)]
    assert [(one["label"], one["rate"]) for one in tried] == rates
    assert sorted(key for one in tried for key in one["runs"]) == sorted(study.records)
    for one in tried:
        records = [study.records[key] for key in one["runs"]]
        (unit,) = study.units
        inside = [record.scores[d]["accuracy"] for record in records for d in unit.sources]
        assert one["inside"] == pytest.approx(sum(inside) / len(inside))
        assert one["outside"] is not None


def test_costs_are_relative_to_the_first_arm_and_dashes_where_nothing_was_measured() -> None:
    study = made_study()
    costs = section(render(study), "costs")
    # emoe: 2.5, 2.6, 2.7 s against 2.0, 2.1, 2.2 s with the same seeds
    assert f"{2.6 / 2.1:.2f} ×" in costs
    assert f"{40 / 42:.2f} ×" in costs
    assert "512 MiB" in costs
    assert 'id="costs"' not in render(made_study(cost=False))
    half = made_study()
    bare = {
        key: dataclasses.replace(r, cost={}, cpu_seconds={}) if r.spec.method.name == "emoe" else r
        for key, r in half.records.items()
    }
    assert "–" in section(render(dataclasses.replace(half, records=bare)), "costs")


def test_the_headline_names_its_runs() -> None:
    study = made_study()
    page = Page(render(study))
    named = [set(keys) for tag, keys, _ in page.cells if tag == "li" and keys]
    assert named
    assert all(keys == {run.spec.key for run in study.runs} for keys in named)


# Bad input and studies cut short


def test_failures_are_named_and_one_method_alone_makes_no_claim() -> None:
    study = made_study(seeds=(0, 1))
    failed = study.runs[1].spec
    failure = Failure(failed, "TrainingError", "the loss became <nan>")
    records = {r.spec.key: r for _, r in study.finished(0)}
    html = render(dataclasses.replace(study, records=records, failures=(failure,)))
    assert "1 of 4 runs failed" in html
    assert "the loss became &lt;nan&gt;" in html
    assert "nothing to compare yet" in html
    assert f'href="#run-{failed.key}"' in html
    assert "not finished" in section(html, "runs")


def test_nothing_finished_is_a_clear_error(tmp_path: Path) -> None:
    empty = dataclasses.replace(made_study(), records={})
    with pytest.raises(ConfigError, match="No run of this study has finished"):
        write_report(empty, tmp_path / "report.html", root=tmp_path, command=COMMAND)
    assert not (tmp_path / "report.html").exists()
    whole = made_study(rates=(1e-5, 3e-5))
    # either learning rate has finished, but with different seeds
    apart = {
        key: r
        for key, r in whole.records.items()
        if (r.spec.seed, r.spec.settings.learning_rate) in ((0, 1e-5), (1, 3e-5))
    }
    with pytest.raises(ConfigError, match="all of its learning rates"):
        render(dataclasses.replace(whole, records=apart))


def test_without_the_baseline_nothing_is_compared() -> None:
    study = made_study()
    records = {r.spec.key: r for _, r in study.finished(1)}
    html = render(dataclasses.replace(study, records=records))
    assert "has no finished runs, so there is nothing to compare yet" in html
    assert 'id="differences"' not in html


def test_one_seed_has_differences_but_no_intervals() -> None:
    html = render(made_study(seeds=(7,)))
    assert "1 seed; too little for an interval" in html
    assert "This study resolves" not in html
    assert "none" in section(html, "scores")


def test_one_arm_one_domain_no_validation() -> None:
    study = made_study(two_arms()[:1], domains=("shop",), validated=False)
    html = render(study)
    assert "nothing to compare yet" in html
    assert "out-of-domain mean" not in html
    study = made_study(domains=("shop",))
    html = render(study)
    assert "out of domain by" not in html
    assert "the data has no other domains" in html
    assert "domains it did not see" not in html


def test_no_validation_with_several_rates_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError, match="validation"):
        render(made_study(rates=(1e-5, 3e-5), validated=False))


def test_text_from_data_stays_text() -> None:
    evil = "<script>alert(1)</script>\"'&$x_1$\u202e\x00"
    arms = (arm(moduli.Dense()), arm(emoe(), label=evil))
    study = made_study(
        arms,
        sources=((evil,), ("shop",)),
        domains=(evil, "shop", "food"),
        fractions=(1.0, 0.5),
        data={evil: evil},
    )
    layer = LayerInspection(evil, 2, 1, 1.0, 5, 0.0, (0.5, 0.5), (0.5, 0.5), None, 1.0)
    layer = dataclasses.replace(layer, by_domain={evil: (0.5, 0.5), "shop": (1.0, 0.0)})
    inspection = Inspection(
        evil,
        (layer,),
        domains=(evil, "shop"),
        selection=Selection((1,), {evil: ((0.5, 0.5),)}),
    )
    (run, _), *_ = study.finished(1)
    failure = Failure(run.spec, evil, evil)
    study = dataclasses.replace(study, failures=(failure,))
    html = render_report(
        study, inspections={run.spec.key: inspection}, notes=[evil], command=[evil]
    )
    assert "<script" not in html
    assert "\x00" not in html
    assert "\u202e" not in html
    Page(html)


# Inspections


def some_inspection(label: str) -> Inspection:
    layers = tuple(
        LayerInspection(
            f"encoder.layer.{n}",
            4,
            2,
            2.0,
            100,
            0.1,
            (0.4, 0.3, 0.2, 0.1),
            (0.4, 0.3, 0.2, 0.1),
            0.5,
            0.9,
            by_domain={"shop": (0.4, 0.3, 0.2, 0.1), "film": (0.1, 0.2, 0.3, 0.4)},
        )
        for n in (4, 5)
    )
    rows = ((0.25, 0.25, 0.25, 0.25), (0.4, 0.3, 0.2, 0.1))
    selection = Selection((10, 20), {layer.name: rows for layer in layers})
    return Inspection(label, layers, domains=("shop", "film"), selection=selection)


def test_inspections_beside_the_runs_are_drawn_and_damaged_ones_said(tmp_path: Path) -> None:
    arms = (*two_arms(), arm(emoe(gate="cosine")), arm(moduli.GMoE(num_experts=4, top_k=1)))
    study = made_study(arms)
    keys = [[r.spec.key for _, r in study.finished(i)] for i in range(4)]
    for key in (keys[1][0], keys[2][0], keys[2][1]):
        (tmp_path / key).mkdir()
    some_inspection("first").write(tmp_path / keys[1][0] / INSPECTION)
    (tmp_path / keys[2][0] / INSPECTION).write_text('{"version": 1', encoding="utf-8")
    some_inspection("second").write(tmp_path / keys[2][1] / INSPECTION)
    write_report(study, tmp_path / "report.html", root=tmp_path, command=COMMAND)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"The inspection of run {keys[2][0]} was left out" in html
    assert str(tmp_path) not in html
    assert "What the experts of gmoe do is not shown" in html
    panels = section(html, "selection")
    assert panels.count("<svg") == 2  # side by side
    assert f'data-runs="{keys[1][0]} {keys[2][1]}"' in panels
    assert section(html, "experts-by-domain").count("<svg") == 4


@pytest.mark.slow
def test_a_large_study_stays_small() -> None:
    arms = (*two_arms(), *(arm(emoe(top_k=k)) for k in (1, 2, 3, 5, 6, 8)))
    domains = [f"domain{i}" for i in range(13)]
    sources = tuple((name,) for name in domains[:5])
    study = made_study(arms, sources=sources, seeds=range(5), domains=domains)
    assert len(study.records) == 200
    html = render(study)
    assert len(html.encode()) < 3_000_000
    # with 8 rows and 13 columns the figure of differences has no single domains
    figure = section(html, "differences")
    assert "domain12" not in figure
    assert "out-of-domain mean" in figure
