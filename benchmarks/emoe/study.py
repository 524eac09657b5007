"""Run one of the studies of `plans.py`, or what is left of it; write its results and report.

    python benchmarks/emoe/study.py text
    python benchmarks/emoe/study.py text --report-only

Finished runs are in benchmarks/results/emoe/NAME/; they are never repeated. The same command
started twice shares the work. NAME.json and NAME.html beside that directory are made from them,
and the tables in the documentation from NAME.json (tables.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "emoe"
sys.path.insert(0, str(ROOT))  # this file is run as a script


def main() -> int:
    """Run the command."""
    from benchmarks.shared.studies import one_thread, run_study

    one_thread()
    from benchmarks.emoe.plans import PLANS, SEARCHES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=list(PLANS))
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--root", type=Path, default=RESULTS, help="where results are kept")
    args = parser.parse_args()
    study = run_study(
        PLANS[args.study](),
        args.root / args.study,
        args.root / args.study,
        command=["python", "benchmarks/emoe/study.py", args.study],
        split="validation" if args.study in SEARCHES else "test",
        run=not args.report_only,
    )
    return 1 if study.failures else 0


if __name__ == "__main__":
    sys.exit(main())
