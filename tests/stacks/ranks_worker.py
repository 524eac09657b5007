"""One of two processes that train together; started by torchrun from `test_processes.py`.

Usage: ranks_worker.py FOLDER. Trains every case in every way that data-parallel training is done,
saves it with all processes calling `moduli.save`, and writes the final weights of each.
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard

import moduli
from moduli.errors import CheckpointError, ModelError
from moduli.surgery.modular import routed_layers
from tests import tiny
from tests.training.ddp_worker import InOrder, arguments

RATE, STEPS, ROWS = 0.05, 3, 2
# Noise and dropout would draw other numbers in two processes than in one.
PAPER = {"preset": "paper", "noise": 0.0, "aux": "switch", "expert_dropout": 0.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "bert, learned gate": ("bert", {"gate": "linear", "aux": "switch"}),
    "bert, paper": ("bert", PAPER),
    "bert, fast path, kept gate": ("bert", {"path": "fast", "gate_momentum": 0.0}),
    "llama": ("llama", {}),
    "llama, learned gate": ("llama", {"gate": "linear", "aux": "switch"}),
    "llama, cosine scores": ("llama", {"normalize_gate": True}),
}


def converted(case: str) -> Any:
    """The model of a case, the same in every process."""
    family, settings = CASES[case]
    model = tiny.build(family)
    settings = {"num_experts": 5, "top_k": 2, "layers": "all", "aux_weight": 0.5, **settings}
    moduli.convert(model, moduli.EMoE(**settings))
    return model.train()


def part(case: str, step: int, rank: int) -> dict[str, torch.Tensor]:
    """What process `rank` sees in a step: as many labelled tokens as the other process does."""
    return tiny.batch(tiny.rows(CASES[case][0], ROWS, seed=2 * step + rank))


def blocks(model: Any) -> list[Any]:
    """The layers of the model, each of which becomes a unit of sharding."""
    return list(model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers)


def with_ddp(model: Any) -> tuple[Any, Any, Callable[[Any], None]]:
    accelerator = Accelerator(cpu=True)
    optimiser = torch.optim.SGD(model.parameters(), RATE)
    wrapped, optimiser = accelerator.prepare(model, optimiser)
    return wrapped, optimiser, accelerator.backward


def with_fsdp(model: Any) -> tuple[Any, Any, Callable[[Any], None]]:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.SGD(model.parameters(), RATE), torch.Tensor.backward


def with_fsdp_of_projections(model: Any) -> tuple[Any, Any, Callable[[Any], None]]:
    """Every projection a unit of its own, so that its weight is in shards between its calls."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for layer in routed_layers(model).values():
        for projection in layer.ffn.projections.values():
            fully_shard(projection, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.SGD(model.parameters(), RATE), torch.Tensor.backward


def with_accelerate_fsdp(model: Any) -> tuple[Any, Any, Callable[[Any], None]]:
    """Accelerate turns FSDP on where it finds accelerators; on CPU its state is set by hand."""
    accelerator = Accelerator(cpu=True)
    before = accelerator.state.distributed_type
    state = accelerator.state._shared_state
    state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(blocks(model)[0]).__name__],
    )
    state["distributed_type"] = DistributedType.FSDP
    optimiser = torch.optim.SGD(model.parameters(), RATE)
    try:
        wrapped, optimiser = accelerator.prepare(model, optimiser)
    finally:
        state["distributed_type"] = before
        state["fsdp_plugin"] = None
    return wrapped, optimiser, torch.Tensor.backward


WAYS: dict[str, Callable[[Any], tuple[Any, Any, Callable[[Any], None]]]] = {
    "ddp": with_ddp,
    "fsdp2": with_fsdp,
    "fsdp2 of projections": with_fsdp_of_projections,
    "accelerate fsdp2": with_accelerate_fsdp,
}


def train(model: Any, case: str, optimiser: Any, backward: Any) -> None:
    for step in range(STEPS):
        backward(model(**part(case, step, dist.get_rank())).loss)
        optimiser.step()
        optimiser.zero_grad()


