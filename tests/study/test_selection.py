"""A learning rate is chosen by a stated rule from validation scores, whatever the order of runs."""

import dataclasses
import itertools
import json
import random
from collections.abc import Mapping

import pytest

from moduli.errors import ConfigError, UnknownNameError
from moduli.study.selection import RULES, Candidate, Choice, choose
from moduli.training.metrics import CLASS_METRICS, LOSS

ACCURACY = CLASS_METRICS[0]
DOMAINS = ("books", "dvd", "kitchen", "music")


def run(
    rate: float,
    scores: Mapping[str, float],
    *,
    seed: int = 0,
    arm: object = "emoe",
    sources: tuple[str, ...] = ("books",),
    loss: float = 0.5,
) -> Candidate:
    validation = {name: {"accuracy": v, "loss": loss, "n": 10} for name, v in scores.items()}
    return Candidate(arm, sources, seed, rate, sources, validation)


def drawn(seed: int) -> list[Candidate]:
    """Two arms, two strata, three rates, three seeds, with scores that tie now and then."""
    draw = random.Random(seed)
    return [
        run(
            rate,
            {name: draw.choice([0.7, 0.8, 0.9]) for name in DOMAINS},
            seed=one,
            arm=arm,
            sources=sources,
            loss=draw.choice([0.4, 0.5]),
        )
        for arm, sources, rate, one in itertools.product(
            ("dense", "emoe"), (("books",), ("dvd", "music")), (1e-5, 3e-5, 1e-4), range(3)
        )
    ]


def everything(choice: Choice) -> dict[tuple[object, ...], float | None]:
    return {
        (*key, target): choice.learning_rate(*key, target)
        for key in choice.groups
        for target in DOMAINS
    }


def test_the_training_domain_rule_takes_the_best_mean_over_seeds_and_sources() -> None:
    both = ("books", "dvd")
    candidates = [
        # the best single score, and the best out of domain: neither counts
        run(1e-5, {"books": 0.99, "dvd": 0.5, "music": 0.99}, sources=both),
        run(1e-5, {"books": 0.70, "dvd": 0.5, "music": 0.99}, sources=both, seed=1),
        run(3e-5, {"books": 0.80, "dvd": 0.7, "music": 0.10}, sources=both),
        run(3e-5, {"books": 0.80, "dvd": 0.7, "music": 0.10}, sources=both, seed=1),
    ]
    choice = choose(candidates, "training-domain", ACCURACY)
    assert {choice.learning_rate("emoe", both, target) for target in (None, *DOMAINS)} == {3e-5}


def test_leave_one_domain_out_sees_neither_the_sources_nor_the_tested_domain() -> None:
    candidates = [
        run(1e-5, {"books": 0.9, "dvd": 0.9, "music": 0.8, "kitchen": 0.6}),
        run(3e-5, {"books": 0.1, "dvd": 0.1, "music": 0.7, "kitchen": 0.8}),
    ]
    choice = choose(candidates, "leave-one-domain-out", ACCURACY)
    chosen = {target: choice.learning_rate("emoe", ("books",), target) for target in DOMAINS}
    # dvd: 0.70 against 0.75; kitchen: 0.85 against 0.40; music: 0.75 against 0.45
    assert chosen["dvd"] == 3e-5
    assert chosen["kitchen"] == chosen["music"] == 1e-5


def test_only_the_oracle_depends_on_the_tested_domain() -> None:
    target = "kitchen"  # nobody's source

    def chosen(rule: str, sign: int) -> dict[tuple[object, object], float | None]:
        """With the tested domain's validation scores growing with the rate, or falling."""
        candidates = [
            dataclasses.replace(
                c, validation={**c.validation, target: {"accuracy": sign * c.learning_rate}}
            )
            for c in drawn(0)
        ]
        choice = choose(candidates, rule, ACCURACY)
        return {key: choice.learning_rate(*key, target) for key in choice.groups}

    for rule in ("training-domain", "leave-one-domain-out"):
        assert chosen(rule, 1) == chosen(rule, -1)
        assert not RULES[rule].marked
    assert set(chosen("oracle", 1).values()) == {1e-4}
    assert set(chosen("oracle", -1).values()) == {1e-5}
    oracle = choose(drawn(0), "oracle", ACCURACY).to_dict()
    assert oracle["marked"]
    assert oracle["label"] == "oracle: sees the test domain"


def test_test_scores_are_not_an_input() -> None:
    names = {field.name for field in dataclasses.fields(Candidate)}
    assert names == {"arm", "stratum", "seed", "learning_rate", "sources", "validation"}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(10))
def test_the_order_of_runs_does_not_matter(rule: str, seed: int) -> None:
    candidates = drawn(seed)
    shuffled = random.Random(seed).sample(candidates, len(candidates))
    first, second = (choose(given, rule, ACCURACY) for given in (candidates, shuffled))
    assert first == second
    assert everything(first) == everything(second)


