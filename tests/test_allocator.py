"""What the C library keeps, and when it is given back."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOLES = """
from pathlib import Path
from moduli.allocator import release_growth, tune_malloc

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

assert tune_malloc()
release_growth()  # the measure
sizes = [2**20 * (4 + i % 3) for i in range(320)]
blocks = [(bytes([1]) * size, bytes([1]) * 2**12) for size in sizes]
pins = [pin for _, pin in blocks]  # between the large blocks, so that the top cannot fall
full = resident()
assert full > 1400
del blocks
kept = resident()
release_growth()
given_back = resident()
again = [bytes([1]) * 2**20 for _ in range(64)]
release_growth()  # the next measure
print(full, kept, given_back)
assert all(pin[0] == 1 for pin in pins)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is one of glibc")
def test_what_is_free_is_kept_until_the_process_has_doubled() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    full, kept, given_back = map(float, done.stdout.split())
    assert kept > 0.9 * full
    assert given_back < 0.2 * full
