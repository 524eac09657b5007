"""What a run is: a frozen record whose hash is its name.

Two runs with the same spec are the same run, so a finished one is never repeated. Everything that
can change the result is in the spec; the weights and the data enter by their content, so that a
file changed under an old name is a new run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moduli.data.task import Task
from moduli.errors import DataError, UnknownNameError, nearest
from moduli.methods.base import Method
from moduli.methods.registry import get_method
from moduli.training.settings import FinetuneSettings
from moduli.version import __version__


@dataclass(frozen=True)
class MethodSpec:
    """A method and its full configuration, as plain JSON values."""

    name: str
    config: Mapping[str, Any]

    @classmethod
    def of(cls, method: Method) -> MethodSpec:
        """The spec of a configured method such as `moduli.EMoE(num_experts=16)`."""
        return cls(method.name, plain(method.to_dict()))

    def build(self) -> Method:
        """The configured method.

        Raises:
            UnknownNameError: no such method is registered.
            ConfigError: the method has no such setting, or it cannot have that value.
        """
        return get_method(self.name).from_dict(self.config)


@dataclass(frozen=True)
class RunSpec:
    """One run: a model, tuned by a method on one domain of a task, with one seed."""

    model: str
    """Name or directory, as given."""
    model_hash: str
    """Of its weights; empty for a name on a hub, where the name has to do."""
    task: str
    data: Mapping[str, Any]
    """Options of `moduli.data.load_task`."""
    data_hash: str
    """Of every row in every split."""
    train_domain: str
    method: MethodSpec
    settings: FinetuneSettings
    """With `bf16` resolved: where the hardware differs, so does the run."""
    seed: int
    code: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        data: dict[str, Any] = plain(asdict(self))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunSpec:
        """The inverse of `to_dict`."""
        return cls(
            **{
                **data,
                "method": MethodSpec(**data["method"]),
                "settings": FinetuneSettings(**data["settings"]),
            }
        )

    @property
    def key(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the canonical JSON: the run's name."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """Methods times seeds on one task. The first method is what the others are compared with."""

    model: str
    task: str
    data: Mapping[str, Any]
    train_domain: str | None
    """None: the first domain of the task that has training data."""
    methods: tuple[MethodSpec, ...]
    seeds: tuple[int, ...]
    settings: FinetuneSettings

    def specs(self, task: Task) -> list[RunSpec]:
        """All runs, seed by seed, so that a study cut short has whole pairs to compare."""
        from moduli.data import resolve_model

        domain = choose_domain(task, self.train_domain)
        model_hash = hash_model(resolve_model(self.model))
        data_hash = hash_task(task)
        settings = self.settings.resolved()
        return [
            RunSpec(
                model=self.model,
                model_hash=model_hash,
                task=self.task,
                data=plain(dict(self.data)),
                data_hash=data_hash,
                train_domain=domain,
                method=method,
                settings=settings,
                seed=seed,
            )
            for seed in self.seeds
            for method in self.methods
        ]


def choose_domain(task: Task, name: str | None) -> str:
    """The domain to train on: the named one, or the first that has training data.

    Raises:
        UnknownNameError: the task has no such domain.
        DataError: it has, but without training data.
    """
    if name is None:
        name = next((d for d, splits in task.domains.items() if splits.train is not None), None)
        if name is None:
            raise DataError(f"No domain of {task.name!r} has training data.")
    if name not in task.domains:
        raise UnknownNameError(
            f"The task {task.name!r} has no domain {name!r}. {nearest(name, task.domains)}"
        )
    if task.domains[name].train is None:
        raise DataError(f"The domain {name!r} of {task.name!r} has test data only.")
    return name


def hash_model(path: str) -> str:
    """SHA-256 over the configuration and weight files of a model directory; "" for a hub name."""
    directory = Path(path)
    if not directory.is_dir():
        return ""
    digest = hashlib.sha256()
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    for file in files:
        if file.is_file():
            digest.update(f"{file.name}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def hash_task(task: Task) -> str:
    """SHA-256 over labels, domains, splits and every row."""
    digest = hashlib.sha256(json.dumps(task.label_names).encode())
    for domain, splits in task.domains.items():
        for split in ("train", "validation", "test"):
            table = getattr(splits, split)
            digest.update(json.dumps([domain, split, table is not None]).encode())
            if table is None:
                continue
            for column in table.column_names:
                values = [_by_content(value) for value in table[column]]
                digest.update(json.dumps(values).encode())
    return digest.hexdigest()


def _by_content(value: Any) -> Any:
    """A cell; pictures and sound by their digest, wherever the file is."""
    return value["digest"] if isinstance(value, dict) else value


def plain(value: Any) -> Any:
    """The same value in what JSON has: tuples as lists, mappings as dicts."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def method_labels(methods: Sequence[MethodSpec]) -> list[str]:
    """A short name for each: the method's, with the settings that tell apart two of one method."""
    labels = []
    for method in methods:
        same = [other for other in methods if other.name == method.name]
        differing = [
            f"{key}={value}"
            for key, value in method.config.items()
            if any(other.config.get(key) != value for other in same)
        ]
        labels.append(f"{method.name} ({', '.join(differing)})" if differing else method.name)
    return labels
