"""Run the studies of `plans.py`, or what is left of them; write their results and reports.

    python -m benchmarks.thor.study              all three
    python -m benchmarks.thor.study wesnoth      one
    python -m benchmarks.thor.study --report-only

Finished runs are in benchmarks/results/thor/runs/ and never repeated; studies share them. The same
command started twice shares the work. Models are kept there too, but not in the repository: what
THOR's experts do is measured with them (`modes.py`). NAME.html and NAME.json beside the directory
are made from the records, and so are the tables in the documentation (`tables.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.shared.studies import one_thread, run_study

if TYPE_CHECKING:
    from moduli.study.compare import Study
    from moduli.study.plan import Plan
    from moduli.study.spec import RunSpec

RESULTS = Path(__file__).parents[1] / "results" / "thor"


def main() -> int:
    """Run the command."""
    one_thread()
    from benchmarks.thor.plans import PLANS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(PLANS)}; default: all")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--root", type=Path, default=RESULTS, help="where results are kept")
    args = parser.parse_args()
    if unknown := set(args.studies) - set(PLANS):
        parser.error(
            f"there is no study {', '.join(sorted(unknown))}; there are {', '.join(PLANS)}"
        )
    failed = 0
    for name in args.studies or PLANS:
        plan = PLANS[name]()
        print(f"{name}: {len(plan.arms) * len(plan.seeds)} runs, {training_time(plan)}", flush=True)
        study = run_study(
            plan,
            args.root / "runs",
            args.root / name,
            command=["python", "-m", "benchmarks.thor.study", name],
            keep_models=("thor",),
            run=not args.report_only,
        )
        failed += len(study.failures)
        if not args.report_only:
            measure_modes(study, args.root / "runs")
    return 1 if failed else 0


def training_time(plan: Plan) -> str:
    """What training all of a plan takes, from the steps that were timed for the budgets."""
    from benchmarks.thor.plans import seconds_per_step
    from moduli.study.wording import duration

    # Other texts than those that were timed take longer or shorter.
    seconds = sum(
        seconds_per_step(str(arm.label)) * arm.overrides["max_steps"] for arm in plan.arms
    )
    return f"about {duration(len(plan.seeds) * seconds)} of training on one core, and tests"


def measure_modes(study: Study, runs: Path) -> None:
    """Measure what THOR's experts do, where it is not known; what another process does is left."""
    from benchmarks.thor.modes import RECORD, write_modes
    from moduli.data import load_task
    from moduli.study.inflight import BusyError, locked

    (task,) = (load_task(one.name, **one.data) for one in study.plan.tasks)
    for spec in stochastic(study):
        record = runs / spec.key / RECORD
        if record.is_file():
            continue
        try:
            with locked(record):
                if not record.is_file():
                    print(f"experts of {spec.key}, seed {spec.seed}", flush=True)
                    write_modes(record.parent, task)
        except BusyError:
            continue


def stochastic(study: Study) -> Iterator[RunSpec]:
    """The finished runs of THOR with more than one expert."""
    for run in study.runs:
        config = run.spec.method.config
        several = run.spec.method.name == "thor" and config["num_experts"] > 1
        if several and run.spec.key in study.records:
            yield run.spec


if __name__ == "__main__":
    sys.exit(main())
