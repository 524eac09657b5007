"""The studies behind the pages on EMoE: what is compared, on what, and why these settings.

text-search      settings of every method, and longer training, on validation rows only
text-size        the same two methods with a share of the rows, on validation rows only
text-mixed       three domains together, where they may disturb one another, likewise
text             four source domains in turn, eight seeds
vision-search    learning rates for pictures, on validation rows only
vision           emoji of three vendors, tested on all others; two choices of the three
language         a decoder tuned on the news of the Brown corpus, tested on other genres
"""

from __future__ import annotations

from collections.abc import Callable

import moduli
from moduli.methods.dense import Dense
from moduli.study.plan import Plan, TaskSpec, also_tested, arm
from moduli.training.settings import FinetuneSettings

SENTIMENT = {"max_train": 1000, "max_validation": 60, "max_test": 300}
# A search never looks at test rows; a few are left since every run is tested.
SEARCHED = SENTIMENT | {"max_validation": 300, "max_test": 20}


def emoe(num_experts: int = 64, top_k: int = 32, layers: str = "last:2", **more: object) -> object:
    """EMoE, by default as the demo has it."""
    return moduli.EMoE(num_experts=num_experts, top_k=top_k, layers=layers, **more)


def text_search() -> Plan:
    """Methods and their settings, two epochs on 1000 rows of two sources, one seed."""
    arms = (
        arm(Dense(), learning_rate=(1e-4, 2e-4, 4e-4)),
        *(arm(emoe(n, k)) for n, k in ((16, 4), (16, 8), (64, 16))),
        arm(emoe(), learning_rate=(1e-4, 2e-4, 4e-4)),
        arm(emoe(layers="last:1")),
        arm(emoe(layers="all")),
        arm(emoe(top_k=16, layers="all")),
        arm(emoe(top_k=16, choose="bottom")),
        arm(emoe(top_k=16, choose="not_top")),
        arm(emoe(top_k=16, split="random")),
        arm(emoe(gate="cosine")),
        arm(moduli.GMoE(num_experts=6, top_k=2, layers="last:1")),
        arm(Dense(), trains="lora", learning_rate=(1e-3, 3e-3)),
        arm(emoe(), trains="lora", learning_rate=(1e-3, 3e-3)),
        arm(Dense(), trains="head", learning_rate=3e-3),
        arm(Dense(), trains="last:2"),
        arm(Dense(), learning_rate=2e-4, epochs=6, label="dense, 6 epochs"),
        arm(emoe(), learning_rate=2e-4, epochs=6, label="emoe, 6 epochs"),
    )
    return Plan(
        model="minilm",
        tasks=(TaskSpec("sentiment", SEARCHED),),
        sources=(("tweets",), ("amazon",)),
        arms=arms,
        seeds=(100,),
        settings=FinetuneSettings(epochs=2),
    )


def text_size() -> Plan:
    """A tenth and three tenths of the rows of each source, two seeds."""
    return Plan(
        model="minilm",
        tasks=(TaskSpec("sentiment", SEARCHED),),
        sources="each",
        arms=(arm(Dense(), learning_rate=2e-4), arm(emoe(), learning_rate=2e-4)),
        seeds=(100, 101),
        settings=FinetuneSettings(epochs=2),
        fractions=(0.1, 0.3),
    )


def text_mixed() -> Plan:
    """500 rows of three domains together, the fourth left out; experts chosen well and badly."""
    arms = (
        arm(Dense(), learning_rate=2e-4),
        arm(emoe(), learning_rate=2e-4),
        arm(emoe(top_k=16), learning_rate=2e-4),
        arm(emoe(top_k=16, choose="bottom"), learning_rate=2e-4),
    )
    return Plan(
        model="minilm",
        tasks=(TaskSpec("sentiment", SEARCHED | {"max_train": 500}),),
        sources="leave-one-out",
        arms=arms,
        seeds=(100,),
        settings=FinetuneSettings(epochs=2),
    )


