"""`torch.compile(fullgraph=True)` of converted models computes what they compute without it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = ("bert", "vit", "gpt2", "llama", "t5", "t5-gated", "modernbert")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_without_a_break(family: str) -> None:
    command = [sys.executable, "-m", "tests.stacks.compile_worker", "aot_eager", family]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_default_compiler() -> None:
    command = [sys.executable, "-m", "tests.stacks.compile_worker", "inductor", "bert"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
