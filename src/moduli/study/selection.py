"""Which learning rate counts: model selection as a stated rule that sees validation scores only.

An arm that was tuned with several learning rates is judged by the runs of one of them. A rule says
which validation splits that choice rests on (after the three rules of Gulrajani and Lopez-Paz,
2021): those of the domains trained on; those of the domains neither trained on nor tested; or, as
an upper bound that no user can have, that of the tested domain itself. Theirs trains again for
leave-one-domain-out, with one training domain less; here the runs are the same for all rules, and
other unseen domains stand for the tested one. Test scores are not even an input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moduli.errors import ConfigError, UnknownNameError, nearest
from moduli.training.metrics import LOSS, Metric

TRAINING_DOMAIN = "training-domain"
LEAVE_ONE_DOMAIN_OUT = "leave-one-domain-out"
ORACLE = "oracle"


@dataclass(frozen=True)
class Candidate:
    """A finished run, as far as a choice may look at it.

    Attributes:
        arm: what is compared.
        stratum: what it is averaged over, such as the domains trained on.
        seed: of the run.
        learning_rate: to be chosen.
        sources: the domains trained on.
        validation: scores on the validation split of every domain that has one.
    """

    arm: Hashable
    stratum: Hashable
    seed: int
    learning_rate: float
    sources: tuple[str, ...]
    validation: Mapping[str, Mapping[str, int | float]]


@dataclass(frozen=True)
class Rule:
    """Whose validation splits decide.

    Attributes:
        name: by which it is chosen.
        label: what it is called where its results are shown.
        among: the domains it may look at: those trained on, the others, or all.
        target: what becomes of the domain that is tested: it makes no difference, it is left out,
            or it decides alone.
        least: how many of them need a validation split.
    """

    name: str
    label: str
    among: Literal["sources", "others", "all"]
    target: Literal["no matter", "left out", "alone"]
    least: int

    @property
    def marked(self) -> bool:
        """Whether the choice sees the domain that is tested; its results are marked as such."""
        return self.target == "alone"

    def domains(self, group: Group, target: str | None) -> tuple[str, ...]:
        """The domains whose validation splits decide when `target` is tested.

        Args:
            group: runs to choose among.
            target: the domain that is tested; None: one without a validation split.
        """
        return tuple(
            domain
            for domain in self.pool(group)
            if self.target == "no matter" or (domain == target) == (self.target == "alone")
        )

    def pool(self, group: Group) -> tuple[str, ...]:
        """The domains that it may look at and that have a validation split."""
        return tuple(
            domain
            for domain in group.domains
            if self.among == "all" or (domain in group.sources) == (self.among == "sources")
        )


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(TRAINING_DOMAIN, "validation of the training domains", "sources", "no matter", 1),
        Rule(
            LEAVE_ONE_DOMAIN_OUT, "validation of the other unseen domains", "others", "left out", 2
        ),
        Rule(ORACLE, "oracle: sees the test domain", "all", "alone", 1),
    )
}


@dataclass(frozen=True)
class Validation:
    """Means over seeds on one validation split."""

    score: float
    loss: float
    """Infinite where the task's kind has none; it only decides between equal scores."""


@dataclass(frozen=True)
class Group:
    """The runs of an arm in a stratum, of which one learning rate is to be chosen."""

    sources: tuple[str, ...]
    seeds: tuple[int, ...]
    """Those that every learning rate has finished: the only ones that count."""
    domains: tuple[str, ...]
    """Those with a validation split, as far as every run that counts has it."""
    rates: Mapping[float, Mapping[str, Validation]]
    """By learning rate and domain."""


