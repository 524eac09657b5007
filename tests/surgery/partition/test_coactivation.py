"""Co-activation: the matrix by its definition, the graph, METIS, and equal sizes."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moduli.errors import ConfigError, DataError
from moduli.surgery.locate import find_ffns
from moduli.surgery.partition import (
    Coactivation,
    balanced_sizes,
    coactivation_labels,
    observe,
    rebalance,
)
from moduli.surgery.partition.coactivation import RECTIFY
from moduli.surgery.partition.graph import graph_edges, threshold
from moduli.surgery.partition.observe import real_tokens
from tests import tiny

F = 12


def by_definition(z: Tensor, rectify: str, tokens: int, cap: float) -> Tensor:
    total = torch.zeros(z.shape[1], z.shape[1])
    for start in range(0, len(z) - tokens + 1, tokens):
        r = RECTIFY[rectify](z[start : start + tokens])
        total += sum(torch.outer(row, row) for row in r).clamp(max=cap)
    return total


@pytest.mark.parametrize("rectify", sorted(RECTIFY))
@pytest.mark.parametrize(("tokens", "cap"), [(8, 1.0), (3, 0.5)])
def test_the_matrix_is_its_definition_however_the_stream_is_cut(
    rectify: str, tokens: int, cap: float
) -> None:
    z = torch.randn(45, F) / 3
    for cut in ([45], [1] * 45, [7, 20, 18]):
        counter = Coactivation(F, rectify=rectify, tokens=tokens, cap=cap)
        for part in z.split(cut):
            counter.add(part)
        expected = by_definition(z, rectify, tokens, cap)
        torch.testing.assert_close(counter.matrix(), expected, rtol=1e-5, atol=1e-6)
        assert counter.counted == 45 // tokens * tokens


def test_no_more_tokens_than_allowed() -> None:
    z, seen = torch.randn(100, F), []
    counter = Coactivation(F, max_tokens=36, progress=seen.append)
    for part in z.split(25):
        counter.add(part)
    assert counter.full
    assert counter.counted == 32
    assert seen == [24, 32, 32, 32]
    torch.testing.assert_close(counter.matrix(), by_definition(z[:32], "relu", 8, 1.0))


def test_what_coactivation_cannot_do() -> None:
    counter = Coactivation(F)
    counter.add(torch.randn(7, F))
    with pytest.raises(DataError, match="8 tokens"):
        counter.matrix()
    with pytest.raises(ConfigError, match="neurons"):
        counter.add(torch.randn(7, F + 1))
    with pytest.raises(ConfigError, match="cap"):
        Coactivation(F, cap=0.0)


@pytest.mark.usefixtures("without_shape_checks")
def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'gelu'.*relu"):
        Coactivation(F, rectify="gelu")  # type: ignore[arg-type]


def test_the_threshold_is_the_first_positive_percentile() -> None:
    a = torch.zeros(10, 10)
    a.view(-1)[75:] = torch.arange(1.0, 26.0)
    assert threshold(a) == np.percentile(a.numpy(), 80)
    assert threshold(a + 1) == 1
    assert threshold(a - 5) > 0
    with pytest.raises(DataError, match="active together"):
        threshold(torch.zeros(4, 4))
    with pytest.raises(DataError, match="NaN"):
        threshold(torch.full((4, 4), float("nan")))


def test_edges_are_symmetric_and_weighted_in_units_of_the_threshold() -> None:
    a = torch.rand(9, 9) * 5
    a = a + a.T
    limit = 0.99 * threshold(a)
    a[2, 7] *= 1 - 1e-6  # as sums in another order may differ
    starts, columns, weights = graph_edges(a)
    dense = np.zeros((9, 9), np.int64)
    for i in range(9):
        dense[i, columns[starts[i] : starts[i + 1]]] = weights[starts[i] : starts[i + 1]]
    assert (dense == dense.T).all()
    expected = (torch.maximum(a, a.T) / limit).floor().long().fill_diagonal_(0)
    assert (dense == expected.numpy()).all()
    with pytest.raises(DataError, match="active together"):
        graph_edges(torch.eye(5))  # every neuron only with itself


def blocks(width: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels, and ReLU activity in which neurons of one label fire together."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(width)[torch.randperm(width, generator=generator)] % experts
    drive = 3 * torch.randn(4000, experts, generator=generator) - 2
    return labels, drive[:, labels] + torch.randn(4000, width, generator=generator) / 3


@pytest.mark.parametrize(("width", "experts"), [(64, 2), (96, 8), (120, 12)])
def test_metis_finds_neurons_that_fire_together(width: int, experts: int) -> None:
    truth, z = blocks(width, experts)
    counter = Coactivation(width)
    counter.add(z)
    labels = coactivation_labels(counter.matrix(), experts)
    pairs = {(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}
    assert len(pairs) == experts  # the same partition, under other names
    assert torch.equal(labels, coactivation_labels(counter.matrix(), experts))


def test_ragged_sizes_huge_weights_and_one_expert() -> None:
    _, z = blocks(50, 7)
    counter = Coactivation(50)
    counter.add(z)
    matrix = counter.matrix()
    labels = coactivation_labels(matrix, 7)
    assert sorted(labels.bincount().tolist()) == sorted(balanced_sizes(50, 7))
    assert coactivation_labels(matrix, 1).tolist() == [0] * 50
    matrix = matrix.clone()
    matrix[matrix > matrix.quantile(0.9)] *= 1e12  # sums far beyond 32-bit integers
    labels = coactivation_labels(matrix, 7)
    assert sorted(labels.bincount().tolist()) == sorted(balanced_sizes(50, 7))
    with pytest.raises(ConfigError, match="num_experts"):
        coactivation_labels(matrix, 51)


def test_without_metis_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    with pytest.raises(ConfigError, match=r"moduli\[graph\]"):
        coactivation_labels(torch.rand(8, 8), 2)


@given(
    labels=st.integers(1, 6).flatmap(
        lambda e: st.tuples(st.just(e), st.lists(st.integers(0, e - 1), min_size=e, max_size=40))
    ),
    seed=st.integers(0, 5),
)
@settings(max_examples=80, deadline=None)
def test_rebalancing_moves_as_few_neurons_as_it_can(
    labels: tuple[int, list[int]], seed: int
) -> None:
    experts, parts = labels
    before = torch.tensor(parts)
    after = rebalance(before, experts, seed=seed)
    counts = torch.bincount(before, minlength=experts)
    sizes = torch.bincount(after, minlength=experts)
    assert sorted(sizes.tolist()) == sorted(balanced_sizes(len(parts), experts))
    # Parts in order of size get the sizes in that order: no other target needs fewer moves.
    best = (
        (
            counts.sort(descending=True).values
            - torch.tensor(sorted(balanced_sizes(len(parts), experts), reverse=True))
        )
        .clamp_min(0)
        .sum()
    )
    assert int((before != after).sum()) == int(best)
    assert torch.equal(after, rebalance(before, experts, seed=seed))


def test_labels_that_are_not_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 to 2"):
        rebalance(torch.tensor([0, 3, 1]), 3)


@pytest.mark.parametrize("family", sorted(tiny.MODELS))
def test_observing_shows_real_tokens_only(family: str) -> None:
    model = tiny.build(family).train()
    ffns = find_ffns(model)
    batch = tiny.batch(tiny.rows(family, 3))
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(ffn, x, z):  # type: ignore[no-untyped-def]
        seen[ffn.name] = (x, z)

    observe(model, ffns, [batch], see)
    assert list(seen) == [f.name for f in ffns]
    for ffn in ffns:
        x, z = seen[ffn.name]
        real = batch["attention_mask"].sum() if "attention_mask" in batch else len(x)
        assert x.shape == (int(real), tiny.WIDTH)
        torch.testing.assert_close(z, ffn.first(x))
        assert not z.requires_grad
    assert model.training
    assert not any(f.first._forward_hooks for f in ffns)


def test_a_decoder_has_its_own_mask() -> None:
    model = tiny.build("bert")
    ffn = find_ffns(model)[0]
    own = replace(ffn, name="decoder.block.0.layer.2")
    batch = {
        "attention_mask": torch.tensor([[1, 1, 0]]),
        "decoder_attention_mask": torch.tensor([[1, 0, 0]]),
    }
    shape = torch.Size((1, 3))
    # A decoder alone (OPT) names its layers so as well, and has one mask.
    assert real_tokens(model, own, batch, shape).tolist() == [[True, True, False]]
    model.config.is_encoder_decoder = True
    assert real_tokens(model, own, batch, shape).tolist() == [[True, False, False]]
    assert real_tokens(model, ffn, batch, shape).tolist() == [[True, True, False]]
    assert real_tokens(model, ffn, batch, torch.Size((1, 4))) is None
    assert real_tokens(model, ffn, {}, shape) is None
