"""Two processes train a converted model as one would, whatever spreads it, and save it once.

DistributedDataParallel (by Accelerate and by the stock Trainer) and FSDP2 (`fully_shard` by hand
and by Accelerate) on CPU, in float32. The reference is one process that averages the losses of the
same batches. Weights agree to 1e-6 of a unit; where every process computes in the same order, and
that is nearly everywhere, they are bit-equal.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import moduli
from tests import tiny
from tests.stacks import ranks_worker as worker

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the two processes of one launch have written."""
    path = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    command += [str(Path(worker.__file__)), str(path)]
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process saves, by case."""
    path = tmp_path_factory.mktemp("alone")
    for case in worker.CASES:
        worker.alone(case, path / case)
    return {case: path / case for case in worker.CASES}


def tensors(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6, msg=name)


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    found: Tensor = model.eval()(**tiny.batch(tiny.rows(family, 3))).logits
    return found


@pytest.mark.parametrize("way", worker.WAYS)
@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_train_and_save_what_one_does(
    case: str, way: str, folder: Path, alone: dict[str, Path]
) -> None:
    saved = folder / way / case
    assert sorted(p.name for p in saved.iterdir()) == sorted(p.name for p in alone[case].iterdir())
    assert_same(tensors(saved), tensors(alone[case]))
    gaps = [json.loads((p / "moduli.json").read_text())["gap"] for p in (saved, alone[case])]
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-4)
    family = worker.CASES[case][0]
    untrained = worker.converted(case)
    one, other = (moduli.load(p) for p in (saved, alone[case]))
    torch.testing.assert_close(logits(one, family), logits(other, family), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(one, family), logits(untrained, family), atol=1e-2)


def test_the_stock_trainer(folder: Path, alone: dict[str, Path]) -> None:
    assert_same(tensors(folder / "trainer"), tensors(alone["llama, learned gate"]))


def test_merging_in_shards(folder: Path, alone: dict[str, Path]) -> None:
    found = load_file(folder / "merged in shards" / "model.safetensors")
    assert_same(found, load_file(alone["bert, paper"] / "model.safetensors"))


def test_adapters_of_a_sharded_model(folder: Path, tmp_path: Path) -> None:
    model = worker.adapted().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, worker.RATE)
    for step in range(worker.STEPS):
        for rank in range(2):
            (model(**worker.part("bert", step, rank)).loss / 2).backward()
        optimiser.step()
        optimiser.zero_grad()
    moduli.save(model, tmp_path / "alone")
    assert_same(tensors(folder / "adapters"), tensors(tmp_path / "alone"))
    loaded = PeftModel.from_pretrained(tiny.build("bert"), folder / "adapters")
    with moduli.dense(model):
        expected = logits(model, "bert")
    torch.testing.assert_close(logits(loaded, "bert"), expected, rtol=1e-4, atol=1e-4)


def test_experts_of_their_own_in_shards(folder: Path, tmp_path: Path) -> None:
    worker.train_alone(worker.owned(), "bert", tmp_path / "alone")
    assert_same(tensors(folder / "owned"), tensors(tmp_path / "alone"))


def test_what_cannot_be_done_is_said_in_every_process(folder: Path) -> None:
    first, second = (json.loads((folder / f"refusals.{r}.json").read_text()) for r in (0, 1))
    for said in (first, second):
        assert "before wrapping" in said["convert ddp"]
        assert "sharded over processes" in said["merge"]
        assert "before sharding" in said["convert fsdp2"]
        assert "was not written by moduli" in said["save"]
    assert second["save"].startswith("process 0 could not write")
