"""Run one of the studies of `plans.py`, or what is left of it; write its results and report.

    python benchmarks/emoe/study.py text
    python benchmarks/emoe/study.py text --report-only

Finished runs are in benchmarks/results/emoe/NAME/; they are never repeated. The same command
started twice shares the work. NAME.json and NAME.html beside that directory are made from them,
and the tables in the documentation from NAME.json (tables.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "emoe"


def main() -> int:
    """Run the command."""
    # As on the command line of moduli. One thread: the same bits on every number of cores, and
    # two processes share two of them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from plans import PLANS, SEARCHES

    from moduli.allocator import tune_malloc
    from moduli.cli.live import StudyProgress
    from moduli.cli.output import Output, finite
    from moduli.data import load_task
    from moduli.inspect.files import write_text
    from moduli.study.compare import collect, compare
    from moduli.study.report import summary_dict, write_report
    from moduli.study.table import tabulate
    from moduli.study.wording import headline

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=list(PLANS))
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--root", type=Path, default=RESULTS, help="where results are kept")
    args = parser.parse_args()
    tune_malloc()
    torch.set_num_threads(1)
    output = Output(as_json=False)
    plan = PLANS[args.study]()
    tasks = [load_task(task.name, on_event=output.note, **task.data) for task in plan.tasks]
    root = args.root / args.study
    study = collect(plan, tasks, root)
    if not args.report_only:
        with StudyProgress(output.log, study) as progress:
            study = compare(plan, tasks, root, on_event=progress.show)
    split = "validation" if args.study in SEARCHES else "test"
    command = ["python", "benchmarks/emoe/study.py", args.study]
    write_report(study, root.with_suffix(".html"), root=root, split=split, command=command)
    summary = summary_dict(study, split=split)
    del summary["runs"]  # they are beside it
    write_text(root.with_suffix(".json"), json.dumps(finite(summary), indent=1) + "\n")
    output.text(*headline(tabulate(study, split=split)), f"report: {root.with_suffix('.html')}")
    return 1 if study.failures else 0


if __name__ == "__main__":
    sys.exit(main())
