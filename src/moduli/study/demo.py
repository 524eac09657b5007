"""What `moduli demo` runs: a small, honest study on a real encoder and real sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moduli.data.task import Task
from moduli.study.compare import Study, best_by_validation, compare
from moduli.study.handback import HandBack, hand_back
from moduli.study.plan import Plan, TaskSpec, arm
from moduli.study.records import RunRecord
from moduli.study.report import write_report
from moduli.study.run import Listener
from moduli.training.settings import FinetuneSettings

DATA = {"max_train": 1000, "max_test": 300}


@dataclass(frozen=True)
class Demo:
    """The finished demo."""

    study: Study
    chosen: RunRecord
    handed_back: HandBack
    report: Path


def demo_plan(seeds: tuple[int, ...] = (0, 1, 2)) -> Plan:
    """Dense against EMoE, trained on product reviews, tested on four domains.

    Small experts, half of them per token, in the last two layers: the split that changes the
    output of this encoder least before training, and within the range of the published
    experiments (k / N from 1/4 to 1/2). Chosen from those two facts, not from any test score.
    """
    import moduli
    from moduli.methods.dense import Dense

    emoe = moduli.EMoE(num_experts=64, top_k=32, layers="last:2")
    return Plan(
        model="minilm",
        tasks=(TaskSpec("sentiment", DATA),),
        sources=(("amazon",),),
        arms=(arm(Dense()), arm(emoe)),
        seeds=seeds,
        settings=FinetuneSettings(epochs=2),
    )


def run_demo(
    plan: Plan,
    task: Task,
    root: Path,
    *,
    command: list[str],
    on_event: Listener | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Demo:
    """Run what is left of the plan, write the report, hand back the best modular model.

    Args:
        plan: of `demo_plan`.
        task: its task, loaded.
        root: directory of the demo.
        command: for the report.
        on_event: called with `RunEvent`s of the study.
        on_line: called with one line for every step after it.

    Raises:
        ConfigError: no run of the modular method finished.
        CheckpointError: a directory is not ours, or the new process failed.
    """
    modular = 1
    name = plan.arms[modular].method.name
    study = compare(plan, [task], root, keep_models=(name,), on_event=on_event)
    report = root / "report.html"
    if study.records:
        write_report(study, report, root=root, command=command)
    chosen = best_by_validation(study.finished(modular))
    handed_back = hand_back(chosen, root / chosen.spec.key, task, root / "model", on_event=on_line)
    return Demo(study, chosen, handed_back, report)
