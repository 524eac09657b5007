"""The stock Trainer, and a loop on Accelerate, with gating dropout: on real ranks or virtual ones.

torchrun --nproc_per_node=2 tests/parallel/gating_trainer.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import moduli
from moduli.parallel import (
    GatingDropout,
    gating_dropout,
    load_optimizer,
    save_optimizer,
    spread_experts,
)
from tests import tiny
from tests.parallel.gating_ranks import build

CONFIG = GatingDropout(p=0.5, local_policy="masked_gate", seed=2)
RANKS, ROWS, STEPS, PASSES = 2, 2, 4, 2


def rows() -> list[dict[str, torch.Tensor]]:
    """Of all batches of all ranks, in order."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, tiny.VOCAB, (RANKS * ROWS * STEPS * PASSES, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def train(folder: Path, ranks: int | None) -> list[tuple[int, bool]]:
    """Train, and save what came out; the step and the decision at every micro-batch.

    Args:
        folder: for the model, in `trained`.
        ranks: number of virtual ranks; None: this is one of several processes.
    """
    model = build("llama")
    if ranks is None:
        spread_experts(model)
    attached = gating_dropout(model, CONFIG, ranks=ranks)
    said: list[tuple[int, bool]] = []
    model.register_forward_pre_hook(
        lambda *_: said.append((int(attached.step or 0), bool(attached.dropped)))
    )
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "gradient_accumulation_steps": PASSES, "max_steps": STEPS,
        "per_device_train_batch_size": ROWS * (ranks or 1), "save_strategy": "no",
        "train_sampling_strategy": "sequential", "learning_rate": 1e-2, "max_grad_norm": 0.0,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    trainer = Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=rows(),
        callbacks=[attached.callback()],
    )
    trainer.train()
    model.save_pretrained(folder / "trained")
    return said


def loop(folder: Path, ranks: int | None, resume: bool = False) -> None:
    """A loop of one's own: Accelerate shares out the batches, and the model is spread already.

    It resumes from the middle by a checkpoint and the state of its optimiser.
    """
    accelerator = Accelerator(cpu=True)
    model = moduli.load(folder / "half").train() if resume else build("llama")
    if ranks is None:
        spread_experts(model)
    attached = gating_dropout(model, CONFIG, ranks=ranks)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = DataLoader(rows(), batch_size=ROWS * (ranks or 1))  # type: ignore[arg-type]
    optimiser, batches = accelerator.prepare(optimiser, batches)  # not the model
    half = STEPS * PASSES // 2
    if resume:
        load_optimizer(model, optimiser, folder / "half.safetensors")
    for step, batch in enumerate(batches):
        if step == half and not resume:
            model.save_pretrained(folder / "half")
            save_optimizer(model, optimiser, folder / "half.safetensors")
        if step < half and resume:
            continue
        attached.set_step(step)
        accelerator.backward(model(**batch).loss)
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder / ("resumed" if resume else "loop"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    where, rank = Path(sys.argv[1]), os.environ["RANK"]
    everything = train(where, None)
    loop(where, None)
    loop(where, None, resume=True)
    (where / f"{rank}.json").write_text(json.dumps(everything))
    dist.destroy_process_group()
