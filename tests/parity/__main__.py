"""`python -m tests.parity FOLDER...`: one line per case; exit status 0 only if all passed."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.parity.runner import find_cases, run_case


def main(arguments: list[str]) -> int:
    folders = [Path(a) for a in arguments] or [Path(__file__).parent / "data"]
    missing = [str(f) for f in folders if not f.is_dir()]
    if missing:
        print(f"not a folder: {', '.join(missing)}", file=sys.stderr)
        return 2
    passed = failed = 0
    for path in find_cases(folders):
        outcome = run_case(path)
        print(outcome, flush=True)
        passed += outcome.passed
        failed += not outcome.passed
    print(f"{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
