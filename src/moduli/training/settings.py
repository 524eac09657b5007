"""How a model is fine-tuned: one frozen record, part of a run's content hash.

Only what can change the result is in here. What cannot (where checkpoints go, how often they are
written, who watches the progress) is an argument of `moduli.training.finetune.finetune`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from moduli.errors import ConfigError

LATER = {"later": True}
"""Marks a setting that is younger than recorded runs; see `FinetuneSettings.to_dict`."""


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of one fine-tuning run; the defaults suit a small encoder with a new head.

    Raises:
        ConfigError: a value that cannot work.
    """

    epochs: int = 3
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after this many optimiser steps instead of after `epochs`."""
    learning_rate: float = 1e-4
    """Peak learning rate; it rises linearly over the warm-up and falls as the schedule says."""
    schedule: Literal["linear", "inverse-sqrt"] = field(default="linear", metadata=LATER)
    """How the learning rate falls: linearly to zero, or with one over the root of the step, as
    usual for translators with random weights."""
    batch_size: int = 32
    """Examples per forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimiser step."""
    max_length: int = 64
    """Longest text in tokens; longer ones are cut."""
    image_size: int | None = None
    """Pixels that images are scaled to, on both sides. Default: as the model's processor says."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    adam_beta2: float = field(default=0.999, metadata=LATER)
    """How slowly AdamW forgets the size of earlier gradients."""
    label_smoothing: float = field(default=0.0, metadata=LATER)
    """Share of the target token's probability that is given to the others in equal parts; for
    models from text to text."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    bf16: bool | Literal["auto"] = "auto"
    """bfloat16 autocast in training: "auto" uses it where the hardware computes in it."""
    trains: str = "all"
    """What is trained: all, head (with the pooler), last:N (the last N blocks and the head) or
    lora (low-rank factors, the head, learned routers, and experts with parameters of their own)."""
    lora_rank: int = 8
    """With lora: rank of the factors."""
    lora_alpha: int = 16
    """With lora: the product of the factors is scaled by alpha / rank."""
    lora_dropout: float = 0.1
    """With lora: probability of dropping inputs of the factors."""
    lora_targets: tuple[str, ...] = ()
    """With lora: ends of the names of the layers that get factors (query, intermediate.dense), or
    all-linear. Default: what PEFT takes for the model's family."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))  # JSON has lists
        positive = (
            "epochs",
            "learning_rate",
            "batch_size",
            "gradient_accumulation_steps",
            "max_length",
            "max_grad_norm",
            "lora_rank",
            "lora_alpha",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it has to be above 0.")
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"image_size is {self.image_size}; it is a number of pixels.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps is {self.max_steps}; give 1 or more, or leave it out.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is {self.warmup}: a share of the steps, in [0, 1).")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay is {self.weight_decay}; it has to be 0 or more.")
        if self.schedule not in ("linear", "inverse-sqrt"):
            raise ConfigError(f"schedule is {self.schedule!r}; it is linear or inverse-sqrt.")
        if self.schedule == "inverse-sqrt" and not self.warmup:
            raise ConfigError("schedule is inverse-sqrt, which needs a warm-up above 0.")
        for name in ("adam_beta2", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it has to be in [0, 1).")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout}: a probability, in [0, 1).")
        if not re.fullmatch(r"all|head|lora|last:[1-9]\d*", self.trains):
            raise ConfigError(
                f"trains is {self.trains!r}; it is all, head, lora or last:N with N of 1 or more."
            )

    @property
    def last_blocks(self) -> int | None:
        """N of trains="last:N", or None."""
        _, _, count = self.trains.partition(":")
        return int(count) if count else None

    def to_dict(self) -> dict[str, Any]:
        """The settings that name a run. One that came after runs had been recorded is left out
        where it has its default, which is what those runs did, so that they keep their names."""
        whole = asdict(self)
        for one in fields(self):
            if one.metadata.get("later") and whole[one.name] == one.default:
                del whole[one.name]
        return whole

    def resolved(self) -> FinetuneSettings:
        """The same settings with `bf16="auto"` replaced by what this machine will do."""
        return replace(self, bf16=bf16_supported()) if self.bf16 == "auto" else self


def bf16_supported() -> bool:
    """Whether this machine has arithmetic in bfloat16, not only an emulation that is slower."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
