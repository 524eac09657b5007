"""`python -m tests.reliability.killed_study`: a study killed often ends as one left in peace.

It is done once undisturbed and once with SIGKILLs at random moments, uniform over the time it
takes. Exit status 0 only if all records, inspections and summaries are the same and nothing is
left over.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import transformers

from tests.reliability.killing import PHASES, differences, draw_moments, kill_often, resumed
from tests.reliability.small_study import finish, make_plan, read_log, start, write_model


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="killed_study", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="rounded up to whole seeds of 20")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--root", type=Path, help="an empty directory; default: a temporary one")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="moduli-") as scratch:
        root = given.root or Path(scratch)
        if root.exists() and any(root.iterdir()):
            parser.error(f"{root} is not empty")
        return check(root.absolute(), given.runs, given.kills, given.seed)


def check(root: Path, runs: int, kills: int, seed: int) -> int:
    """Do the study twice under `root`, compare, and print what happened."""
    transformers.utils.logging.disable_progress_bar()
    write_model(root / "model")
    plan = make_plan(root / "model", runs)
    begin = time.monotonic()
    finish(start(plan, root / "undisturbed", root / "undisturbed.log"))
    between = time.monotonic()
    log = read_log(root / "undisturbed.log")
    moments = draw_moments(log, kills, seed)
    print(f"undisturbed: {sum(x.is_done for x in log)} runs, {between - begin:.0f} s", flush=True)
    hit = kill_often(plan, root / "killed", root / "killed.log", moments)
    print(f"killed:      {hit.total()} kills, {time.monotonic() - between:.0f} s")
    for name in PHASES:
        print(f"  {name:<14} {hit[name]:>4}")
    print(f"  resumed from a checkpoint: {resumed(read_log(root / 'killed.log'))} runs")
    found = differences(plan, root / "undisturbed", root / "killed")
    for line in found:
        print(f"  {line}")
    outcome = f"{len(found)} differences" if found else "equal"
    print(f"records, inspections, summary and leftovers: {outcome}")
    return 1 if found or hit.total() < kills else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.disable(logging.WARNING)
    sys.exit(main(sys.argv[1:]))
