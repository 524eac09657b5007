"""THOR in a data-parallel `Trainer` on two real ranks, which write the gradients of each step.

    python -m tests.methods.thor.ddp_ranks FOLDER

The ranks are forked from one process that has imported everything and run no backward pass yet.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file

from moduli.methods.thor import last_step
from tests import tiny
from tests.methods.thor.models import build, parted
from tests.training.ddp_worker import Gradients, InOrder, arguments

RANKS, EXPERTS = 2, 4


def model() -> Any:
    """The same on every rank: THOR with experts that differ."""
    torch.manual_seed(0)
    return parted(build("llama", num_experts=EXPERTS, pair="distinct", alpha=2.0))


def rows() -> list[dict[str, torch.Tensor]]:
    """Two texts for each rank; they differ in how many labels they have."""
    return tiny.rows("llama", 2 * RANKS)


def train(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    # Accelerate asks for an address, which the group that is there already does not need.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    started = model()
    seen = Gradients()
    trainer = InOrder(model=started, args=arguments(folder), train_dataset=rows(), callbacks=[seen])
    torch.manual_seed(100 + rank)  # what a rank draws for itself must not matter
    trainer.train()
    assert trainer.args.world_size == RANKS
    record = last_step(started)
    assert record is not None
    (found,) = seen.steps
    save_file({n: g.contiguous() for n, g in found.items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(record.plan.experts))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(train, (Path(sys.argv[1]),), RANKS, start_method="fork")
