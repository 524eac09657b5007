"""Converted models compile without a graph break, forward and backward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_family_compiles_as_one_graph() -> None:
    command = [sys.executable, "-m", "tests.surgery.compile_families"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
