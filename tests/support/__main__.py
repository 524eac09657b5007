"""`python -m tests.support [FAMILY...]` runs the checks and rewrites the table, row by row.

`--methods NAME...` runs those of some methods only, `--checks NAME...` some checks only; the
latter prints results as JSON and leaves the table alone.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from transformers.utils import logging

from tests import families
from tests.support import table
from tests.support.checks import CHECKS, methods, run_cell

EVERY = [*families.FAMILIES, *families.REFUSED]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--methods", nargs="+", choices=methods(), default=methods())
    parser.add_argument("--checks", nargs="+", choices=CHECKS)
    given = parser.parse_args()
    unknown = set(given.families) - set(EVERY)
    if unknown:
        parser.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(EVERY)}")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    stored = table.read() if table.EXPECTED.exists() else {}
    results: table.Results = {}
    for family in given.families or EVERY:
        row = stored.get(family, {})
        for method in given.methods:
            cell = run_cell(family, method, given.checks or CHECKS)
            row[method] = {name: str(result) for name, result in cell.items()}
            print(f"{family} {method}: {row[method]}", file=sys.stderr, flush=True)
        results[family] = {method: row[method] for method in methods() if method in row}
        if not given.checks:
            stored[family] = results[family]
            table.write({name: stored[name] for name in EVERY if name in stored})
    if given.checks:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