@pytest.mark.parametrize("rule", RULES)
def test_the_report_is_json_and_its_means_explain_every_choice(rule: str) -> None:
    choice = choose(drawn(1), rule, ACCURACY)
    report = json.loads(json.dumps(choice.to_dict(), allow_nan=False))
    assert (report["rule"], report["metric"]) == (rule, "accuracy")
    assert len(report["groups"]) == 4
    for group in report["groups"]:
        assert group["seeds"] == [0, 1, 2]
        for made in group["choices"]:
            key = group["arm"], tuple(group["stratum"]), made["target"]
            assert made["learning_rate"] == choice.learning_rate(*key)
            means = {rate["learning_rate"]: rate["mean"] for rate in made["rates"]}
            assert means.keys() == {1e-5, 3e-5, 1e-4}
            assert means[made["learning_rate"]] == max(means.values())
            assert made["target"] not in made["validation"] or rule != "leave-one-domain-out"


def test_a_metric_of_which_less_is_better_is_minimised() -> None:
    candidates = [run(1e-5, {"books": 0.9}, loss=0.7), run(3e-5, {"books": 0.8}, loss=0.6)]
    assert choose(candidates, "training-domain", LOSS).learning_rate("emoe", ("books",)) == 3e-5


def test_ties_go_to_the_lower_loss_and_then_to_the_lower_rate() -> None:
    # 0.8 + 0.9 and 0.85 + 0.85 differ in floating point
    both = ("books", "dvd")
    uneven, even = {"books": 0.8, "dvd": 0.9}, {"books": 0.85, "dvd": 0.85}
    for first, second, expected in [(0.5, 0.4, 3e-5), (0.4, 0.5, 1e-5), (0.5, 0.5, 1e-5)]:
        for one, other in [(uneven, even), (even, uneven)]:
            candidates = [
                run(1e-5, one, sources=both, loss=first),
                run(3e-5, other, sources=both, loss=second),
            ]
            choice = choose(candidates, "training-domain", ACCURACY)
            assert choice.learning_rate("emoe", both) == expected


def test_a_score_that_is_not_a_number_never_wins() -> None:
    candidates = [run(1e-5, {"books": float("nan")}), run(3e-5, {"books": 0.1})]
    assert choose(candidates, "training-domain", ACCURACY).learning_rate("emoe", ("books",)) == 3e-5


def test_only_seeds_that_every_rate_has_finished_count() -> None:
    candidates = [
        run(1e-5, {"books": 0.8}, seed=0),
        run(1e-5, {"books": 0.1}, seed=1),
        run(3e-5, {"books": 0.7}, seed=0),
    ]
    choice = choose(candidates, "training-domain", ACCURACY)
    assert choice.learning_rate("emoe", ("books",)) == 1e-5
    assert choice.groups["emoe", ("books",)].seeds == (0,)


def test_without_a_common_seed_nothing_is_chosen_yet() -> None:
    candidates = [run(1e-5, {"books": 0.8}, seed=0), run(3e-5, {"books": 0.7}, seed=1)]
    for rule in RULES:
        choice = choose(candidates, rule, ACCURACY)
        assert choice.learning_rate("emoe", ("books",), "dvd") is None
        assert choice.learning_rate("dense", ("books",), "dvd") is None
        json.dumps(choice.to_dict(), allow_nan=False)


@pytest.mark.parametrize("rule", RULES)
def test_a_single_rate_needs_no_validation(rule: str) -> None:
    choice = choose([run(3e-5, {}, seed=seed) for seed in range(2)], rule, ACCURACY)
    assert choice.learning_rate("emoe", ("books",), "dvd") == 3e-5
    json.dumps(choice.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("rule", "scores", "works"),
    [
        ("leave-one-domain-out", {"books": 0.8, "dvd": 0.7}, "'training-domain' would work"),
        ("training-domain", {"dvd": 0.7, "music": 0.7}, "'leave-one-domain-out' would work"),
        ("leave-one-domain-out", {"dvd": 0.7}, "A single learning rate works"),
        ("oracle", {}, "A single learning rate works"),
    ],
)
def test_a_rule_without_its_validation_splits_names_what_works(
    rule: str, scores: dict[str, float], works: str
) -> None:
    with pytest.raises(ConfigError, match=works):
        choose([run(1e-5, scores), run(3e-5, scores)], rule, ACCURACY)


def test_the_oracle_cannot_choose_for_a_domain_without_validation() -> None:
    choice = choose([run(1e-5, {"books": 0.8}), run(3e-5, {"books": 0.7})], "oracle", ACCURACY)
    assert choice.learning_rate("emoe", ("books",), "books") == 1e-5
    with pytest.raises(ConfigError, match=r"'dvd' has none\. Here 'training-domain' would work"):
        choice.learning_rate("emoe", ("books",), "dvd")


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'training-domain'"):
        choose([], "training-domains", ACCURACY)
    scores = [run(rate, {"books": 0.8}) for rate in (1e-5, 3e-5)]
    with pytest.raises(UnknownNameError, match="Did you mean 'accuracy'"):
        choose(scores, "training-domain", dataclasses.replace(ACCURACY, name="acuracy"))


def test_the_same_run_twice_is_an_error() -> None:
    with pytest.raises(ConfigError, match="given twice with seed 0 and learning rate 1e-05"):
        choose([run(1e-5, {"books": 0.8})] * 2, "training-domain", ACCURACY)
