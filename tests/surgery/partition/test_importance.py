"""Gradient splits: the greedy one against its definition, the sharing ones, and the scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moduli.errors import ConfigError, DataError
from moduli.surgery.locate import find_ffns
from moduli.surgery.partition import (
    balanced_sizes,
    greedy_labels,
    inner_sharing_members,
    inter_sharing,
    kmeans_groups,
    neuron_importance,
)
from tests import tiny


def scores_of(experts: int, width: int, seed: int, ties: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 3, (experts, width), generator=generator).float()
    return torch.rand(experts, width, generator=generator)


def greedy_by_definition(scores: Tensor, sizes: tuple[int, ...], largest: bool) -> list[int]:
    sign = 1 if largest else -1
    experts, width = scores.shape
    labels = [-1] * width
    for _ in range(width):
        proposals = []
        for i in range(experts):
            if labels.count(i) == sizes[i]:
                continue
            left = [j for j in range(width) if labels[j] < 0]
            best = max(left, key=lambda j: (sign * float(scores[i, j]), -j))
            proposals.append((sign * float(scores[i, best]), i, best))
        _, expert, neuron = max(proposals)
        labels[neuron] = expert
    return labels


@given(
    experts=st.integers(1, 5),
    width=st.integers(5, 14),
    seed=st.integers(0, 20),
    ties=st.booleans(),
    largest=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_greedy_is_its_definition(
    experts: int, width: int, seed: int, ties: bool, largest: bool
) -> None:
    scores = scores_of(experts, width, seed, ties)
    sizes = balanced_sizes(width, experts)
    labels = greedy_labels(scores, largest=largest)
    assert labels.tolist() == greedy_by_definition(scores, sizes, largest)
    assert tuple(torch.bincount(labels, minlength=experts).tolist()) == sizes


def test_greedy_takes_any_sizes_that_divide_the_neurons() -> None:
    scores = scores_of(3, 10, 0, False)
    assert greedy_labels(scores, (1, 6, 3)).bincount().tolist() == [1, 6, 3]
    for wrong in [(5, 5), (1, 6, 4), (0, 7, 3)]:
        with pytest.raises(ConfigError, match="sizes"):
            greedy_labels(scores, wrong)
    with pytest.raises(ConfigError, match="NaN"):
        greedy_labels(torch.full((3, 10), float("nan")))


def test_inner_sharing_takes_the_best_of_each_expert() -> None:
    scores = scores_of(4, 20, 1, False)
    for largest in (True, False):
        members = inner_sharing_members(scores, 7, largest=largest)
        for own, row in zip(members, scores, strict=True):
            assert row[own].tolist() == row.sort(descending=largest).values[:7].tolist()
    with pytest.raises(ConfigError, match="size"):
        inner_sharing_members(scores, 21)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("residual", [0, 1, 2])
def test_inter_sharing_without_overlap_is_a_partition(residual: int, largest: bool) -> None:
    scores = scores_of(3, 4 * (3 + residual), 2, False)
    split = inter_sharing(scores, 4, residual, largest=largest)
    assert len(split.residual) == residual
    assert len(split.routed) == 3
    everyone = torch.cat([*split.residual, *split.routed])
    assert sorted(everyone.tolist()) == list(range(scores.shape[1]))
    if not residual:
        labels = greedy_labels(scores, largest=largest)
        for i, own in enumerate(split.routed):
            assert sorted(own.tolist()) == (labels == i).nonzero().flatten().tolist()


def test_what_all_experts_want_becomes_residual() -> None:
    scores = scores_of(4, 30, 3, False)
    scores[:, [17, 4, 29]] += 1
    split = inter_sharing(scores, 3, 1, share=True)
    assert split.residual[0].tolist() == [4, 17, 29]
    rest = scores.clone()
    rest[:, [17, 4, 29]] = -1
    for own, best in zip(split.routed, inner_sharing_members(rest, 3), strict=True):
        assert torch.equal(own, best)


def test_inter_sharing_says_what_does_not_fit() -> None:
    scores = scores_of(3, 12, 0, False)
    with pytest.raises(ConfigError, match="share=True"):
        inter_sharing(scores, 2, 1)
    with pytest.raises(ConfigError, match="size up to 6"):
        inter_sharing(scores, 7, 1, share=True)


def batches(family: str, counts: tuple[int, ...]) -> list[dict[str, Tensor]]:
    return [tiny.batch(tiny.rows(family, n, seed=i)) for i, n in enumerate(counts)]


def by_autograd(model: Any, ffn: Any, group: list[dict[str, Tensor]]) -> Tensor:
    """|a dL/da| from the difference that one factor per token and neuron makes to the loss."""
    rows = []
    for batch in group:
        one: list[Tensor] = []

        def scale(module: Any, args: tuple[Tensor], one: list[Tensor] = one) -> Tensor:
            one.append(torch.ones_like(args[0]).requires_grad_())
            return args[0] * one[0]

        handle = ffn.last.register_forward_pre_hook(scale)
        (grad,) = torch.autograd.grad(model(**batch).loss, one)
        handle.remove()
        grad = grad.flatten(0, -2)
        if "attention_mask" in batch:
            grad = grad[batch["attention_mask"].flatten().bool()]
        rows.append(grad.abs())
    return torch.cat(rows).mean(0)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", sorted(tiny.MODELS))
def test_importance_is_the_effect_of_scaling_a_neuron(family: str, frozen: bool) -> None:
    model = tiny.build(family)
    ffns = find_ffns(model)
    groups = [batches(family, (3, 2)), batches(family, (1,))]
    expected = {f.name: torch.stack([by_autograd(model, f, g) for g in groups]) for f in ffns}
    model.requires_grad_(not frozen).train()
    seen: list[tuple[int, int]] = []
    found = neuron_importance(model, ffns, groups, progress=lambda *at: seen.append(at))
    assert set(found) == {f.name for f in ffns}
    for name, scores in found.items():
        assert bool((scores > 0).any())
        torch.testing.assert_close(scores, expected[name], rtol=1e-4, atol=1e-7)
    assert seen == [(0, 1), (0, 2), (1, 1)]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(f.last._forward_pre_hooks for f in ffns)


def test_importance_needs_a_loss_and_tokens() -> None:
    model = tiny.build("bert")
    ffns = find_ffns(model)
    (batch,) = batches("bert", (2,))
    labels = batch.pop("labels")
    with pytest.raises(DataError, match="labels"):
        neuron_importance(model, ffns, [[batch]])
    with pytest.raises(DataError, match="group 1"):
        neuron_importance(model, ffns, [[{**batch, "labels": labels}], []])


def test_groups_are_clusters() -> None:
    centres = torch.eye(5) * 10
    where = torch.arange(60) % 5
    found = kmeans_groups(centres[where] + 0.1 * torch.randn(60, 5), 5, seed=0)
    assert all(found[where == i].unique().numel() == 1 for i in range(5))
    assert found.unique().numel() == 5
