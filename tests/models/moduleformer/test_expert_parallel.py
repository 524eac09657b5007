"""Feed-forward experts spread over real ranks, by the plan in the configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models.moduleformer import small
from tests.models.moduleformer.expert_parallel_worker import CASES, EXPERTS, step

ROOT = Path(__file__).parents[3]
RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every rank computed."""
    path = tmp_path_factory.mktemp("ep")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    command += [str(Path(__file__).with_name("expert_parallel_worker.py")), str(path)]
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.parametrize(("way", "backend"), CASES)
def test_ranks_compute_what_one_process_does(way: str, backend: str, folder: Path) -> None:
    expected = step(small.build(n_mlp_experts=EXPERTS))
    share = EXPERTS // RANKS
    for rank in range(RANKS):
        found = load_file(folder / f"{way}.{backend}.{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if "mlpf.experts" in name:
                assert len(found[name]) == share
                tensor = tensor[rank * share : (rank + 1) * share]
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
