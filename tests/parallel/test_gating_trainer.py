"""The stock Trainer and a loop on Accelerate under torchrun: a run of two ranks is that of two
virtual ranks in one process, and a resumed one ends where the other did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.gating_trainer import CONFIG, PASSES, RANKS, STEPS, loop, train

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_trainer_and_own_loop_under_torchrun(tmp_path: Path) -> None:
    spread, alone = tmp_path / "spread", tmp_path / "alone"
    spread.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    command += [f"--nproc_per_node={RANKS}", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    command += [str(Path(__file__).with_name("gating_trainer.py")), str(spread)]
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [(step, CONFIG.decisions(step, 1)[0]) for step in range(STEPS)]
    each = [list(pair) for pair in expected for _ in range(PASSES)]
    assert {dropped for _, dropped in expected} == {True, False}
    for rank in range(RANKS):
        assert json.loads((spread / f"{rank}.json").read_text()) == each
    assert [list(pair) for pair in train(alone, RANKS)] == each
    loop(alone, RANKS)
    for way, same in (("trained", "trained"), ("loop", "loop"), ("resumed", "loop")):
        found = load_file(spread / way / "model.safetensors")
        wanted = load_file(alone / same / "model.safetensors")
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            near = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(found[key], tensor, **near, msg=f"{way} {key}")
    went_on = load_file(spread / "loop" / "model.safetensors")
    resumed = load_file(spread / "resumed" / "model.safetensors")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in went_on.items())
