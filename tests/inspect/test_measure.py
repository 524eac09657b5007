"""The numbers of an inspection are those of their definitions, counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moduli.inspect.duplicates import CHUNK, duplicate_experts, similarity
from moduli.inspect.measure import Measure, labels_of_tokens, mutual_information
from moduli.inspect.watching import ExpertLayer, Seen
from moduli.routing import Routing
from moduli.surgery.modular import routed_layers
from tests import families
from tests.inspect import models

LAYER = ExpertLayer("a", nn.Identity(), 4, "")


@pytest.fixture(autouse=True)
def _no_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Identity, "num_experts", 4, raising=False)


def seen(
    experts: list[list[int]], real: list[bool] | None = None, *, layer: str = "a", **rest: object
) -> Seen:
    index = torch.tensor(experts)
    routing = Routing(index, rest.pop("weights", torch.ones(index.shape)), **rest)  # type: ignore[arg-type]
    return Seen(layer, routing, None if real is None else torch.tensor(real))


def test_one_layer_by_hand() -> None:
    measure = Measure([LAYER], ("bad", "good"))
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0], [9.0, 9.0]])
    one = seen([[0, 1], [0, 2], [1, 0], [3, 3]], [True, True, True, False], weights=weights)
    measure.add([one], "films", torch.tensor([1, 0]))  # two examples of two tokens each
    (found,) = measure.inspections()
    assert (found.tokens, found.padding, found.top_k, found.active) == (3, 0.25, 2, 2.0)
    assert found.load == pytest.approx((3 / 6, 2 / 6, 1 / 6, 0))
    assert found.mass == pytest.approx((1.25 / 3, 1.25 / 3, 0.5 / 3, 0))
    assert found.dead == (3,)
    assert found.entropy is None
    entropy = -(math.log(0.5) / 2 + math.log(1 / 3) / 3 + math.log(1 / 6) / 6) / math.log(4)
    assert found.load_entropy == pytest.approx(entropy)
    assert found.coselection is not None
    expected = ((1, 2 / 3, 1 / 3, 0), (2 / 3, 2 / 3, 0, 0), (1 / 3, 0, 1 / 3, 0), (0, 0, 0, 0))
    for row, wanted in zip(found.coselection, expected, strict=True):
        assert row == pytest.approx(wanted)
    assert found.by_domain == {"films": found.load}
    assert found.by_class["good"] == pytest.approx((0.5, 0.25, 0.25, 0))
    assert found.by_class["bad"] == pytest.approx((0.5, 0.5, 0, 0))


def test_idle_slots_do_not_count() -> None:
    measure = Measure([LAYER])
    active = torch.tensor([[True, False], [True, True]])
    measure.add([seen([[0, 1], [2, 3]], active=active)], "x")
    (found,) = measure.inspections(coselection=False)
    assert found.load == pytest.approx((1 / 3, 0, 1 / 3, 1 / 3))
    assert found.active == 1.5
    assert found.coselection is None


@pytest.mark.parametrize(("scores", "expected"), [([0.0] * 4, 1.0), ([99.0, 0, 0, 0], 0.0)])
def test_entropy_of_the_router(scores: list[float], expected: float) -> None:
    measure = Measure([LAYER])
    measure.add([seen([[0], [1]], scores=torch.tensor([scores, scores]))], "x")
    assert measure.inspections()[0].entropy == pytest.approx(expected)


def test_domains_are_counted_apart() -> None:
    measure = Measure([LAYER])
    measure.add([seen([[0], [0]])], "films")
    measure.add([seen([[1], [2]])], "books")
    (found,) = measure.inspections()
    assert found.by_domain == {"films": (1, 0, 0, 0), "books": (0, 0.5, 0.5, 0)}
    assert found.load == (0.5, 0.25, 0.25, 0)


def test_labels_of_tokens() -> None:
    assert labels_of_tokens(torch.tensor([1, 0]), 4) is not None
    assert labels_of_tokens(torch.tensor([1, 0]), 4).tolist() == [1, 1, 0, 0]  # type: ignore[union-attr]
    per_position = torch.tensor([[1, -100], [-100, 0]])
    assert labels_of_tokens(per_position, 4).tolist() == [1, -100, -100, 0]  # type: ignore[union-attr]
    assert labels_of_tokens(per_position, 6) is None
    assert labels_of_tokens(None, 6) is None


def test_overlap_agrees_with_scikit_learn() -> None:
    from sklearn.metrics import normalized_mutual_info_score

    x, y = torch.randint(4, (200, 1)), torch.randint(3, (200, 1))
    y = torch.where(torch.rand(200, 1) < 0.5, x.clamp(max=2), y)
    real = torch.rand(200) < 0.8
    layers = [
        LAYER,
        ExpertLayer("b", nn.Identity(), 4, ""),
        ExpertLayer("c", nn.Identity(), 4, "z"),
    ]
    measure = Measure(layers)
    mask = real.tolist()
    found = [seen(x.tolist(), mask), seen(y.tolist(), mask, layer="b")]
    measure.add([*found, seen(x.tolist(), mask, layer="c")], "x")
    overlap = measure.overlap()
    expected = normalized_mutual_info_score(x[real, 0], y[real, 0])
    assert overlap[0][1] == overlap[1][0] == pytest.approx(expected)
    assert overlap[0][0] == pytest.approx(1)
    assert overlap[0][2] is None  # another stack sees other tokens


@pytest.mark.parametrize(("experts", "tokens"), [(4, 2000), (16, 300), (64, 1000)])
def test_what_chance_makes_of_overlap_is_what_scikit_learn_expects(
    experts: int, tokens: int
) -> None:
    """And what layers have that know nothing of each other; the loads are far from equal."""
    from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information

    load = torch.rand(2, experts) ** 2
    x, y = torch.multinomial(load, tokens, replacement=True).unsqueeze(2)
    layers = [ExpertLayer(name, nn.Identity(), experts, "") for name in ("a", "b", "c")]
    measure = Measure(layers)
    choices = {"a": x, "b": y, "c": x}
    measure.add([seen(found.tolist(), layer=name) for name, found in choices.items()], "x")
    overlap, by_chance = measure.overlap(), measure.overlap_by_chance()
    table = contingency_matrix(x[:, 0], y[:, 0])
    entropy = [float(torch.special.entr(v.bincount() / tokens).sum()) for v in (x[:, 0], y[:, 0])]
    expected = 2 * expected_mutual_information(table, tokens) / sum(entropy)
    assert expected > 0
    assert by_chance[0][1] == by_chance[1][0] == pytest.approx(expected, rel=1 / experts**0.5)
    assert overlap[0][1] == pytest.approx(expected, rel=4 / experts**0.5)
    assert overlap[0][2] == pytest.approx(1)
    assert by_chance[0][2] < 0.6 * overlap[0][2]  # here the layers do agree


def test_layers_that_are_not_compared_have_no_chance_either() -> None:
    measure = Measure([LAYER, ExpertLayer("b", nn.Identity(), 4, "z")])
    measure.add([seen([[0], [1]]), seen([[0], [1]], layer="b")], "x")
    assert [[v is None for v in row] for row in measure.overlap_by_chance()] == [
        [False, True],
        [True, False],
    ]


def test_mutual_information_ends() -> None:
    assert mutual_information(torch.tensor([[5, 0], [0, 7]])) == pytest.approx(1)
    assert mutual_information(torch.tensor([[2, 4], [3, 6]])) == pytest.approx(0, abs=1e-9)
    assert mutual_information(torch.tensor([[9, 0], [0, 0]])) == 1


def test_copies_are_duplicates_and_neurons_are_not() -> None:
    model = models.owned()
    layer = model.get_submodule("bert.encoder.layer.0.output.dense")
    pairs = duplicate_experts(layer)
    assert [pair[:2] for pair in pairs] == [(i, j) for i in range(4) for j in range(i + 1, 4)]
    assert all(s == pytest.approx(1) for *_, s in pairs)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter[2] = torch.randn_like(parameter[2])
    assert [pair[:2] for pair in duplicate_experts(layer)] == [(0, 1), (0, 3), (1, 3)]
    for split in routed_layers(models.split("bert")).values():
        assert duplicate_experts(split) == ()


def test_similarity_in_chunks_is_the_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, zero = torch.randn(3, 5, 7), torch.randn(3, 4), torch.zeros(3, 6)
    cosine = nn.functional.cosine_similarity
    expected = torch.stack(
        [cosine(t.flatten(1)[:, None], t.flatten(1)[None], dim=-1) for t in (a, b)]
    ).mean(0)
    monkeypatch.setattr("moduli.inspect.duplicates.CHUNK", 4)
    assert CHUNK > 4
    torch.testing.assert_close(similarity([a, b, zero]).float(), expected)


@pytest.mark.parametrize("name", families.MOE)
def test_stock_experts_with_equal_tensors_are_found(name: str) -> None:
    from moduli.inspect.watching import expert_layers

    layer = expert_layers(families.moe(name))[1].module
    assert duplicate_experts(layer) == ()
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter[3] = 1.01 * parameter[1]
    assert [pair[:2] for pair in duplicate_experts(layer)] == [(1, 3)]