def vision_search() -> Plan:
    """Learning rates and two shapes of EMoE for pictures, one seed.

    A shorter search (15 steps) had its best rates at the ends of wider grids: the lowest of full
    tuning, the highest of LoRA and of the probe.
    """
    rates = (5e-6, 1e-5, 2e-5)
    arms = (
        arm(Dense(), learning_rate=rates),
        arm(emoe(24, 4, [8, 10]), learning_rate=rates, label="emoe 24/4"),
        arm(emoe(24, 12, [8, 10]), learning_rate=rates, label="emoe 24/12"),
        arm(moduli.GMoE(num_experts=6, top_k=2, layers=[10]), learning_rate=rates),
        arm(Dense(), trains="lora", learning_rate=(1e-3, 2e-3, 4e-3)),
        arm(Dense(), trains="head", learning_rate=(1e-2, 3e-2)),
    )
    return Plan(
        model="vit-s",
        tasks=(TaskSpec("emoji", {"max_train": 300, "max_validation": 30, "max_test": 10}),),
        sources=(VENDORS[0],),
        arms=arms,
        seeds=(100,),
        settings=FinetuneSettings(epochs=2, image_size=112),
    )


GENRES = ("news", "editorial", "learned", "fiction", "romance")

VENDORS = (("noto", "twemoji", "fluent-emoji-flat"), ("openmoji", "emojione-monotone", "fxemoji"))
"""Trained on in turn: coloured ones, and two of line art with a coloured one."""


def text() -> Plan:
    """The comparison: every source in turn, eight seeds; settings from `text_search`."""
    full = (arm(Dense(), learning_rate=2e-4), arm(emoe(), learning_rate=2e-4))
    arms = (
        *also_tested(full, pruned=True, cross=True),
        arm(emoe(gate="cosine"), learning_rate=2e-4, label="emoe-learn"),
        arm(moduli.GMoE(num_experts=6, top_k=2, layers="last:1"), learning_rate=2e-4),
        arm(Dense(), trains="lora", learning_rate=3e-3),
        arm(emoe(), trains="lora", learning_rate=3e-3),
    )
    return Plan(
        model="minilm",
        tasks=(TaskSpec("sentiment", SENTIMENT),),
        sources="each",
        arms=arms,
        seeds=tuple(range(8)),
        settings=FinetuneSettings(epochs=2),
    )


def vision() -> Plan:
    """The comparison on pictures: two choices of vendors to train on, five seeds.

    Settings are those that were best on the validation rows of the trained vendors in
    `vision_search`; dense comes first, since the others are compared with it.
    """
    arms = (
        arm(Dense(), learning_rate=2e-5),
        arm(emoe(24, 4, [8, 10]), learning_rate=2e-5),
        arm(moduli.GMoE(num_experts=6, top_k=2, layers=[10]), learning_rate=2e-5),
        arm(Dense(), trains="head", learning_rate=3e-2),
        arm(Dense(), trains="lora", learning_rate=2e-3),
        arm(emoe(24, 4, [8, 10]), trains="lora", learning_rate=2e-3),
    )
    return Plan(
        model="vit-s",
        tasks=(TaskSpec("emoji", {"max_train": 300, "max_validation": 30, "max_test": 60}),),
        sources=VENDORS,
        arms=also_tested(arms, pruned=True, cross=True),
        seeds=tuple(range(5)),
        settings=FinetuneSettings(epochs=2, image_size=112),
    )


def language() -> Plan:
    """A decoder learns the language of one genre, with low-rank factors; three seeds."""
    split = emoe(64, 32, [16, 18, 20, 22, 24, 26, 28])
    arms = (
        arm(Dense(), trains="lora", learning_rate=5e-4),
        arm(split, trains="lora", learning_rate=5e-4),
    )
    return Plan(
        model="smollm2",
        tasks=(TaskSpec("brown", {"domains": GENRES, "max_validation": 1, "max_test": 2}),),
        sources=(("news",),),
        arms=also_tested(arms, pruned=True, cross=True),
        seeds=(0, 1, 2),
        settings=FinetuneSettings(max_steps=120, batch_size=2, max_length=256),
    )


SEARCHES = ("text-search", "text-size", "text-mixed", "vision-search")
"""They choose settings, so that only their validation scores are looked at."""

PLANS: dict[str, Callable[[], Plan]] = {
    "text-search": text_search,
    "text-size": text_size,
    "text-mixed": text_mixed,
    "text": text,
    "vision-search": vision_search,
    "vision": vision,
    "language": language,
}
