"""The page of gating dropout: its options are the real ones, its tables those of the record."""

from __future__ import annotations

import json

import pytest

import moduli
from benchmarks import gating_dropout as benchmark
from moduli.parallel import GatingDropout, gating_dropout
from tests.docs.test_options import documented, real


def test_options_of_the_page_are_those_of_the_class() -> None:
    options = real(GatingDropout)
    del options["p"]  # it has no default
    assert documented(benchmark.PAGE) == options


def test_both_names_are_public() -> None:
    assert moduli.GatingDropout is GatingDropout
    assert moduli.gating_dropout is gating_dropout
    assert {"GatingDropout", "gating_dropout"} <= {*moduli.__all__}


def test_tables_of_the_page_are_made_from_the_record() -> None:
    text = benchmark.PAGE.read_text(encoding="utf-8")
    record = json.loads(benchmark.RECORD.read_text(encoding="utf-8"))
    assert benchmark.filled(text, record) == text
    assert json.loads(json.dumps(benchmark.Cluster().__dict__)) == record["scaling"]["assumptions"]
    # The printed command has no options.
    assert {row["rounds"] for row in record["measured"]} == {benchmark.ROUNDS}
    assert record["shape"] == benchmark.SHAPE


def test_the_model_of_a_step() -> None:
    cluster = benchmark.Cluster()
    for ranks in benchmark.WORLDS:
        times = [cluster.step(ranks, p) for p in (0.0, 0.5, 1.0)]
        assert times[0] > times[1] > times[2] == cluster.compute
        assert times[1] == pytest.approx((times[0] + times[2]) / 2)
        assert cluster.step(ranks, 0.5, skip=True) < times[1]
    assert cluster.exchange(1) == 0
    assert cluster.exchange(1024) > cluster.exchange(16) > cluster.exchange(8)
    even = benchmark.simulated(cluster, 16, 0.0, steps=20)
    assert even >= cluster.step(16, 0.0)  # the busiest rank decides
    assert even == pytest.approx(cluster.step(16, 0.0), rel=0.01)
