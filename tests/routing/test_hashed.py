"""Hash routing: tables that spread the vocabulary, or its use, and what a router makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moduli.errors import ConfigError, ModelError
from moduli.routing import HashRouter, RouteContext, Rule
from moduli.routing.hashed import balanced_table, random_table

V, E = 101, 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_random_table_gives_every_expert_as_many_tokens() -> None:
    table = random_table(V, E, seeded())
    counts = torch.bincount(table, minlength=E)
    assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(table, random_table(V, E, seeded()))
    assert not torch.equal(table, random_table(V, E, seeded(1)))


def loads(table: Tensor, counts: Tensor) -> Tensor:
    return torch.zeros(E, dtype=torch.long).scatter_add(0, table, counts)


def test_a_balanced_table_gives_every_expert_as_much_work() -> None:
    counts = (1000 / torch.arange(1, V + 1)).long()  # as words of a language
    balanced = loads(balanced_table(counts, E, seeded()), counts)
    # Who ends up first was last when it got its last token, so that this is all it is ahead.
    assert balanced.max() - balanced.min() <= counts[V // 2]
    by_chance = loads(random_table(V, E, seeded()), counts)
    assert balanced.max() < by_chance.max()


def test_tokens_that_were_not_seen_are_spread_too() -> None:
    counts = torch.zeros(V, dtype=torch.long)
    counts[7] = 5
    table = balanced_table(counts, E, seeded())
    others = torch.bincount(table[torch.arange(V) != 7], minlength=E)
    assert int(others.max() - others.min()) <= 5


def test_the_table_decides_and_nothing_else() -> None:
    table = random_table(V, E, seeded())
    router = HashRouter(table, E)
    ids = torch.randint(V, (30,))
    routing = router(torch.randn(30, 8), RouteContext(ids=ids))
    assert torch.equal(routing.experts[:, 0], table[ids])
    assert torch.equal(routing.weights, torch.ones(30, 1))
    assert routing.active is None
    assert routing.scores is None
    assert not list(router.parameters())
    assert torch.equal(router.state_dict()["table"], table)


def test_without_ids_it_says_what_is_missing() -> None:
    router = HashRouter(random_table(V, E, seeded()), E)
    with pytest.raises(ModelError, match=r"by their ids.*not inputs_embeds"):
        router(torch.randn(3, 8), RouteContext())


def test_a_table_has_one_expert_per_token() -> None:
    router = HashRouter(random_table(V, E, seeded()), E)
    router.rule = Rule(top_k=2)
    with pytest.raises(ConfigError, match=r"top_k is 2.*one expert per token"):
        router(torch.randn(3, 8), RouteContext(ids=torch.tensor([0, 1, 2])))
