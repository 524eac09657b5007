"""Run one of the studies of `plans.py`, or what is left of it; write its table and report.

    python benchmarks/emoe/study.py text
    python benchmarks/emoe/study.py text --report-only

Finished runs are in benchmarks/results/emoe/NAME/; they are never repeated. The same command
started twice shares the work. The report is benchmarks/results/emoe/NAME.html.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parents[1] / "results" / "emoe"


def main() -> int:
    """Run the command."""
    sys.path.insert(0, str(Path(__file__).parent))
    from plans import PLANS

    from moduli.allocator import tune_malloc
    from moduli.cli.live import StudyProgress
    from moduli.cli.output import Output
    from moduli.data import load_task
    from moduli.study.compare import collect, compare

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=list(PLANS))
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--root", type=Path, default=None)
    args = parser.parse_args()
    tune_malloc()
    torch.set_num_threads(1)  # the same on every machine, and two processes share two cores
    output = Output(as_json=False)
    plan = PLANS[args.study]()
    tasks = [load_task(task.name, on_event=output.note, **task.data) for task in plan.tasks]
    root = args.root or RESULTS / args.study
    study = collect(plan, tasks, root)
    if not args.report_only:
        with StudyProgress(output.log, study) as progress:
            study = compare(plan, tasks, root, on_event=progress.show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
