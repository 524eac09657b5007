"""What is measured of ModuleFormer's three claims, and with which settings.

efficiency        against dense models of several widths, trained on the same tokens
extension         German, then Spanish: new experts against full tuning and low-rank factors
specialisation    tuned on one genre with and without the concentration loss, then pruned
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moduli.training.settings import FinetuneSettings

SEEDS = (0, 1, 2)
VOCAB = 2048


@dataclass(frozen=True)
class Scale:
    """How much is computed: `FULL` is what the pages quote, `TRIAL` only shows that all runs."""

    steps: int
    """Of pretraining."""
    tuning: int
    """Steps of what comes after."""
    length: int
    rows: int
    """Texts of a domain to train on, at most; languages have ten times as many."""
    tested: int
    """Texts of a domain to test on."""
    rounds: int
    """In which speeds are measured in turns."""
    seeds: tuple[int, ...] = SEEDS
    domains: int | None = None
    """So many genres only; None: all."""


FULL = Scale(steps=300, tuning=120, length=256, rows=12, tested=2, rounds=7)
TRIAL = Scale(steps=4, tuning=3, length=64, rows=2, tested=1, rounds=2, seeds=(0,), domains=2)


@dataclass(frozen=True)
class Base:
    """A model trained from scratch.

    Attributes:
        label: as it is called.
        architecture: "moduleformer" or "dense".
        changes: fields of its configuration.
        text: "brown" or "manuals".
        learns: domains it is trained on; () for all.
    """

    label: str
    architecture: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    text: str = "brown"
    learns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tuning:
    """What is done to a trained model: one arm of a comparison.

    Attributes:
        label: as it is called.
        base: where it starts from.
        learns: domain it is trained on.
        trains: "all", "lora", or "new" for new experts alone.
        learning_rate: peak.
        leakage: weight of the probability that new experts take on replayed old text.
        concentration: weight of the concentration loss.
        keeps: shares of the experts that are kept, one after the other.
    """

    label: str
    base: Base
    learns: str
    trains: str = "all"
    learning_rate: float = 1e-3
    leakage: float = 0.0
    concentration: float = 0.0
    keeps: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Run:
    """One record: a claim, an arm and a seed."""

    claim: str
    arm: Base | Tuning
    seed: int
    scale: Scale

    @property
    def name(self) -> str:
        """Of the file of its record."""
        words = "".join(c if c.isalnum() else "-" for c in self.arm.label.lower())
        return f"{'-'.join(filter(None, words.split('-')))}-{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that decide the result; the seeds of the others do not."""
        return asdict(self) | {
            "scale": {**asdict(self.scale), "seeds": None},
            "vocab_size": VOCAB,
            "pretraining": asdict(pretraining(self.scale)),
            "tuning": asdict(tuning(self.arm, self.scale))
            if isinstance(self.arm, Tuning)
            else None,
        }


MODULES = Base("ModuleFormer", "moduleformer")
EQUAL = Base("dense, equal active parameters", "dense")


def dense(width: int) -> Base:
    """A dense model of another width, three times as wide in its feed-forward layers."""
    changes = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
    }
    return Base(f"dense, width {width}", "dense", changes)


WIDTHS = (MODULES, EQUAL, dense(96), dense(192), dense(256))

OLD, NEW = "de", "es"
GERMAN = Base("ModuleFormer, German", "moduleformer", {}, "manuals", (OLD,))
GERMAN_DENSE = Base("dense, German", "dense", {}, "manuals", (OLD,))
NEW_EXPERTS = (4, 8)
"""Attention and feed-forward experts that are added to every layer."""
EXTENSIONS = (
    Tuning("dense, all trained", GERMAN_DENSE, NEW, learning_rate=1e-3),
    Tuning("dense, LoRA", GERMAN_DENSE, NEW, trains="lora", learning_rate=5e-3),
    Tuning("ModuleFormer, all trained", GERMAN, NEW, learning_rate=1e-3),
    Tuning("ModuleFormer, new experts", GERMAN, NEW, trains="new", learning_rate=3e-3),
    Tuning(
        "ModuleFormer, new experts, leakage held",
        GERMAN, NEW, trains="new", learning_rate=3e-3, leakage=1.0,
    ),
)  # fmt: skip
LORA_RANK = 32

GENRE = "learned"
KEEPS = (1.0, 0.75, 0.5, 0.25)
SPECIALISATIONS = tuple(
    Tuning(label, MODULES, GENRE, learning_rate=5e-4, concentration=weight, keeps=KEEPS)
    for label, weight in (
        ("no auxiliary loss", 0.0),
        ("concentration 0.02", 0.02),
        ("concentration 0.1", 0.1),
    )
)

CLAIMS: dict[str, tuple[Base, ...] | tuple[Tuning, ...]] = {
    "efficiency": WIDTHS,
    "extension": EXTENSIONS,
    "specialisation": SPECIALISATIONS,
}


def runs(claim: str, scale: Scale) -> list[Run]:
    """The runs of a claim, seed by seed, so that what is finished is always comparable."""
    return [Run(claim, arm, seed, scale) for seed in scale.seeds for arm in CLAIMS[claim]]


def pretraining(scale: Scale) -> FinetuneSettings:
    """Of every model from scratch; in bfloat16 where the machine has it."""
    return FinetuneSettings(
        max_steps=scale.steps, learning_rate=3e-3, batch_size=8, max_length=scale.length,
        weight_decay=0.1, warmup=0.05,
    ).resolved()  # fmt: skip


def tuning(arm: Tuning, scale: Scale) -> FinetuneSettings:
    """Of what comes after."""
    return FinetuneSettings(
        max_steps=scale.tuning, learning_rate=arm.learning_rate, batch_size=8,
        max_length=scale.length, warmup=0.05,
        trains="lora" if arm.trains == "lora" else "all",
        lora_rank=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0,
        lora_targets=("all-linear",),
    ).resolved()  # fmt: skip
