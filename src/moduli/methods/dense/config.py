"""The baseline: the model as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from moduli.methods.base import Method, Progress


@dataclass(frozen=True)
class Dense(Method):
    """Plain fine-tuning, without experts."""

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "plain fine-tuning, the baseline"
    modular: ClassVar[bool] = False

    def apply(
        self,
        model: nn.Module,
        *,
        batch: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Leave the model as it is."""
