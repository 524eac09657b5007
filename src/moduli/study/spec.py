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
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from moduli.data.task import Task
from moduli.errors import ConfigError
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
class Edit:
    """How a tuned model is tested besides as it is; the tuned model itself stays as it was.

    Attributes:
        name: "merged" back to dense; "pruned", which keeps for every token the experts most used
            on the training data and drops the others; or "split", a model tuned without experts
            that gets those of `method` for testing only.
        method: of "split"; None for the others.
    """

    name: Literal["merged", "pruned", "split"]
    method: MethodSpec | None = None

    def __post_init__(self) -> None:
        if (self.name == "split") != (self.method is not None):
            raise ConfigError("The edit 'split' needs a method; the others have none.")

    @property
    def label(self) -> str:
        """What it is called in tables, and its key in a record."""
        return self.name if self.method is None else f"split by {self.method.name}"


@dataclass(frozen=True)
class RunSpec:
    """One run: a model, tuned by a method on some domains of a task, with one seed."""

    model: str
    """Name or directory, as given."""
    model_hash: str
    """Of its weights; empty for a name on a hub, where the name has to do."""
    task: str
    data: Mapping[str, Any]
    """Options of `moduli.data.load_task`."""
    data_hash: str
    """Of every row in every split."""
    train_domains: tuple[str, ...]
    """Trained on together."""
    fraction: float
    """Share of the training rows of each of them."""
    method: MethodSpec
    settings: FinetuneSettings
    """With `bf16` resolved: where the hardware differs, so does the run."""
    seed: int
    edits: tuple[Edit, ...]
    """What else is tested besides the model as it was tuned."""
    code: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        data: dict[str, Any] = plain(asdict(self) | {"settings": self.settings.to_dict()})
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunSpec:
        """The inverse of `to_dict`."""
        settings = dict(data["settings"])
        settings["lora_targets"] = tuple(settings["lora_targets"])
        return cls(
            **{
                **data,
                "train_domains": tuple(data["train_domains"]),
                "method": MethodSpec(**data["method"]),
                "settings": FinetuneSettings(**settings),
                "edits": tuple(
                    Edit(edit["name"], edit["method"] and MethodSpec(**edit["method"]))
                    for edit in data["edits"]
                ),
            }
        )

    @property
    def trained_on(self) -> str:
        """The domains it trains on, in words."""
        return " + ".join(self.train_domains)

    @cached_property
    def key(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the canonical JSON: the run's name."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


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
