"""What gating dropout saves: the model of a step, and tables that are the record's."""

import pytest

from benchmarks import gating_dropout
from benchmarks.shared.tables import ROOT

CLUSTER = gating_dropout.Cluster()


def test_the_share_of_the_exchange_is_what_dropping_can_save() -> None:
    for row in gating_dropout.scaling(CLUSTER)["rows"]:
        for p in gating_dropout.RATES:
            assert row["gate_drop"][str(p)] == pytest.approx(1 - p * row["share"])
    assert CLUSTER.step(64, 1.0) == CLUSTER.compute


def test_messages_between_nodes_are_those_that_cost() -> None:
    # all but one of eight ranks are near; of sixteen, eight are on another node
    sent = CLUSTER.tokens * CLUSTER.width * CLUSTER.bytes_per_number
    near = 7 * CLUSTER.latency_in + sent * 7 / 8 / CLUSTER.bandwidth_in
    assert CLUSTER.exchange(8) == pytest.approx(near)
    far = 7 * CLUSTER.latency_in + sent * 7 / 16 / CLUSTER.bandwidth_in
    far += 8 * CLUSTER.latency_out + sent * 8 / 16 / CLUSTER.bandwidth_out
    assert CLUSTER.exchange(16) == pytest.approx(far)


def test_uneven_loads_only_cost_more() -> None:
    even = gating_dropout.Cluster().step(128, 0.0)
    drawn = gating_dropout.simulated(CLUSTER, 128, 0.0, steps=20)
    assert even < drawn < 1.2 * even


@pytest.mark.parametrize("page", gating_dropout.PAGES)
def test_tables_of_pages_are_made_from_the_record(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert gating_dropout.PLACE.search(text)
    assert gating_dropout.filled(text) == text