def alone(case: str, path: Path) -> None:
    """One process that trains the model of a case on what both see."""
    train_alone(converted(case), case, path)


def train_alone(model: Any, case: str, path: Path) -> None:
    """Minimise the mean of both processes' losses in every step, and save."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    for step in range(STEPS):
        for rank in range(2):
            (model(**part(case, step, rank)).loss / 2).backward()
        optimiser.step()
        optimiser.zero_grad()
    moduli.save(model, path)


def refusals(folder: Path) -> dict[str, str]:
    """What is said of things that cannot be done, by this process."""
    said = {}
    for name, model in (
        ("ddp", with_ddp(tiny.build("bert"))[0]),
        ("fsdp2", with_fsdp(tiny.build("bert"))[0]),
    ):
        try:
            moduli.convert(model, moduli.EMoE(num_experts=5, top_k=2))
        except ModelError as error:
            said[f"convert {name}"] = str(error)
    try:
        moduli.save(with_ddp(converted("bert"))[0], folder)  # holds files that are not ours
    except CheckpointError as error:
        said["save"] = str(error)
    return said


def merged_in_shards(folder: Path) -> None:
    """Merging a sharded model in place, after a forward that left the root's weights gathered."""
    model, *trained = with_fsdp(converted("bert, paper"))
    train(model, "bert, paper", *trained)
    with torch.no_grad():
        model.eval()(**part("bert", 0, 0))
    moduli.merge(model)
    moduli.save(model, folder / "merged in shards")


def with_adapters(folder: Path) -> None:
    """LoRA on a converted model, sharded, trained, saved on all processes."""
    model = adapted().train()
    prepared = with_fsdp(model)
    train(model, "bert", *prepared[1:])
    moduli.save(model, folder / "adapters")


def adapted() -> Any:
    settings = {"r": 2, "target_modules": r".*layer\.\d+\.(intermediate|output)\.dense"}
    torch.manual_seed(0)
    return get_peft_model(converted("bert"), LoraConfig(init_lora_weights=False, **settings))


def owned() -> Any:
    """A model whose experts have parameters of their own."""
    model = tiny.build("bert")
    moduli.convert(model, moduli.GMoE(num_experts=3, layers="all", noise=0.0, aux="switch"))
    return model.train()


def with_owned_experts(folder: Path) -> str:
    """GMoE in shards; returns why it cannot be merged in place."""
    model, *trained = with_fsdp(owned())
    train(model, "bert", *trained)
    moduli.save(model, folder / "owned")
    try:
        moduli.merge(model)
    except ModelError as error:
        return str(error)
    raise AssertionError("merged")


def with_trainer(folder: Path) -> None:
    """The stock Trainer, which wraps the model itself.

    Of a loss that the model does not divide by the number of items in all processes, BERT's among
    them, it makes as many times that loss as there are processes, in dense models too; so Llama's.
    """
    case = "llama, learned gate"
    # The Trainer deals batches out in turn: those of a step to process 0, then 1.
    seeds = range(2 * STEPS)
    rows = [row for seed in seeds for row in tiny.rows("llama", ROWS, seed=seed)]
    changes = {"learning_rate": RATE, "lr_scheduler_type": "constant"}
    trainer = InOrder(
        model=converted(case), args=arguments(folder / "run", **changes), train_dataset=rows
    )
    trainer.train()
    moduli.save(trainer.model_wrapped, folder / "trainer")


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    for case in CASES:
        for way, prepare in WAYS.items():
            model, optimiser, backward = prepare(converted(case))
            train(model, case, optimiser, backward)
            report = moduli.save(model, folder / way / case)
            assert report.gap is not None
            assert (report.directory / "moduli.json").exists(), "the others wait for process 0"
    merged_in_shards(folder)
    with_adapters(folder)
    with_trainer(folder)
    said = json.dumps({"merge": with_owned_experts(folder), **refusals(folder)})
    (folder / f"refusals.{dist.get_rank()}.json").write_text(said)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    gc.collect()  # whatever holds on to the process group goes before it
    dist.destroy_process_group()
