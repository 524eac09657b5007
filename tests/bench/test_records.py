"""Records: from a process to a file to a page, with nothing lost on the way."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from moduli.bench.calls import Shape, ask, typed
from moduli.bench.cases import LayerCase
from moduli.bench.jobs import Job, collect, plan, run
from moduli.bench.models import default_case
from moduli.bench.page import figure_name, render_figures, render_page
from moduli.bench.records import Part, Record, read_record, write_record
from moduli.bench.wording import details, machine_line, summary
from moduli.errors import CheckpointError, ConfigError, ModuliError
from tests.docs.blocks import ROOT

CASE = LayerCase(tokens=24, hidden=16, experts=4, top_k=2)
SHAPE = Shape(
    tokens=(8, 16),
    hidden=16,
    experts=4,
    top_k=2,
    width=0,
    dtype="float32",
    mode=("forward", "train"),
    gated=False,
    owned=False,
    spread="balanced",
    threads=(1, 2),
)


@pytest.fixture(scope="module")
def part() -> Part:
    """A job done in a process of its own."""
    job = Job("tuned", 1, rounds=1, layers=(CASE,), brief=True)
    seen = []
    done = run(job, seen.append)
    assert seen == list(done.layers)
    return done


@pytest.fixture(scope="module")
def record(part: Part) -> Record:
    return Record("layers", "moduli bench --tokens 24", "2000-01-01", (part,))


def test_a_process_reports_its_machine_and_its_rows(part: Part) -> None:
    (row,) = part.layers
    assert row.case == CASE
    assert row.settings == part.machine["settings"] == "tuned"
    assert part.machine["threads"] == 1
    assert set(part.machine["gemm"]) == {"float32", "bfloat16"}
    assert {e.role for e in row.entries} == {"kernel", "dense", "peer"}
    assert "GFLOP/s" in machine_line(part.machine)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the setting is of glibc")
def test_tuned_and_defaults_are_processes_with_allocators_of_their_own(part: Part) -> None:
    untouched = run(Job("defaults", 1, rounds=1, brief=True))
    assert "keeps freed memory" in part.machine["allocator"]
    assert "untouched" in untouched.machine["allocator"]


@pytest.mark.slow
def test_a_process_that_fails_is_an_error() -> None:
    with pytest.raises(ModuliError, match="ended with status"):
        run(Job("tuned", 1, device="no such device", brief=True))


def test_a_record_survives_its_file(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    write_record(record, path)
    assert read_record(path) == record
    data = json.loads(path.read_text(encoding="utf-8"))
    assert set(data) == {"schema", "name", "command", "date", "parts"}
    (row,) = data["parts"][0]["layers"]
    assert {"case", "entries", "floor_ms", "choice", "router_share", "best_peer"} <= set(row)
    assert {"ms", "ratio_to_floor", "times_best_peer", "share_of_peak", "saved_bytes"} <= set(
        row["entries"][0]
    )


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(CheckpointError, match="no record"):
        read_record(path)
    for text in ("{", "{}", '{"schema": 99}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match="measure it again"):
            read_record(path)


def test_lines_of_a_process_become_rows(part: Part) -> None:
    lines = [{"machine": dict(part.machine)}, {"layer": part.layers[0].to_dict()}]
    assert collect(io.StringIO("".join(json.dumps(line) + "\n" for line in lines))) == part


def test_every_pair_of_settings_and_threads_has_its_process() -> None:
    jobs = ask(SHAPE)
    assert [(job.settings, job.threads) for job in jobs] == [
        ("tuned", 1),
        ("tuned", 2),
        ("defaults", 1),
        ("defaults", 2),
    ]
    assert all(len(job.layers) == 4 for job in jobs)
    assert all(case.threads == job.threads for job in jobs for case in job.layers)
    models = plan(models=[default_case("minilm", "tune")], settings=("tuned",))
    assert [len(job.models) for job in models] == [1]


def test_a_set_and_a_model_are_not_measured_at_once() -> None:
    with pytest.raises(ConfigError, match="either"):
        ask(SHAPE, chosen="quick", model="minilm")


def test_a_set_can_be_narrowed() -> None:
    (job,) = ask(SHAPE, chosen="quick", only="T1 ", settings=("tuned",))
    assert [case.tokens for case in job.layers] == [1]
    with pytest.raises(ConfigError, match="no layer has 'T9 '"):
        ask(SHAPE, chosen="quick", only="T9 ")


def test_the_command_of_a_record_does_not_say_where_it_was_written() -> None:
    assert typed(["--quick", "--out", "/home/me", "--json"]) == "moduli bench --quick"
    assert typed(["--out=x", "--tokens", "8"]) == "moduli bench --tokens 8"


def test_tables_and_page_show_every_row(record: Record) -> None:
    columns, body = summary(record.layers)
    assert len(body) == 1
    assert all(len(cells) == len(columns) for cells in body)
    assert [cells[0] for cells in details(record.layers[0])[1]][-1]
    page = render_page([record])
    assert body[0][0] in page
    assert f"]({figure_name(record)})" in page
    (svg,) = render_figures([record]).values()
    assert body[0][0] in svg
    assert svg == render_figures([record])[figure_name(record)]


def test_the_page_of_the_documentation_is_made_from_the_records() -> None:
    paths = sorted((ROOT / "benchmarks/results/bench").glob("*.json"))
    records = [read_record(path) for path in paths]
    assert (ROOT / "docs/performance.md").read_text(encoding="utf-8") == render_page(records)
    for name in render_figures(records):
        assert (ROOT / "docs" / name).is_file()
