"""The pages of gating dropout: options are the real ones, tables those of the record."""

from __future__ import annotations

import json

import pytest

import moduli
from benchmarks import gating_dropout as benchmark
from benchmarks.shared.tables import ROOT
from moduli.parallel import GatingDropout, gating_dropout
from tests.docs.test_options import documented, real
from tests.parallel.test_gating_ranks import PER_LAYER

PAGE = ROOT / "docs/methods/gating-dropout.md"
CLUSTER = benchmark.Cluster()


def test_options_of_the_page_are_those_of_the_class() -> None:
    options = real(GatingDropout)
    del options["p"]  # it has no default
    assert documented(PAGE) == options


def test_both_names_are_public() -> None:
    assert moduli.GatingDropout is GatingDropout
    assert moduli.gating_dropout is gating_dropout
    assert {"GatingDropout", "gating_dropout"} <= {*moduli.__all__}


@pytest.mark.parametrize("page", benchmark.PAGES)
def test_tables_of_pages_are_made_from_the_record(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert benchmark.PLACE.search(text)
    assert benchmark.filled(text) == text


def test_the_record_is_that_of_the_printed_command() -> None:
    record = json.loads(benchmark.RECORD.read_text(encoding="utf-8"))
    made = benchmark.scaling(CLUSTER)
    assert json.loads(json.dumps(made["assumptions"])) == record["scaling"]["assumptions"]
    for row, kept in zip(made["rows"], record["scaling"]["rows"], strict=True):
        assert row["share"] == pytest.approx(kept["share"])
        assert row["simulated"] == pytest.approx(kept["simulated"], rel=0.01)
    assert {row["rounds"] for row in record["measured"]} == {benchmark.ROUNDS}
    assert record["shape"] == benchmark.SHAPE


def test_the_model_of_a_step() -> None:
    for row in benchmark.scaling(CLUSTER)["rows"]:
        for p in benchmark.RATES:  # dropping saves the exchange and nothing else
            assert row["gate_drop"][str(p)] == pytest.approx(1 - p * row["share"])
            assert row["gate_expert_drop"][str(p)] < row["gate_drop"][str(p)]
    assert CLUSTER.step(64, 1.0) == CLUSTER.compute
    even = benchmark.simulated(CLUSTER, 16, 0.0, steps=20)
    assert even >= CLUSTER.step(16, 0.0)  # the busiest rank decides
    assert even == pytest.approx(CLUSTER.step(16, 0.0), rel=0.01)


@pytest.mark.parametrize("ranks", [1, 8, 16])
def test_the_model_of_an_exchange_message_by_message(ranks: int) -> None:
    seconds = 0.0
    # Numbers of rows, and rows: forth and back, in forward and in backward pass.
    assert PER_LAYER == 5
    for carries_rows in [False, *[True] * (PER_LAYER - 1)]:
        for other in range(1, ranks):
            near = other < CLUSTER.per_node
            seconds += CLUSTER.latency_in if near else CLUSTER.latency_out
            if carries_rows:
                sent = CLUSTER.tokens * CLUSTER.width * CLUSTER.bytes_per_number / ranks
                seconds += sent / (CLUSTER.bandwidth_in if near else CLUSTER.bandwidth_out)
    assert CLUSTER.exchange(ranks) == pytest.approx(seconds)
