"""Records of the bench: what one process measured, what a whole call measured, as JSON files.

A record is what the documentation is built from, so it carries everything that a claim needs: the
machine line, the settings, every candidate with its time or the reason why it has none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moduli.bench.models import ModelRow
from moduli.bench.rows import LayerRow
from moduli.errors import CheckpointError

SCHEMA = 1


@dataclass(frozen=True)
class Part:
    """What one process measured: its machine line and its rows."""

    machine: Mapping[str, Any]
    layers: tuple[LayerRow, ...] = ()
    models: tuple[ModelRow, ...] = ()


@dataclass(frozen=True)
class Record:
    """What one call of the bench measured.

    Attributes:
        name: of the set of cases, or of the model and what it did.
        command: what to type to measure it again.
        date: day on which it began, ISO.
        parts: one per process.
    """

    name: str
    command: str
    date: str
    parts: tuple[Part, ...]

    @property
    def layers(self) -> list[LayerRow]:
        """All rows on layers."""
        return [row for part in self.parts for row in part.layers]

    @property
    def models(self) -> list[ModelRow]:
        """All rows on models."""
        return [row for part in self.parts for row in part.models]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a number that is none becomes null."""
        found: dict[str, Any] = _finite(
            {
                "schema": SCHEMA,
                "name": self.name,
                "command": self.command,
                "date": self.date,
                "parts": [
                    {
                        "machine": dict(part.machine),
                        "layers": [row.to_dict() for row in part.layers],
                        "models": [row.to_dict() for row in part.models],
                    }
                    for part in self.parts
                ],
            }
        )
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """The inverse of `to_dict`."""
        parts = tuple(
            Part(
                machine=part["machine"],
                layers=tuple(LayerRow.from_dict(row) for row in part["layers"]),
                models=tuple(ModelRow.from_dict(row) for row in part["models"]),
            )
            for part in data["parts"]
        )
        return cls(data["name"], data["command"], data["date"], parts)


def write_record(record: Record, path: Path) -> None:
    """Write a record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record.to_dict(), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_record(path: Path) -> Record:
    """A record from its file.

    Raises:
        CheckpointError: it is missing, damaged or of another version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}, expected {SCHEMA}")
        return Record.from_dict(data)
    except FileNotFoundError:
        raise CheckpointError(f"there is no record {path}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a record of this version of moduli bench ({error}); measure it again"
        ) from None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
