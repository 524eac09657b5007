"""The routing plan: uniform, independent, a function of seed and step alone."""

import itertools
from collections import Counter
from typing import Any

from scipy.stats import chi2_contingency, chisquare

from moduli.methods.thor.plan import RoutingPlan, draw_plan

N, LAYERS = 3, 2


def plans(count: int = 3000, **changes: Any) -> list[RoutingPlan]:
    given = {"layers": LAYERS, "num_experts": N, "passes": 2, **changes}
    return [draw_plan(7, step, 0, **given) for step in range(count)]


def test_every_layer_and_pass_draws_uniformly_and_apart_from_the_others() -> None:
    drawn = plans()
    places = list(itertools.product(range(2), range(LAYERS)))
    for number, layer in places:
        counts = Counter(plan.experts[number][layer] for plan in drawn)
        assert chisquare([counts[e] for e in range(N)]).pvalue > 0.001
    for one, other in itertools.combinations(places, 2):
        table = [[0] * N for _ in range(N)]
        for plan in drawn:
            table[plan.experts[one[0]][one[1]]][plan.experts[other[0]][other[1]]] += 1
        assert chi2_contingency(table).pvalue > 0.001


def test_distinct_passes_never_meet_and_stay_uniform() -> None:
    drawn = plans(pair="distinct")
    pairs = Counter(tuple(one[0] for one in plan.experts) for plan in drawn)
    assert set(pairs) == set(itertools.permutations(range(N), 2))
    assert chisquare(list(pairs.values())).pvalue > 0.001
    everyone = plans(20, pair="distinct", passes=3)
    assert all({one[1] for one in plan.experts} == {0, 1, 2} for plan in everyone)


def test_a_plan_depends_on_seed_step_and_micro_step_alone() -> None:
    given: dict[str, Any] = {"layers": 20, "num_experts": N, "passes": 2}
    one = draw_plan(1, 2, 3, **given)
    assert draw_plan(1, 2, 3, **given) == one
    others = [draw_plan(*numbers, **given) for numbers in [(2, 2, 3), (1, 3, 3), (1, 2, 4)]]
    assert len({one.experts, *(other.experts for other in others)}) == 4
    more = draw_plan(1, 2, 3, **{**given, "passes": 3})
    assert more.experts[:2] == one.experts  # a pass does not depend on how many follow
