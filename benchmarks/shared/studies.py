"""What commands that run a study share: one thread, the runs that are left, a report, a summary."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moduli.study.compare import Study
    from moduli.study.plan import Plan
    from moduli.study.table import Split


def one_thread() -> None:
    """Set this process up as the command line of moduli does. Before torch is imported.

    One thread: the same bits on every number of cores, and two processes share two of them.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from moduli.allocator import tune_malloc

    tune_malloc()
    torch.set_num_threads(1)


def run_study(
    plan: Plan,
    root: Path,
    report: Path,
    *,
    command: Sequence[str],
    split: Split = "test",
    keep_models: tuple[str, ...] = (),
    run: bool = True,
) -> Study:
    """Do what is left of a study, and write `report`.html and `report`.json.

    Args:
        plan: of the study.
        root: where its runs are.
        report: path without an ending.
        command: what the report names as its origin.
        split: whose scores are shown.
        keep_models: names of methods whose tuned models are kept with their runs.
        run: False leaves it at the runs that are finished.
    """
    from moduli.cli.live import StudyProgress
    from moduli.cli.output import Output, finite
    from moduli.data import load_task
    from moduli.inspect.files import write_text
    from moduli.study.compare import collect, compare
    from moduli.study.report import summary_dict, write_report
    from moduli.study.table import tabulate
    from moduli.study.wording import headline

    output = Output(as_json=False)
    tasks = [load_task(task.name, on_event=output.note, **task.data) for task in plan.tasks]
    study = collect(plan, tasks, root)
    if run:
        with StudyProgress(output.log, study) as progress:
            study = compare(plan, tasks, root, keep_models=keep_models, on_event=progress.show)
    page = report.with_suffix(".html")
    write_report(study, page, root=root, split=split, command=command)
    summary = summary_dict(study, split=split)
    del summary["runs"]  # they are beside it
    write_text(report.with_suffix(".json"), json.dumps(finite(summary), indent=1) + "\n")
    output.text(*headline(tabulate(study, split=split)), f"report: {page}")
    return study
