"""One rank of a data-parallel training; started by torchrun from `test_ddp_auxiliary.py`.

Usage: ddp_worker.py FOLDER. Writes the gradients of one step of every case, one file per rank.
"""

import gc
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

import moduli
from tests import tiny

ALONE = "bert, gate trained by the auxiliary loss alone"
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: family, settings of EMoE, settings of the Trainer
    "bert": ("bert", {"gate": "linear"}, {}),
    "bert, two micro-batches": ("bert", {"gate": "linear"}, {"gradient_accumulation_steps": 2}),
    ALONE: ("bert", {"gate": "cosine", "combine": "one"}, {}),
    "llama, two micro-batches": ("llama", {"gate": "linear"}, {"gradient_accumulation_steps": 2}),
    "llama, checkpointing": ("llama", {"gate": "linear"}, {"gradient_checkpointing": True}),
}


def converted(case: str, aux: str) -> Any:
    """The model of a case; the same in every process."""
    family, settings, _ = CASES[case]
    model = tiny.build(family)
    settings = {"num_experts": 6, "top_k": 2, "layers": "all", "aux_weight": 0.5, **settings}
    moduli.convert(model, moduli.EMoE(aux=aux, **settings))
    return model


class Gradients(TrainerCallback):
    """Keeps the gradients of every step, as the optimiser sees them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        model = getattr(model, "module", model)
        self.steps.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )


class InOrder(Trainer):
    """The stock Trainer, with the data in the order given."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """One epoch without any change of the weights (learning rate 0), so that steps compare."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.0,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **changes})


def main(folder: Path) -> None:
    if hasattr(Trainer.training_step, "__wrapped__"):
        raise SystemExit("importing moduli must not touch the Trainer")
    for case, aux in itertools.product(CASES, ("none", "switch")):
        if case == ALONE and aux == "none":
            continue  # nothing would train the gate
        family, _, changes = CASES[case]
        micro = tiny.rows(family)
        per_rank = changes.get("gradient_accumulation_steps", 1)
        seen = Gradients()
        trainer = InOrder(
            model=converted(case, aux),
            args=arguments(folder, **changes),
            train_dataset=micro * 2 * per_rank,  # every micro-batch of every rank is the same
            callbacks=[seen],
        )
        trainer.train()
        assert len(seen.steps) == 1
        assert trainer.args.world_size == 2
        save_file(
            {n: g.contiguous() for n, g in seen.steps[0].items()},
            folder / f"{case}.{aux}.{trainer.args.process_index}.safetensors",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # What hangs on the process group goes before it: freed after it, it may wait for ever.
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
