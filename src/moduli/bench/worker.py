"""A process of the bench: a job on standard input, lines of JSON on standard output.

python -m moduli.bench.worker < job.json
"""

from __future__ import annotations

import json
import os
import sys

from moduli.bench.jobs import Job, work


def main() -> None:
    """Read the job, do it, write each row as soon as it is there."""
    # Whatever libraries print goes to standard error; the lines stay ours.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)
        for row in work(Job.from_dict(json.load(sys.stdin))):
            lines.write(json.dumps(row) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
