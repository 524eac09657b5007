"""What a study compares: arms times learning rates, on units times seeds.

An arm is a method with what it trains. A unit is what is averaged over: a task, the domains that
are trained on together (every other one is out of domain) and a share of their training rows.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moduli.data.task import Task
from moduli.errors import ConfigError, DataError, UnknownNameError, nearest
from moduli.study.spec import Edit, MethodSpec, RunSpec, hash_model, hash_task, plain
from moduli.training.settings import FinetuneSettings


@dataclass(frozen=True)
class TaskSpec:
    """A task by name, with options of `moduli.data.load_task`."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One thing that is compared.

    Attributes:
        method: with all its settings.
        learning_rates: that are tried for it; empty: those of the plan.
        overrides: other settings of `FinetuneSettings` that are its own, such as `trains`.
        edits: how its tuned models are tested besides as they are.
        label: what it is called; None: made of what tells it from the other arms.
    """

    method: MethodSpec
    learning_rates: tuple[float, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    label: str | None = None

    def trains(self, usual: str) -> str:
        """What it trains, where `usual` is what the settings of the study say."""
        return str(self.overrides.get("trains", usual))


def arm(method: Any, *, label: str | None = None, **overrides: Any) -> Arm:
    """An arm of a configured method; split and copied experts are tested merged as well.

    Args:
        method: such as `moduli.EMoE(num_experts=64)`.
        label: what it is called.
        **overrides: settings of `FinetuneSettings`; `learning_rate` may be several.
    """
    rates = overrides.pop("learning_rate", ())
    rates = (rates,) if isinstance(rates, (int, float)) else tuple(rates)
    edits = (Edit("merged"),) if method.modular else ()
    return Arm(MethodSpec.of(method), rates, overrides, edits, label)


def baselines(settings: FinetuneSettings, rates: Sequence[float]) -> tuple[Arm, ...]:
    """What a method has to be better than, beside full fine-tuning: a frozen probe, LoRA, and the
    last two blocks.

    What is trained anew gets ten times the learning rate, the ratio that EMoE's runs have.

    Args:
        settings: of the study.
        rates: learning rates that are tried; empty: that of `settings`.
    """
    from moduli.methods.dense import Dense

    given = tuple(rates) or (settings.learning_rate,)
    higher = tuple(10 * rate for rate in given)
    return (
        arm(Dense(), trains="head", learning_rate=higher),
        arm(Dense(), trains="lora", learning_rate=higher),
        arm(Dense(), trains="last:2", learning_rate=given),
    )


def also_tested(
    arms: Sequence[Arm], *, pruned: bool, cross: bool, usual: str = "all"
) -> tuple[Arm, ...]:
    """The arms with more edits to test.

    Args:
        arms: as made by `arm`.
        pruned: statically pruned, those whose experts are groups of the model's own neurons.
        cross: those tuned without experts, split by the first such arm that trains the same.
        usual: what arms train that do not say so themselves (`FinetuneSettings.trains`).
    """
    splits = [one for one in arms if one.method.build().borrows]
    found = []
    for one in arms:
        edits = one.edits
        if pruned and one in splits:
            edits = (*edits, Edit("pruned"))
        trains = one.trains(usual)
        same = next((other for other in splits if other.trains(usual) == trains), None)
        if cross and same is not None and not one.method.build().modular:
            edits = (*edits, Edit("split", same.method))
        found.append(dataclasses.replace(one, edits=edits))
    return tuple(found)


@dataclass(frozen=True)
class Unit:
    """What is averaged over: a task (its place in the plan), sources, share of the rows."""

    task: int
    sources: tuple[str, ...]
    fraction: float = 1.0


@dataclass(frozen=True)
class Planned:
    """A run and its place in the plan."""

    spec: RunSpec
    arm: int
    unit: Unit


@dataclass(frozen=True)
class Plan:
    """Arms times learning rates times units times seeds. The first arm is the baseline.

    Attributes:
        model: name or directory.
        tasks: of one kind.
        sources: groups of domains to train on; empty: those that the task names (`Task.sources`),
            or the first domain with training data.
            "each" stands for every such domain alone, "leave-one-out" for all of them but one.
        arms: what is compared.
        seeds: new head, order of the data, dropout.
        settings: of the training; arms may override them.
        learning_rates: that are tried for every arm; empty: the one in `settings`.
        fractions: shares of the training rows.
    """

    model: str
    tasks: tuple[TaskSpec, ...]
    sources: tuple[tuple[str, ...], ...] | str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    settings: FinetuneSettings
    learning_rates: tuple[float, ...] = ()
    fractions: tuple[float, ...] = (1.0,)

    @property
    def labels(self) -> list[str]:
        """What the arms are called."""
        return arm_labels(self.arms, self.settings.trains)

    def units(self, tasks: Sequence[Task]) -> list[Unit]:
        """Everything that is averaged over, in the order it is run."""
        return [
            Unit(i, sources, fraction)
            for fraction in self.fractions
            for i, task in enumerate(tasks)
            for sources in source_groups(task, self.sources)
        ]

    def rates(self, one: Arm) -> tuple[float, ...]:
        """The learning rates that are tried for an arm."""
        return one.learning_rates or self.learning_rates or (self.settings.learning_rate,)

    def runs(self, tasks: Sequence[Task]) -> list[Planned]:
        """All runs, seed by seed, so that a study cut short has whole pairs to compare.

        Args:
            tasks: `self.tasks`, loaded.

        Raises:
            ConfigError: nothing to run, something twice, or settings that cannot work.
            UnknownNameError: a domain, a method or a setting does not exist.
            DataError: a domain has no training data.
        """
        from moduli.data import resolve_model

        self._check(tasks)
        model_hash = hash_model(resolve_model(self.model))
        hashes = [hash_task(task) for task in tasks]
        found = []
        for seed in self.seeds:
            for unit in self.units(tasks):
                for number, one in enumerate(self.arms):
                    for rate in self.rates(one):
                        spec = RunSpec(
                            model=self.model,
                            model_hash=model_hash,
                            task=self.tasks[unit.task].name,
                            data=plain(dict(self.tasks[unit.task].data)),
                            data_hash=hashes[unit.task],
                            train_domains=unit.sources,
                            fraction=unit.fraction,
                            method=one.method,
                            settings=self.settings_of(one, rate),
                            seed=seed,
                            edits=one.edits,
                        )
                        found.append(Planned(spec, number, unit))
        return found

    def settings_of(self, one: Arm, rate: float) -> FinetuneSettings:
        """How an arm trains at a learning rate, `bf16` resolved.

        Raises:
            ConfigError: the arm overrides the learning rate.
            UnknownNameError: or what is no setting.
        """
        known = [f.name for f in dataclasses.fields(FinetuneSettings)]
        if "learning_rate" in one.overrides:
            raise ConfigError(
                f"An arm of {one.method.name} overrides learning_rate; give it as learning_rates, "
                "of which there may be several."
            )
        for name in one.overrides:
            if name not in known:
                raise UnknownNameError(f"Training has no setting {name!r}. {nearest(name, known)}")
        changed = {**one.overrides, "learning_rate": rate}
        return dataclasses.replace(self.settings, **changed).resolved()

    def _check(self, tasks: Sequence[Task]) -> None:
        if not self.arms or not self.seeds or not self.tasks:
            raise ConfigError("A study needs at least one method, one seed and one task.")
        kinds = {task.kind for task in tasks}
        if len(kinds) > 1:
            raise ConfigError(
                f"The tasks are of different kinds ({', '.join(sorted(kinds))}); "
                "their scores cannot be averaged. Make a study of each kind."
            )
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ConfigError(
                    f"fraction is {fraction}; it is a share of the rows, above 0 and at most 1."
                )
        for what, values in (
            ("seed", self.seeds),
            ("fraction", self.fractions),
            ("task", self.tasks),
        ):
            if twice := _twice(values):
                raise ConfigError(f"The {what} {twice[0]} is given twice.")
        settings = [
            (one.method, rate, self.settings_of(one, rate), one.edits)
            for one in self.arms
            for rate in self.rates(one)
        ]
        if twice := _twice(settings):
            raise ConfigError(f"The method {twice[0][0].name} is given twice with equal settings.")
        for label, count in Counter(self.labels).items():
            if count > 1:
                raise ConfigError(f"Two arms are called {label!r}; give them labels of their own.")
        for one in self.arms:
            method = one.method.build()
            if twice := _twice([edit.label for edit in one.edits]):
                raise ConfigError(
                    f"{method.name} is to be tested {twice[0]} in two ways; make an arm for each."
                )
            for edit in one.edits:
                if edit.method is not None:
                    edit.method.build()
                if (edit.name == "split") == method.modular:
                    wanted = "without" if method.modular else "with"
                    raise ConfigError(
                        f"{method.name} cannot be tested {edit.label}: that is for models tuned "
                        f"{wanted} experts."
                    )


def source_groups(task: Task, sources: tuple[tuple[str, ...], ...] | str) -> list[tuple[str, ...]]:
    """The groups of domains that are trained on together; see `Plan.sources`.

    Raises:
        UnknownNameError: the task has no such domain.
        DataError: a domain has no training data, or no domain has.
        ConfigError: a group is empty or given twice, or one domain cannot be left out.
    """
    trainable = [name for name, splits in task.domains.items() if splits.train is not None]
    if not trainable:
        raise DataError(f"No domain of {task.name!r} has training data.")
    if sources == "each":
        return [(name,) for name in trainable]
    if sources == "leave-one-out":
        if len(trainable) < 2:
            raise ConfigError(
                f"{task.name!r} has training data for {trainable[0]!r} only, so that none can be "
                'left out; use "each".'
            )
        return [tuple(n for n in trainable if n != out) for out in reversed(trainable)]
    if isinstance(sources, str):
        raise ConfigError(f'sources is {sources!r}; it is "each", "leave-one-out" or groups.')
    for group in sources:
        if not group or _twice(group):
            raise ConfigError(f"A group of domains to train on is {group!r}; name each once.")
        for name in group:
            if name not in task.domains:
                raise UnknownNameError(
                    f"The task {task.name!r} has no domain {name!r}. {nearest(name, task.domains)}"
                )
            if name not in trainable:
                raise DataError(f"The domain {name!r} of {task.name!r} has test data only.")
    if twice := _twice(tuple(tuple(sorted(group)) for group in sources)):
        raise ConfigError(f"The domains {', '.join(twice[0])} are given twice to train on.")
    return list(sources) or [task.sources or (trainable[0],)]


def arm_labels(arms: Sequence[Arm], usual: str = "all") -> list[str]:
    """A short name for each: its own, or what it trains and the settings that tell it apart.

    Args:
        arms: of a plan.
        usual: what they train where they do not say so themselves.
    """
    nouns = [_noun(one, usual) for one in arms]
    labels = []
    for one, noun in zip(arms, nouns, strict=True):
        named = zip(arms, nouns, strict=True)
        same = [other for other, its in named if its == noun and other.label is None]
        differing = []
        for name, value in {**one.method.config, **one.overrides}.items():
            if name == "trains":
                continue
            values = [{**o.method.config, **o.overrides}.get(name) for o in same]
            # What most of them have goes without saying.
            if values.count(value) <= len(values) / 2:
                differing.append(f"{name}={value}")
        made = f"{noun} ({', '.join(differing)})" if differing else noun
        labels.append(one.label or made)
    return labels


def _noun(one: Arm, usual: str) -> str:
    """What an arm is called by method and by what it trains: "emoe", "LoRA", "LoRA + emoe"."""
    how, _, count = one.trains(usual).partition(":")
    what = {"all": "", "head": "frozen probe", "lora": "LoRA", "last": f"last {count} blocks"}[how]
    dense = one.method.name == "dense"
    if dense or not what:
        return what or one.method.name
    return f"{what} + {one.method.name}"


def _twice(values: Sequence[Any]) -> list[Any]:
    """The values that stand there for the second time or later."""
    return [value for i, value in enumerate(values) if value in values[:i]]