@dataclass(frozen=True)
class Choice:
    """The learning rates that a rule chose, and what it saw."""

    rule: Rule
    metric: Metric
    groups: Mapping[tuple[Hashable, Hashable], Group]
    """By arm and stratum."""

    def learning_rate(
        self, arm: Hashable, stratum: Hashable, target: str | None = None
    ) -> float | None:
        """The learning rate whose runs count; None where no seed has finished with every one.

        The best mean over seeds of the mean over the domains of the rule; of equal ones that with
        the lower loss, then the lower rate. A single learning rate needs no validation.

        Args:
            arm: of the candidates.
            stratum: of the candidates.
            target: the domain that is tested; None: one without a validation split.

        Raises:
            ConfigError: the rule is the oracle and the tested domain has no validation split.
        """
        group = self.groups.get((arm, stratum))
        if group is None:
            return None
        if len(group.rates) == 1:
            return next(iter(group.rates))
        if not group.seeds:
            return None
        domains = self.rule.domains(group, target)
        if not domains:
            raise ConfigError(
                f"Rule {self.rule.name!r} chooses by the validation split of the tested domain, "
                f"but {target!r} has none. {_that_work(group)}"
            )
        seen = {rate: self._seen(group, rate, domains) for rate in group.rates}
        return min(seen, key=lambda rate: (-self._goodness(seen[rate]), seen[rate].loss, rate))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: for every arm and stratum what each rate reached and which counts."""
        return {
            "rule": self.rule.name,
            "label": self.rule.label,
            "marked": self.rule.marked,
            "metric": self.metric.name,
            "groups": [
                {
                    "arm": _plain(arm),
                    "stratum": _plain(stratum),
                    "sources": list(group.sources),
                    "seeds": list(group.seeds),
                    "choices": [
                        self._choice(arm, stratum, group, target) for target in self._targets(group)
                    ],
                }
                for (arm, stratum), group in self.groups.items()
            ],
        }

    def _targets(self, group: Group) -> tuple[str | None, ...]:
        """None stands for every domain that is not named."""
        if self.rule.target == "no matter" or len(group.rates) == 1:
            return (None,)
        named = self.rule.pool(group)
        return named if self.rule.marked else (*named, None)

    def _choice(
        self, arm: Hashable, stratum: Hashable, group: Group, target: str | None
    ) -> dict[str, Any]:
        domains = self.rule.domains(group, target)
        rates = []
        for rate in group.rates:
            seen = self._seen(group, rate, domains) if domains else None
            rates.append(
                {
                    "learning_rate": rate,
                    "mean": seen.score if seen else None,
                    "loss": seen.loss if seen and math.isfinite(seen.loss) else None,
                }
            )
        return {
            "target": target,
            "validation": list(domains),
            "rates": rates,
            "learning_rate": self.learning_rate(arm, stratum, target),
        }

    def _seen(self, group: Group, rate: float, domains: Iterable[str]) -> Validation:
        found = [group.rates[rate][domain] for domain in domains]
        score, loss = _mean(v.score for v in found), _mean(v.loss for v in found)
        # rounded, so that equal means are equal whichever way they were summed
        return Validation(round(score, 12), round(loss, 12))

    def _goodness(self, seen: Validation) -> float:
        if math.isnan(seen.score):
            return -math.inf
        return seen.score if self.metric.higher_is_better else -seen.score


def choose(candidates: Iterable[Candidate], rule: str, metric: Metric) -> Choice:
    """Chooses a learning rate for every arm and stratum, and for every test domain if it matters.

    Only the seeds that every learning rate of the arm and stratum has finished count: a rate must
    not win or lose by a seed that others failed with. Domains without a validation split are not
    looked at.

    Args:
        candidates: finished runs, in any order.
        rule: name of one of `RULES`.
        metric: what is best on the validation splits.

    Raises:
        UnknownNameError: there is no such rule, or the candidates have no such metric.
        ConfigError: too few domains have a validation split for the rule, or two candidates are
            the same run or differ in their sources.
    """
    if rule not in RULES:
        raise UnknownNameError(f"There is no selection rule {rule!r}. {nearest(rule, RULES)}")
    chosen = RULES[rule]
    runs: dict[tuple[Hashable, Hashable], list[Candidate]] = {}
    for candidate in candidates:
        runs.setdefault((candidate.arm, candidate.stratum), []).append(candidate)
    groups = {}
    for key, members in runs.items():
        group = _group(members, metric)
        if len(group.rates) > 1 and group.seeds and len(chosen.pool(group)) < chosen.least:
            found = ", ".join(map(repr, chosen.pool(group))) or "none"
            wanted = {"sources": "trained on", "others": "not trained on", "all": "in the task"}
            raise ConfigError(
                f"Rule {rule!r} needs validation splits of {chosen.least} or more domains "
                f"{wanted[chosen.among]}; with training on {', '.join(group.sources)} it has those "
                f"of: {found}. {_that_work(group)}"
            )
        groups[key] = group
    return Choice(chosen, metric, groups)


def _group(members: list[Candidate], metric: Metric) -> Group:
    """What the runs of one arm and stratum reached on the seeds that count."""
    members = sorted(members, key=lambda run: (run.learning_rate, run.seed))
    sources = members[0].sources
    by_rate: dict[float, dict[int, Candidate]] = {}
    for member in members:
        runs = by_rate.setdefault(member.learning_rate, {})
        if member.seed in runs or set(member.sources) != set(sources):
            raise ConfigError(
                f"Arm {member.arm!r}, stratum {member.stratum!r} was given twice with seed "
                f"{member.seed} and learning rate {member.learning_rate:g}, or with different "
                f"sources; expected one run each, all trained on the same domains."
            )
        runs[member.seed] = member
    seeds = sorted(set.intersection(*(set(runs) for runs in by_rate.values())))
    counted = [runs[seed] for runs in by_rate.values() for seed in seeds]
    shared = set.intersection(*(set(run.validation) for run in counted)) if counted else set()
    domains = tuple(sorted(shared))
    rates = {
        rate: {
            domain: Validation(
                _mean(_score(runs[seed].validation[domain], metric.name) for seed in seeds),
                _mean(
                    float(runs[seed].validation[domain].get(LOSS.name, math.inf)) for seed in seeds
                ),
            )
            for domain in domains
        }
        for rate, runs in by_rate.items()
    }
    return Group(sources, tuple(seeds), domains, rates)


def _score(scores: Mapping[str, int | float], metric: str) -> float:
    if metric not in scores:
        raise UnknownNameError(
            f"The validation scores have no metric {metric!r}. {nearest(metric, scores)}"
        )
    return float(scores[metric])


def _that_work(group: Group) -> str:
    """The rules that could choose here, for the end of an error message."""
    names = [
        repr(rule.name)
        for rule in RULES.values()
        if not rule.marked and len(rule.pool(group)) >= rule.least
    ]
    return f"Here {' and '.join(names)} would work." if names else "A single learning rate works."


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def _plain(value: Any) -> Any:
    record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if record else value
