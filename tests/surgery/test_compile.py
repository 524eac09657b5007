"""Converted models compile without a graph break, forward and backward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import MODELS

ROOT = Path(__file__).parents[2]


SLOW = pytest.param([family for family in MODELS if family != "bert"], marks=pytest.mark.slow)


@pytest.mark.parametrize("families", [["bert"], SLOW], ids=["bert", "others"])
def test_families_compile_as_one_graph(families: list[str]) -> None:
    command = [sys.executable, "-m", "tests.surgery.compile_families", *families]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
