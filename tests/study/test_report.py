"""The report is one file, a pure function of the runs, and says what the numbers carry."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moduli.inspect.svg import VARIABLES
from moduli.study.compare import Study
from moduli.study.records import Failure, RunRecord
from moduli.study.report import render_report, summary_dict, write_report
from moduli.study.table import tabulate
from moduli.study.wording import headline

COMMAND = ["moduli", "compare", "--data", "csv:my file.csv"]


def with_accuracy(study: Study, values: dict[str, list[float]]) -> Study:
    """The study with these accuracies (by method, then seed) everywhere: exact known numbers."""

    def change(record: RunRecord) -> RunRecord:
        value = values[record.spec.method.name][record.spec.seed]
        scores = {d: {**s, "accuracy": value} for d, s in record.scores.items()}
        return dataclasses.replace(record, scores=scores, merged=None)

    def seeded(record: RunRecord, seed: int) -> RunRecord:
        return dataclasses.replace(record, spec=dataclasses.replace(record.spec, seed=seed))

    one_each = [study.of(method)[0] for method in study.plan.methods]
    seeds = range(len(values["dense"]))
    records = [change(seeded(record, seed)) for seed in seeds for record in one_each]
    return dataclasses.replace(study, records=tuple(records))


def test_columns_are_in_domain_then_the_mean_of_the_others_then_each(study: Study) -> None:
    table = tabulate(study)
    assert [c.title for c in table.columns] == ["shop", "out-of-domain mean", "film", "food"]
    assert [row.label for row in table.rows] == ["dense", "emoe", "emoe (merged)"]
    record = study.of(study.plan.methods[0])[1]
    expected = (record.scores["film"]["accuracy"] + record.scores["food"]["accuracy"]) / 2
    assert table.rows[0].cells[1].values[1] == pytest.approx(expected)
    assert all(cell.difference is None for cell in table.rows[0].cells)
    assert all(cell.difference is not None for cell in table.rows[1].cells)


def test_a_clear_difference_is_said_and_an_unclear_one_is_not(study: Study) -> None:
    clear = with_accuracy(study, {"dense": [0.70, 0.71, 0.72], "emoe": [0.80, 0.811, 0.822]})
    said = " ".join(headline(tabulate(clear)))
    assert "emoe scored higher than dense out of domain by 10.1 points" in said
    unclear = with_accuracy(study, {"dense": [0.70, 0.71, 0.72], "emoe": [0.80, 0.60, 0.75]})
    for sentence in headline(tabulate(unclear)):
        assert sentence.startswith("No difference between emoe and dense was shown")
    assert "scored higher" not in render_report(unclear, command=COMMAND)


def test_the_page_needs_nothing_but_itself(study: Study) -> None:
    html = render_report(study, command=COMMAND)
    assert "<script" not in html
    assert not re.search(r"""(?:src|href)=["'](?!#)""", html)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "prefers-color-scheme: dark" in html
    for placeholder in VARIABLES:
        assert placeholder not in html
    # Text in the figure takes the page's colour: a fixed black would vanish in the dark.
    figure = html[html.index("<svg") : html.index("</svg>")]
    assert "<text" in figure
    for style in re.findall(r'<text[^>]*style="([^"]*)"', figure):
        assert "fill: var(--ink)" in style
    assert "moduli compare --data &#39;csv:my file.csv&#39;" in html


def test_the_page_is_well_formed(study: Study) -> None:
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "br", "link"):
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Checker().feed(render_report(study, command=COMMAND))
    assert not open_tags


def test_the_same_runs_give_the_same_bytes(study: Study, tmp_path: Path) -> None:
    write_report(study, tmp_path / "report.html", command=COMMAND)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_report(
        study, command=COMMAND
    )


def test_failures_are_named_and_one_method_alone_makes_no_claim(study: Study) -> None:
    failed = Failure(study.records[1].spec, "TrainingError", "the loss became <nan>")
    alone = dataclasses.replace(
        study, records=tuple(study.of(study.plan.methods[0]).values()), failures=(failed,)
    )
    html = render_report(alone, command=COMMAND)
    assert "1 of 3 runs failed" in html
    assert "the loss became &lt;nan&gt;" in html
    assert "nothing to compare yet" in html


def test_the_summary_for_machines_has_the_same_numbers(study: Study) -> None:
    summary = summary_dict(study)
    table = tabulate(study)
    cell = summary["tables"][0]["rows"][1]["cells"][0]
    assert cell["mean"] == table.rows[1].cells[0].summary.mean
    difference = table.rows[1].cells[0].difference
    assert difference is not None
    assert cell["difference"]["by_seed"] == {
        str(seed): value for seed, value in zip(difference.seeds, difference.values, strict=True)
    }
