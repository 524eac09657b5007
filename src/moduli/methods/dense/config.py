"""The baseline: the model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from moduli.methods.base import Method, Progress
from moduli.surgery.inputs import Batches


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
        batch: Batches | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Leave the model as it is."""
