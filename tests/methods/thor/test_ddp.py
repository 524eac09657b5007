"""Two ranks draw the same experts, and step as one process with all rows would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moduli.methods.thor import last_step
from tests import tiny
from tests.methods.thor.ddp_ranks import EXPERTS, RANKS, model, rows
from tests.methods.thor.models import assert_same, gradients

ROOT = Path(__file__).parents[3]


@pytest.mark.slow  # without the Trainer: tests/parallel, copies that every rank holds
def test_ranks_are_one_large_batch(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.methods.thor.ddp_ranks", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = model().train()
    alone(**tiny.batch(rows())).loss.backward()
    record = last_step(alone)
    assert record is not None
    for rank in range(RANKS):
        plan = json.loads((tmp_path / f"{rank}.json").read_text())
        assert tuple(map(tuple, plan)) == record.plan.experts
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert_same(found, gradients(alone), rtol=1e-4, atol=1e-6)
        # Two of four experts have no gradient at all, on no rank.
        for layer, drawn in enumerate(zip(*record.plan.experts, strict=True)):
            names = [f"layers.{layer}.mlp.up_proj.experts.{e}." for e in range(EXPERTS)]
            trained = {e for e, name in enumerate(names) if any(name in key for key in found)}
            assert trained == set(drawn)
