"""Experts spread over real ranks by transformers' own expert parallelism."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moduli
from moduli.errors import ModelError
from moduli.parallel import expert_parallel_plan
from tests import tiny
from tests.parallel.expert_parallel_worker import FAMILIES, WAYS, build, step

ROOT = Path(__file__).parents[2]
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
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_compute_what_one_process_does(family: str, way: str, folder: Path) -> None:
    expected = step(build(family), family)
    for rank in range(RANKS):
        found = load_file(folder / f"{way}.{family}.{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_the_expert_parallel_plan_names_banks_and_their_tensors() -> None:
    model = tiny.build("llama")
    moduli.convert(model, moduli.SparseUpcycling(num_experts=3, layers="last:1"))
    plan = expert_parallel_plan(model)
    bank = "model.layers.1.mlp.experts"
    assert plan == {
        bank: "ep_dispatch_experts",
        f"{bank}.gate_up_proj": "grouped_gemm",
        f"{bank}.down_proj": "grouped_gemm",
    }


def test_expert_parallelism_of_borrowed_experts_is_refused() -> None:
    model = tiny.build("bert")
    with pytest.raises(ModelError, match="has no experts of their own"):
        expert_parallel_plan(model)
    moduli.convert(model, moduli.EMoE(num_experts=4, top_k=2))
    with pytest.raises(ModelError, match="sharded like the dense model"):
        expert_parallel_plan(model)
