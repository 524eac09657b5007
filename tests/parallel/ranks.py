"""Real ranks on gloo: forked processes with a file for a store, many checks in one start."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

Work = Callable[[int, int, Path], Any]


def _main(rank: int, ranks: int, folder: Path, work: Work, seconds: float) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )
    try:
        torch.save(work(rank, ranks, folder), folder / f"{rank}.pt")
    except Exception:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # at once: what a failed group holds on to has nothing to finish


def run(work: Work, ranks: int, folder: Path, seconds: float = 60) -> list[Any]:
    """What `work(rank, ranks, folder)` returns on every rank; the text of its error instead,
    None where it ended without a word."""
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.start_processes(
        _main, args=(ranks, folder, work, seconds), nprocs=ranks, join=False, start_method="fork"
    )
    for process in context.processes:
        process.join(seconds + 60)
        assert not process.is_alive(), "a rank hangs"
    found: list[Any] = []
    for rank in range(ranks):
        said, failed = folder / f"{rank}.pt", folder / f"{rank}.txt"
        if said.exists():
            found.append(torch.load(said, weights_only=True))
        else:
            found.append(failed.read_text() if failed.exists() else None)
    return found


def meshes(ranks: int) -> tuple[Any, Any]:
    """Of the ranks that share experts, and of those that share a batch, which is each alone."""
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
    return mesh["ep"], mesh["tp"]
