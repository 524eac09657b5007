"""Two processes of torchrun train as one would: the auxiliary loss is averaged over ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.training.ddp_worker import ALONE, CASES, converted
from tests.training.test_auxiliary import all_by_hand, assert_same, term_by_hand

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients of one step of every case, written by both ranks of one launch."""
    path = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    command += [str(Path(__file__).with_name("ddp_worker.py")), str(path)]
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.parametrize("case", [name for name in CASES if name != ALONE])
def test_ranks_average_to_one_large_batch(case: str, folder: Path) -> None:
    family = CASES[case][0]
    found, other = (load_file(folder / f"{case}.switch.{rank}.safetensors") for rank in (0, 1))
    without = load_file(folder / f"{case}.none.0.safetensors")
    _, term = term_by_hand(converted(case, "switch"), tiny.batch(tiny.rows(family) * 2))
    assert all(torch.equal(found[name], other[name]) for name in found)
    assert max(float(g.abs().max()) for g in term.values()) > 1e-2
    assert_same(found, {n: g + without.get(n, 0) for n, g in term.items()})


def test_a_gate_that_only_the_auxiliary_loss_trains(folder: Path) -> None:
    found = load_file(folder / f"{ALONE}.switch.0.safetensors")
    model = converted(ALONE, "switch")
    gates = [name for name in found if "router" in name]
    assert gates
    assert all(bool(found[name].any()) for name in gates)
    _, _, expected = all_by_hand(model, tiny.batch(tiny.rows("bert") * 2))
    assert_same({n: found[n] for n in gates}, {n: expected[n] for n in gates})
