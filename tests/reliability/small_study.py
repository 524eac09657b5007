"""A study of runs that take a fraction of a second, done by processes that can be killed.

A tiny random BERT with dropout, made sentences of three domains, arms of every sort: dense, split
experts tested merged and pruned, LoRA, copied experts. A process notes in a log what it does.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moduli.data.task import Task
    from moduli.study.plan import Plan
    from moduli.study.run import RunEvent

WIDTH, NEURONS, LAYERS = 16, 32, 2
RUNS_PER_SEED = 20
"""Five pairs of arm and learning rate, two groups of sources, two fractions."""
PRELOADED = [
    "tests.reliability.small_study",
    "moduli.study.compare",
    "moduli.inspect.inspecting",
    "moduli.inspect.training",
    "moduli.surgery.static",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "datasets",
    "peft",
]
"""What a server imports once, so that a process that goes on is there at once."""


def write_model(directory: Path) -> None:
    """The model, with its tokenizer."""
    import torch
    import transformers

    from tests.training.tinykinds import tokenizer

    words = tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(directory)
    words.save_pretrained(directory)


def make_task() -> Task:
    """16 sentences per domain to train on, 8 to choose by, 8 to test on."""
    from datasets import Dataset

    from moduli.data.task import Splits, Task
    from tests.training.tinykinds import BAD, GOOD

    things = {"shop": ("camera", "phone"), "film": ("story", "plot"), "food": ("soup", "menu")}
    domains = {}
    for domain, names in things.items():
        rows = [
            {"text": f"the {name} was {'very ' * (i % 3)}{word}", "label": label}
            for i, pair in enumerate(zip(GOOD[:4], BAD[:4], strict=True))
            for name in (*names, f"{names[0]} and {names[1]}", f"{names[1]} and {names[0]}")
            for label, word in enumerate(pair)
        ]
        domains[domain] = Splits(
            Dataset.from_list(rows[0::2]),
            Dataset.from_list(rows[1::4]),
            Dataset.from_list(rows[2::4]),
        )
    return Task("made", "classification", ("good", "bad"), domains)


def make_plan(model: Path, runs: int) -> Plan:
    """At least so many runs: as many seeds as it takes."""
    import moduli
    from moduli.study.plan import Plan, TaskSpec, also_tested, arm
    from moduli.training.settings import FinetuneSettings

    emoe = moduli.EMoE(num_experts=4, top_k=2, layers="all", split="contiguous")
    gmoe = moduli.GMoE(num_experts=2, top_k=1, layers="last:1")
    arms = (
        arm(moduli.Dense(), learning_rate=(1e-3, 3e-3)),
        arm(emoe),
        arm(moduli.Dense(), trains="lora", lora_rank=2),
        arm(gmoe, max_steps=8),
    )
    return Plan(
        model=str(model),
        tasks=(TaskSpec("made"),),
        sources=(("shop",), ("shop", "film")),
        arms=also_tested(arms, pruned=True, cross=False),
        seeds=tuple(range(math.ceil(runs / RUNS_PER_SEED))),
        settings=FinetuneSettings(
            max_steps=12, batch_size=4, max_length=16, learning_rate=3e-3, bf16=False
        ),
        fractions=(0.5, 1.0),
    )


def shorter(plan: Plan) -> Plan:
    """Half of the runs of one seed."""
    return dataclasses.replace(plan, seeds=(0,), fractions=(0.5,))


@dataclass(frozen=True)
class Line:
    """Of a log: when something happened (`time.monotonic`), in which process and in which run."""

    at: float
    process: int
    key: str
    stage: str
    step: int

    @property
    def is_done(self) -> bool:
        """Whether the run is there from now on."""
        return self.stage in ("finished", "known")


def read_log(path: Path) -> list[Line]:
    """All complete lines; none if there is no log yet."""
    try:
        lines = path.read_text(encoding="ascii").split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [
        Line(float(at), int(process), key, stage, int(step))
        for at, process, key, stage, step in (line.split() for line in lines)
    ]


def start(plan: Plan, root: Path, log: Path) -> multiprocessing.process.BaseProcess:
    """A process that does what is left of the study."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=work, args=(plan, root, log))
    process.start()
    return process


def work(plan: Plan, root: Path, log: Path) -> None:
    """What such a process does."""
    import logging
    import warnings

    import torch
    import transformers

    from moduli.study import compare as module

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    module.POLL_SECONDS = 0.05
    # One write per line, so that lines of several processes do not mix and a kill cuts none.
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(event: RunEvent) -> None:
        step: Any = event.detail.step if event.stage == "step" else 0
        line = f"{time.monotonic()} {os.getpid()} {event.spec.key} {event.stage} {step}\n"
        os.write(out, line.encode("ascii"))

    module.compare(plan, [make_task()], root, checkpoint_every=1, on_event=note)


def finish(process: multiprocessing.process.BaseProcess, seconds: float = 900) -> None:
    """Wait for its end.

    Raises:
        RuntimeError: it failed, or it was not done in time.
    """
    process.join(seconds)
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError(f"a process of the study ended with {process.exitcode}")
