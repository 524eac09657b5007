"""Measure ModuleFormer's three claims, or what is left of them.

    python benchmarks/moduleformer/study.py              all three
    python benchmarks/moduleformer/study.py extension    one
    python benchmarks/moduleformer/study.py --trial      whether it works, in minutes; elsewhere

Every finished run leaves a record, benchmarks/results/moduleformer/CLAIM/RUN.json, and is never
repeated. The same command started twice shares the work. The tables in the documentation are made
from the records (tables.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "moduleformer"
WAIT = 5.0
"""Seconds until a run in the hands of another process is looked at again."""

Job = tuple[Path, dict[str, Any], Callable[[], Any]]
"""A record's file, what decides its content, and the work."""


def main() -> int:
    """Run the command."""
    # One thread: the same bits on every number of cores, and two processes share two of them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from moduli.allocator import tune_malloc

    plans = _beside("plans")
    names = ", ".join(plans.CLAIMS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("claims", nargs="*", help=f"of {names}; default: all")
    parser.add_argument("--trial", action="store_true", help="a few steps of everything, one seed")
    parser.add_argument("--root", type=Path, help="where records are kept")
    parser.add_argument(
        "--models", type=Path, default=ROOT / "runs" / "moduleformer", help="and models"
    )
    args = parser.parse_args()
    if unknown := set(args.claims) - set(plans.CLAIMS):
        parser.error(f"there is no claim {', '.join(sorted(unknown))}; there are {names}")
    tune_malloc()
    torch.set_num_threads(1)
    scale = plans.TRIAL if args.trial else plans.FULL
    root = args.root or (args.models / "trial" if args.trial else RESULTS)
    claims = args.claims or plans.CLAIMS
    todo = [job for claim in claims for job in jobs(claim, scale, root, args.models)]
    work_off(todo)
    return 0


def jobs(claim: str, scale: Any, root: Path, models: Path) -> list[Job]:
    """What a claim needs, in the order in which it is done."""
    plans, work = _beside("plans"), _beside("runs")
    found: list[Job] = [
        (
            root / claim / f"{run.name}.json",
            run.to_dict(),
            lambda run=run: work.execute(run, models),
        )
        for run in plans.runs(claim, scale)
    ]
    if claim == "efficiency":
        arms = plans.CLAIMS[claim]
        spec = speed_spec(arms, scale)
        found.append((root / claim / "speed.json", spec, lambda: work.speeds(arms, scale, models)))
    return found


def speed_spec(arms: Any, scale: Any) -> dict[str, Any]:
    """All that speeds depend on: models, settings, machine and versions."""
    from moduli.study.environment import hardware, versions

    plans = _beside("plans")
    return {
        "arms": [asdict(arm) for arm in arms],
        "seed": scale.seeds[0],
        "scale": {**asdict(scale), "seeds": None},
        "vocab_size": plans.VOCAB,
        "pretraining": asdict(plans.pretraining(scale)),
        "machine": hardware(),
        "versions": versions(),
    }


def work_off(todo: list[Job]) -> None:
    """Do what has no record yet; what another process does is waited for."""
    from moduli.study.inflight import BusyError, locked

    while todo:
        left = []
        for path, spec, work in todo:
            if known(path, spec):
                continue
            try:
                with locked(path):
                    if not known(path, spec):
                        do(path, spec, work)
            except BusyError:
                left.append((path, spec, work))
        if len(left) == len(todo):
            time.sleep(WAIT)
        todo = left


def do(path: Path, spec: dict[str, Any], work: Callable[[], Any]) -> None:
    """One run, and its record."""
    from moduli.study.environment import hardware, versions
    from moduli.study.records import write_json

    started = time.process_time()
    found = work()
    seconds = time.process_time() - started
    environment = {"versions": versions(), "hardware": hardware(), "cpu_seconds": seconds}
    write_json(path, {"run": spec, "found": found, "environment": environment})
    print(f"{path.parent.name}/{path.stem}: {seconds:.0f} s of processor time", flush=True)


def known(path: Path, spec: dict[str, Any]) -> bool:
    """Whether the record is there. One of another machine is none: it is measured anew.

    Raises:
        SystemExit: it is of other settings.
    """
    if not path.is_file():
        return False
    if json.loads(path.read_text(encoding="utf-8"))["run"] != json.loads(json.dumps(spec)):
        if "machine" in spec:
            return False
        sys.exit(f"{path} is of other settings than plans.py has; delete it to do the run again")
    return True


def _beside(name: str) -> Any:
    """A module beside this file, however it was started."""
    return import_module(f"{__package__}.{name}" if __package__ else name)


if __name__ == "__main__":
    sys.exit(main())
