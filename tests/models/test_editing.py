"""The verbs take what the functions of a kind of model take, and say so in their signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import moduli
from moduli.models.moduleformer import growing, pruning, usage

PAIRS = [
    (moduli.extend, growing.extend),
    (moduli.prune, pruning.prune),
    (moduli.expert_use, usage.expert_use),
]


@pytest.mark.parametrize(("verb", "function"), PAIRS, ids=lambda f: f.__name__)
def test_settings_and_their_defaults(
    verb: Callable[..., Any], function: Callable[..., Any]
) -> None:
    def settings(f: Callable[..., Any]) -> dict[str, Any]:
        return {name: (p.kind, p.default) for name, p in inspect.signature(f).parameters.items()}

    assert settings(verb) == settings(function)


@pytest.mark.parametrize("verb", [verb for verb, _ in PAIRS], ids=lambda f: f.__name__)
def test_every_setting_is_described(verb: Callable[..., Any]) -> None:
    told = inspect.getdoc(verb) or ""
    for name in inspect.signature(verb).parameters:
        assert f"\n    {name}: " in told
