"""The bench of a layer: who is wrong gets no number, floors and ratios are what they say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moduli.bench.candidates import Candidate, candidates
from moduli.bench.cases import LayerCase
from moduli.bench.checking import deviation, evaluate, expected
from moduli.bench.layer import machine_floor, measure_layer
from moduli.bench.layers import Layer, Visit, build, decode_layers
from moduli.bench.machine import Machine
from moduli.bench.protocol import Clock, Reading
from moduli.bench.rows import LayerRow
from moduli.errors import ConfigError

CPU = torch.device("cpu")
SMALL = LayerCase(tokens=40, hidden=16, experts=4, top_k=2)
KINDS = [
    replace(SMALL, mode=mode, gated=gated, owned=owned, dtype=dtype, width=12)
    for mode, gated, owned, dtype in itertools.product(
        ("forward", "train"), (False, True), (False, True), ("float32", "bfloat16")
    )
]


def ticking() -> Clock:
    """A clock that advances by a second whenever it is read."""
    ticks = itertools.count()

    def read() -> Reading:
        now = float(next(ticks))
        return Reading(now, now)

    return Clock(read)


def named(case: LayerCase, name: str) -> Candidate:
    return next(c for c in candidates(case, CPU) if c.name == name)


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.label)
def test_everybody_agrees_with_the_reference(case: LayerCase) -> None:
    (layer,) = build(case, CPU)
    visit = layer.visits[0]
    for candidate in candidates(case, CPU):
        if candidate.name in ("auto", "dense", "transformers eager", "autograd", "masked"):
            reference = expected(layer, visit, routed=candidate.routed)
            error = deviation(evaluate(candidate, layer, visit), reference)
            assert error < (1e-5 if case.dtype == "float32" else 5e-2), candidate.name


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_wrong_candidate_gets_no_number(mode: str, machine: Machine) -> None:
    case = replace(SMALL, mode=mode)  # type: ignore[arg-type]
    right = named(case, "auto")

    def one_token_elsewhere(layer: Layer, visit: Visit) -> Tensor:
        index = visit.routing.experts.clone()
        index[7] = (index[7] + 1) % case.experts
        return right.compute(layer, replace(visit, routing=replace(visit.routing, experts=index)))

    def not_a_number(layer: Layer, visit: Visit) -> Tensor:
        return right.compute(layer, visit) * float("nan")

    def raises(layer: Layer, visit: Visit) -> Tensor:
        raise ConfigError("cannot do this\nfor a long reason")

    def no_gradient(layer: Layer, visit: Visit) -> Tensor:
        y = right.compute(layer, visit)
        return y.detach() + 0 * visit.x

    wrong = [one_token_elsewhere, not_a_number, raises]
    wrong += [no_gradient] if mode == "train" else []
    among = [right, *(replace(right, name=f.__name__, compute=f) for f in wrong)]
    row = measure_layer(case, machine, settings="defaults", clock=ticking(), among=among)
    assert row.ms("auto") is not None
    for candidate in among[1:]:
        entry = row.entry(candidate.name)
        assert entry is not None
        assert entry.ms is None
        assert entry.note is not None
        assert row.ahead(entry) is None
    raised = row.entry("raises")
    assert raised is not None
    assert raised.note == "ConfigError: cannot do this"


def test_bytes_for_backward_leave_out_weights_and_tokens(machine: Machine) -> None:
    case = replace(SMALL, mode="train", width=12)
    row = measure_layer(case, machine, settings="defaults", clock=ticking())
    stock, dense = row.entry("transformers eager"), row.entry("dense")
    assert dense is not None
    # Pre-activation and activation of all neurons.
    assert dense.saved_bytes == 2 * 40 * 4 * 12 * 4
    assert row.saved(dense) == pytest.approx(2 * 40 * 4 * 12 * 4 / (40 * 2 * 12 * 4))
    assert stock is not None
    assert stock.saved_bytes is not None
    ours = row.entry("auto")
    assert ours is not None
    assert ours.saved_bytes is not None
    assert ours.saved_bytes < stock.saved_bytes


def test_floor_is_the_share_of_the_fastest_dense_form(machine: Machine) -> None:
    row = measure_layer(SMALL, machine, settings="defaults", clock=ticking())
    dense = min(e.ms for e in row.entries if e.role == "dense" and e.ms is not None)
    assert row.floor_ms == pytest.approx(dense / 2)
    owned = measure_layer(replace(SMALL, owned=True), machine, settings="defaults", clock=ticking())
    # Its dense form has the neurons of top_k experts, so that it is the floor itself.
    assert owned.dense_share == 1
    assert owned.best_peer is not None
    assert owned.best_peer.role == "peer"


def test_floor_of_one_token_is_the_time_of_reading_its_experts(machine: Machine) -> None:
    case = LayerCase(tokens=1, hidden=64, experts=16, top_k=4, dtype="bfloat16")
    seconds = 2 * 4 * 16 * 64 * 2 / 25e9
    assert machine_floor(case, machine) == pytest.approx(1000 * seconds)
    gated = machine_floor(replace(case, gated=True), machine)
    assert gated == pytest.approx(1500 * seconds)


def test_one_token_goes_through_more_weights_than_a_cache_holds() -> None:
    for hidden in (64, 384, 2048):
        case = LayerCase(tokens=1, hidden=hidden, experts=16, top_k=4)
        assert decode_layers(case) >= 8
        assert decode_layers(case) * case.layer_bytes >= 2**27
    huge = LayerCase(tokens=1, hidden=4096, experts=8, top_k=2, width=14336, gated=True)
    assert decode_layers(huge) == 1


def test_the_same_seed_makes_the_same_layer() -> None:
    (one,), (two,) = build(SMALL, CPU, seed=3), build(SMALL, CPU, seed=3)
    (other,) = build(SMALL, CPU, seed=4)
    assert torch.equal(one.visits[0].x, two.visits[0].x)
    assert torch.equal(one.visits[0].routing.experts, two.visits[0].routing.experts)
    assert torch.equal(one.dense.second, two.dense.second)
    assert not torch.equal(one.visits[0].x, other.visits[0].x)


def test_a_skewed_router_is_skewed() -> None:
    def largest(case: LayerCase) -> int:
        (layer,) = build(case, CPU)
        return int(layer.visits[0].routing.experts.flatten().bincount().max())

    case = LayerCase(tokens=1024, hidden=16, experts=16, top_k=2, width=4)
    assert largest(replace(case, spread="skewed")) > 1.5 * largest(case)


def test_a_row_survives_its_json(machine: Machine) -> None:
    row = measure_layer(SMALL, machine, settings="defaults", clock=ticking())
    data = row.to_dict()
    assert LayerRow.from_dict(data) == row
    auto = next(e for e in data["entries"] if e["name"] == "auto")
    assert auto["ratio_to_floor"] == row.to_floor(row.entry("auto"))
    assert data["choice"] in {e["name"] for e in data["entries"]}
    assert data["best_peer"] is not None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"top_k": 5}, "top_k is 5"),
        ({"experts": 7}, "do not divide"),
        ({"tokens": 0}, "at least 1"),
    ],
)
def test_cases_that_cannot_be_are_refused(settings: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LayerCase(**{"tokens": 8, "hidden": 16, "experts": 4, "top_k": 2, **settings})
