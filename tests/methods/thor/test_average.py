"""Inference by the mean of experts: made once in evaluation, and again when an expert changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moduli.surgery import stochastic
from moduli.surgery.stochastic import stochastic_projections
from tests.methods.thor.models import build, labelled, parted


def _experts(model: Any) -> Any:
    return next(iter(stochastic_projections(model).values())).experts


def _in_place(model: Any) -> None:
    _experts(model)[1].weight.add_(0.5)


def _past_the_counter(model: Any) -> None:
    _experts(model)[1].weight.data.mul_(1.5)


def _loaded(model: Any) -> None:
    _experts(model)[1].load_state_dict(
        {n: t + 1 for n, t in _experts(model)[2].state_dict().items()}
    )


def _other_memory(model: Any) -> None:
    expert = _experts(model)[1]
    expert.weight = torch.nn.Parameter(expert.weight + 0.5)


@torch.no_grad()
@pytest.mark.parametrize("change", [_in_place, _past_the_counter, _loaded, _other_memory])
def test_a_mean_that_was_kept_is_not_stale(change: Callable[[Any], None]) -> None:
    model, batch = parted(build("bert")).eval(), labelled("bert")
    before = model(**batch).logits
    change(model)
    after = model(**batch).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, copy.deepcopy(model)(**batch).logits, rtol=0, atol=0)


def test_a_mean_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = parted(build("llama")).eval(), labelled("llama")
    made, mean = [], stochastic.mean_tensors

    def counted(projection: Any) -> Any:
        made.append(projection)
        return mean(projection)

    monkeypatch.setattr(stochastic, "mean_tensors", counted)
    with torch.no_grad():
        first = model(**batch).logits
        assert len(made) == len(stochastic_projections(model))
        torch.testing.assert_close(model(**batch).logits, first, rtol=0, atol=0)
        assert len(made) == len(stochastic_projections(model))
    model(**batch).loss.backward()  # gradients reach all experts
    assert all(p.grad is not None for p in _experts(model).parameters())
