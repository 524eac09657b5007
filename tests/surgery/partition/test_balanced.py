"""Balanced clustering: balanced, monotone, exact bookkeeping, seeded, interruptible."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moduli.errors import ConfigError
from moduli.surgery.partition import (
    balanced_clusters,
    balanced_sizes,
    explained_variance,
    random_labels,
    split_quality,
)
from moduli.surgery.partition.quality import unit_keys


def keys_with_clusters(groups: int, size: int, dim: int = 8, noise: float = 0.05) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(groups, dim, generator=generator)
    keys = centres.repeat_interleave(size, 0)
    keys = keys + noise * torch.randn(keys.shape, generator=generator)
    return keys[torch.randperm(len(keys), generator=generator)]


@given(
    width=st.integers(1, 60),
    experts=st.integers(1, 60),
    dim=st.integers(1, 5),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_always_balanced_and_never_worse_than_its_start(
    width: int, experts: int, dim: int, seed: int
) -> None:
    keys = torch.randn(width, dim, generator=torch.Generator().manual_seed(seed))
    if experts > width:
        with pytest.raises(ConfigError):
            balanced_clusters(keys, experts)
        return
    labels = balanced_clusters(keys, experts, seed=seed, starts=1)
    assert sorted(torch.bincount(labels, minlength=experts).tolist()) == sorted(
        balanced_sizes(width, experts)
    )
    start = random_labels(width, experts, seed)
    assert split_quality(keys, labels).objective <= split_quality(keys, start).objective + 1e-9


@pytest.mark.parametrize(("groups", "size"), [(4, 6), (5, 20), (16, 4)])
def test_finds_clusters_that_are_there(groups: int, size: int) -> None:
    keys = keys_with_clusters(groups, size)
    labels = balanced_clusters(keys, groups)
    assert split_quality(keys, labels).share > 0.95


@pytest.mark.parametrize("width", [6, 7])
def test_no_single_swap_improves_the_result(width: int) -> None:
    """Local optimality by brute force, ragged sizes included."""
    keys = torch.randn(width, 3, generator=torch.Generator().manual_seed(3))
    labels = balanced_clusters(keys, 3, starts=1)
    best = split_quality(keys, labels).objective
    for p, q in itertools.combinations(range(width), 2):
        other = labels.clone()
        other[[p, q]] = labels[[q, p]]
        assert split_quality(keys, other).objective >= best - 1e-6


def test_blocks_of_the_gram_matrix_give_what_the_whole_gives() -> None:
    keys = torch.randn(700, 24, generator=torch.Generator().manual_seed(0))
    whole = balanced_clusters(keys, 10, starts=1)
    blocks = balanced_clusters(keys, 10, starts=1, memory_limit=1 << 16)
    one, other = split_quality(keys, whole), split_quality(keys, blocks)
    assert abs(one.explained - other.explained) < 0.02 * one.explained


def test_seeded_and_more_starts_are_never_worse() -> None:
    keys = torch.randn(120, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(balanced_clusters(keys, 8, seed=3), balanced_clusters(keys, 8, seed=3))
    assert not torch.equal(
        balanced_clusters(keys, 8, seed=3, starts=1), balanced_clusters(keys, 8, seed=4, starts=1)
    )
    one, four = (
        split_quality(keys, balanced_clusters(keys, 8, seed=3, starts=n)).objective for n in (1, 4)
    )
    assert four <= one


def test_time_limit_is_kept_and_the_result_is_balanced() -> None:
    keys = torch.randn(3000, 32, generator=torch.Generator().manual_seed(0))
    started = time.monotonic()
    labels = balanced_clusters(keys, 30, time_limit=0.2, starts=50)
    assert time.monotonic() - started < 30  # 50 full searches would take minutes
    assert set(torch.bincount(labels).tolist()) == {100}


def test_progress_and_warm_start() -> None:
    keys = keys_with_clusters(6, 10)
    seen: list[tuple[int, int, float]] = []
    labels = balanced_clusters(keys, 6, starts=1, progress=lambda *step: seen.append(step))
    assert [step[0] for step in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][1] == 0, "the last pass finds nothing to swap"
    assert seen[-1][2] == pytest.approx(split_quality(keys, labels).share, abs=1e-6)
    again: list[tuple[int, int, float]] = []
    warm = balanced_clusters(keys, 6, initial=labels, progress=lambda *step: again.append(step))
    assert torch.equal(warm, labels)
    assert len(again) == 1
    with pytest.raises(ConfigError, match="must name each of 6 experts"):
        balanced_clusters(keys, 6, initial=torch.zeros(60, dtype=torch.long))


def test_quality_against_the_definition() -> None:
    keys = unit_keys(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)))
    labels = random_labels(30, 4, 0)
    points, groups = keys.double().numpy(), labels.numpy()
    within = sum(
        float(((points[groups == i] - points[groups == i].mean(0)) ** 2).sum()) for i in range(4)
    )
    total = float(((points - points.mean(0)) ** 2).sum())
    quality = explained_variance(keys, labels)
    np.testing.assert_allclose([quality.objective, quality.total], [within, total], rtol=1e-12)


def test_equal_keys_and_many_experts_come_to_an_end() -> None:
    keys = torch.eye(4).repeat(50, 1)
    labels = balanced_clusters(keys, 40)
    assert set(torch.bincount(labels).tolist()) == {5}
    assert split_quality(keys, labels).share > 0.99


def test_without_polish_a_swap_may_still_help() -> None:
    keys = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    rough = balanced_clusters(keys, 10, starts=1, polish=False)
    fine = balanced_clusters(keys, 10, starts=1)
    assert split_quality(keys, fine).objective < split_quality(keys, rough).objective


def test_zero_keys_do_not_break_it() -> None:
    keys = torch.zeros(12, 4)
    labels = balanced_clusters(keys, 3)
    assert torch.bincount(labels).tolist() == [4, 4, 4]
    assert split_quality(keys, labels).share == 0.0
