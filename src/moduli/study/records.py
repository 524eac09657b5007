"""What a run leaves behind, and how it is read back: one directory, one `record.json`.

A directory appears under its final name by one rename when everything in it is written, so a
directory with a record is a finished run and nothing else is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moduli.errors import CheckpointError
from moduli.inspect.files import write_text
from moduli.study.spec import RunSpec
from moduli.version import __version__

RECORD = "record.json"
FAILED = "failed.json"
INSPECTION = "inspection.json"
"""Beside the record of a run with experts: what they do (`moduli.inspect`)."""


@dataclass(frozen=True)
class Variant:
    """What an edit of a tuned model did to it (see `Edit`)."""

    scores: Mapping[str, Mapping[str, int | float]]
    """Test scores by domain."""
    changed: Mapping[str, int]
    """How many test predictions the edit changed, by domain."""
    report: Mapping[str, Any] | None
    """Of the edit itself, such as `MergeReport.to_dict()`."""


@dataclass(frozen=True)
class RunRecord:
    """A finished run."""

    spec: RunSpec
    kind: str
    """Of the task; it says what the scores are (`moduli.training.kinds`)."""
    scores: Mapping[str, Mapping[str, int | float]]
    """Test scores of the tuned model by domain: the numbers of the task's kind."""
    validation: Mapping[str, Mapping[str, int | float]]
    """Scores on the validation split of every domain that has one: what a choice may be based
    on. Which of them a rule looks at is its own matter (`moduli.study.selection`)."""
    variants: Mapping[str, Variant]
    """By the label of the edit, in the order of the spec."""
    conversion: Mapping[str, Any] | None
    """`ConversionReport.to_dict()`."""
    cost: Mapping[str, Any]
    """Parameters, FLOPs and memory (`moduli.study.cost`)."""
    steps: int
    final_loss: float
    """Mean training loss of the last tenth of the steps."""
    seconds: Mapping[str, float]
    """Wall time of its parts ("load", "convert", "train", "inspect", "evaluate") in the process
    that finished the run: of a resumed one without what others had done."""
    cpu_seconds: Mapping[str, float]
    """The same in processor time, which a busy machine lengthens less."""
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "spec": self.spec.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunRecord:
        """The inverse of `to_dict`."""
        variants = {label: Variant(**variant) for label, variant in data["variants"].items()}
        return cls(**{**data, "spec": RunSpec.from_dict(data["spec"]), "variants": variants})

    def result(self) -> dict[str, Any]:
        """What has to be equal when the run is repeated: all but time, memory and environment."""
        data = self.to_dict()
        for name in ("seconds", "cpu_seconds", "environment", "cost"):
            del data[name]
        if data["conversion"] is not None:
            data["conversion"] = {k: v for k, v in data["conversion"].items() if k != "seconds"}
        return data


@dataclass(frozen=True)
class Failure:
    """A run that stopped with an error; kept, and only tried again when asked."""

    spec: RunSpec
    error: str
    message: str


def read_record(directory: Path) -> RunRecord:
    """The record of a finished run.

    Raises:
        CheckpointError: there is none, it is damaged, or another version of moduli wrote it.
    """
    path = directory / RECORD
    data: Any = None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return RunRecord.from_dict(data)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} holds no finished run: it has no {RECORD}.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} {_trouble(data, error)}") from None


def _trouble(data: Any, error: Exception) -> str:
    """What is wrong with JSON that is not a record, and what to do."""
    try:
        code = data["spec"]["code"]
    except (TypeError, KeyError):
        return f"is damaged ({error}); delete its directory to do the run again."
    return (
        f"was written by moduli {code} and is laid out in another way than moduli {__version__} "
        f"reads ({type(error).__name__}: {error}). Read it with that version, choose another "
        "directory, or delete this one to do the run again."
    )


def read_records(root: Path) -> list[RunRecord]:
    """All finished runs under `root`, in the order of their names."""
    return [read_record(path.parent) for path in sorted(root.glob(f"[!.]*/{RECORD}"))]


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that the file is there completely or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_text(path, json.dumps(data, indent=1, allow_nan=True) + "\n")
