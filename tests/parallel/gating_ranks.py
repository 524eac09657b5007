"""Gating dropout on real gloo ranks: one process forks groups of them, which write what they find.

    python -m tests.parallel.gating_ranks FOLDER RANKS [--full]

Forking a process that has run no backward pass yet starts ranks in no time, and a test process has
run some. Every group does many checks; `tests/parallel/test_gating_ranks.py` looks at the results.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed.expert_parallel import apply_expert_parallelism

import moduli
from moduli.methods.thor.passes import start_step
from moduli.models.moduleformer import ModuleFormerConfig, ModuleFormerForCausalLM
from moduli.parallel import (
    GatingDropout,
    expert_parallel_plan,
    gating_dropout,
    load_optimizer,
    save_optimizer,
    spread_experts,
)
from tests import families, tiny

ROWS, LENGTH, EXPERTS = 4, 5, 4
FAST = ("llama", "bert", "mixtral")
MODELS = (*FAST, "moduleformer", "olmoe", "qwen2_moe")
CONFIGS = {
    "exchange": GatingDropout(p=0.0),
    "paper": GatingDropout(p=1.0),
    "masked_gate": GatingDropout(p=1.0, local_policy="masked_gate"),
    "modulo": GatingDropout(p=1.0, local_policy="modulo"),
    "gate_expert_drop": GatingDropout(p=1.0, mode="gate_expert_drop"),
}
TIMEOUT = 5.0
RESUMED, DROPS = 1, [True, True, False, False]  # a seed, and what it decides


def build(family: str) -> Any:
    """A tiny model with 4 owned experts per layer that differ, in training mode."""
    if family in families.MOE:
        model = families.moe(family)
    elif family == "moduleformer":
        config = ModuleFormerConfig(
            vocab_size=tiny.VOCAB, n_embd=16, att_hidden=8, n_head=2, ffd_hidden=12, n_layer=2,
            n_att_experts=4, k_att=2, n_mlp_experts=EXPERTS, k_mlp=2, gating_size=8,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = tiny.initialise(lambda: ModuleFormerForCausalLM(config))
    else:
        model = families.build(family)
        method: Any = moduli.SparseUpcycling(num_experts=EXPERTS, layers="all", aux="none")
        if family == "bert":  # with a capacity, which is counted on every rank
            method = moduli.GMoE(
                num_experts=EXPERTS, layers="all", noise=0.0, aux="none", capacity_factor=1.0
            )
        moduli.convert(model, method)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, tiny.VOCAB, (ROWS, LENGTH), generator=generator)


def passed(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a pass forth and back; gradients are of the sum of their squares."""
    model.zero_grad()
    logits: Tensor = model(input_ids=ids).logits
    logits.square().sum().backward()
    return logits.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole, by name; only those that are not 0."""
    found = {}
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        if grad is not None:
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            if bool(grad.abs().max() > 0):
                found[name] = grad.clone()
    return found


def in_one_process(model: nn.Module, ranks: int) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """What virtual ranks in one process compute, by configuration."""
    found = {}
    for name, config in CONFIGS.items():
        attached = gating_dropout(model, config, ranks=ranks)
        attached.set_step(0)
        found[name] = (passed(model, tokens()), gradients(model))
        attached.remove()
    return found


# --- groups of ranks ------------------------------------------------------------------------------


def compute(rank: int, ranks: int, folder: Path, models: tuple[str, ...]) -> dict[str, Any]:
    """Logits, gradients and messages of every model and configuration; checkpoints."""
    torch.manual_seed(rank)  # nothing may depend on it
    tensors: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mine = tokens().chunk(ranks)[rank]
    for family in models:
        model = build(family)
        spread_experts(model)
        if family in ("llama", "mixtral"):
            model.save_pretrained(folder / f"saved-{family}")
        for name, config in CONFIGS.items():
            attached = gating_dropout(model, config)
            attached.set_step(0)
            with Exchanges() as messages:
                logits = passed(model, mine)
            counts[f"{family}.{name}"] = messages.count
            tensors[f"{family}.{name}.logits"] = logits
            for key, grad in gradients(model).items():
                tensors[f"{family}.{name}.grad.{key}"] = grad
            if name == "gate_expert_drop":
                model.eval()  # last: until the next pass the weights of the root stay gathered
                with torch.no_grad(), Exchanges() as messages:
                    model(input_ids=mine)
                counts[f"{family}.eval"] = messages.count
                model.train()
            attached.remove()
    save_file(tensors, folder / f"{rank}.safetensors")
    return {"exchanges": counts}


class Exchanges(TorchDispatchMode):
    """Counts all-to-alls, forth and back."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "all_to_all" in str(func) or "alltoall" in str(func)
        return func(*args, **(kwargs or {}))


def agree(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Decisions, edge cases of load, and what is said of disagreement."""
    torch.manual_seed(rank)
    found: dict[str, Any] = {}
    model, meshes = build("llama"), mesh_of(ranks)
    apply_expert_parallelism(model, *meshes, expert_parallel_plan(model), "gating_dropout")
    attached = gating_dropout(model, GatingDropout(p=0.5, sync="broadcast", debug=True))
    said = []
    for step in range(12):
        attached.set_step(step)
        said.append(bool(attached.dropped))
    found["broadcast"] = said
    found["step"] = error_of(lambda: attached.set_step(100 + rank))
    attached.remove()
    found["seed"] = error_of(lambda: gating_dropout(model, GatingDropout(p=0.5, seed=rank)))
    found["ranks"] = error_of(lambda: gating_dropout(model, GatingDropout(p=0.5), ranks=ranks + 1))
    found["load"] = load(rank, model)
    return found


def load(rank: int, model: Any) -> dict[str, float]:
    """A layer whose last rank has no token, and whose experts but one are not used."""
    layer = model.model.layers[0].mlp
    with torch.no_grad():
        layer.router.gate.weight.zero_()  # ties go to expert 0
        layer.router.gate.weight[0] = 1
    last = rank == dist.get_world_size() - 1
    x = torch.ones(0 if last else 2, 3, tiny.WIDTH, requires_grad=True)
    found = {}
    for name, config in CONFIGS.items():
        attached = gating_dropout(model, config)
        attached.set_step(0)
        layer.zero_grad()
        y = layer(x)
        assert y.shape == x.shape
        if y.requires_grad:
            y.sum().backward()
        grads = [p.grad for p in layer.experts.parameters()]
        found[name] = sum(float(g.to_local().abs().sum()) for g in grads if g is not None)
        attached.remove()
    return found


def die(rank: int, ranks: int, folder: Path, where: str) -> None:
    """The last rank ends without a word, or does not come."""
    model, (_, alone) = build("llama"), mesh_of(ranks)
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ep",))
    apply_expert_parallelism(model, mesh, alone, expert_parallel_plan(model), "gating_dropout")
    gating_dropout(model, GatingDropout(p=0.0)).set_step(0)  # all of them are there
    passed(model, tokens()[rank : rank + 1])
    last = rank == ranks - 1
    if last and where == "forward":
        os._exit(9)
    if last and where == "late":
        time.sleep(3 * TIMEOUT)
        os._exit(9)
    loss = model(input_ids=tokens()[rank : rank + 1]).logits.square().sum()
    if last:
        os._exit(9)
    loss.backward()


def resume(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """A run of four steps, and one that stops after two; the first steps train no expert."""
    config = GatingDropout(p=0.5, mode="gate_expert_drop", seed=RESUMED)
    assert [each for step in range(4) for each in config.decisions(step, 1)] == DROPS
    ends = []
    for first in (0, 2):
        model = build("llama") if first == 0 else moduli.load(folder / "half").train()
        spread_experts(model, ranks=2)  # of 4 ranks two have the same experts
        attached = gating_dropout(model, config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if first:
            load_optimizer(model, optimizer, folder / "half.safetensors")
        for step in range(first, 4):
            if step == 2 and not first:
                model.save_pretrained(folder / "half")
                save_optimizer(model, optimizer, folder / "half.safetensors")
            attached.set_step(step)
            ids = tokens().roll(step, 1).chunk(ranks)[rank]
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append({n: p.full_tensor() for n, p in model.named_parameters()})
    return {"differ": [n for n, end in ends[0].items() if not torch.equal(end, ends[1][n])]}


def continue_from(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Load what 2 ranks have saved, on any number of them."""
    from transformers import DistributedConfig, MixtralForCausalLM

    settings = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="gating_dropout")
    stock = MixtralForCausalLM.from_pretrained(
        folder.parent / "saved" / "saved-mixtral", distributed_config=settings
    )
    ours = moduli.load(folder.parent / "saved" / "saved-llama")
    spread_experts(ours)
    mine = tokens().chunk(ranks)[rank]
    with torch.no_grad():
        tensors = {"mixtral": stock(input_ids=mine).logits, "llama": ours(input_ids=mine).logits}
    save_file(tensors, folder / f"{rank}.safetensors")
    return {}


def copies() -> Any:
    """Stochastic experts (THOR) that differ, in training mode."""
    model = families.build("llama")
    moduli.convert(model, moduli.THOR(num_experts=EXPERTS, layers="all"))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def steps_of_copies(
    model: nn.Module, ids: Tensor, ranks: int | None
) -> dict[str, dict[str, Tensor]]:
    """Gradients of a step by configuration, under data parallelism where ranks are real."""
    found = {}
    for name in ("exchange", "paper", "gate_expert_drop"):
        attached = gating_dropout(model, CONFIGS[name], ranks=ranks)
        attached.set_step(0)
        start_step(model, 0)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found[name] = {n.removeprefix("module."): g for n, g in gradients(model).items()}
        attached.remove()
    return found


def stochastic(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Copies that every rank holds: gradients, and what is said where they are sharded."""
    torch.manual_seed(rank)
    model = DistributedDataParallel(copies(), find_unused_parameters=True)
    found = steps_of_copies(model, tokens().chunk(ranks)[rank], None)
    save_file(
        {f"{name}.{key}": grad for name, grads in found.items() for key, grad in grads.items()},
        folder / f"{rank}.safetensors",
    )
    sharded = copies()
    attached = gating_dropout(sharded, CONFIGS["paper"])
    fully_shard(sharded)
    return {"sharded": error_of(lambda: attached.set_step(0))}


def mesh_of(ranks: int) -> tuple[Any, Any]:
    """Ranks that share experts, and ranks that share a batch, which is each by itself."""
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
    return mesh["ep"], mesh["tp"]


def error_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except moduli.ModuliError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def one_rank(rank: int, ranks: int, folder: Path, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )
    try:
        found = work(rank, ranks, folder, *arguments)
        (folder / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
        os._exit(0)  # at once: nothing is left to finish
    except Exception as error:
        (folder / f"{rank}.txt").write_text(
            f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}"
        )
        os._exit(1)


def start(folder: Path, ranks: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Fork ranks, and end when all have."""
    folder.mkdir()
    context = mp.start_processes(
        one_rank, args=(ranks, folder, work, arguments), nprocs=ranks, join=False,
        start_method="fork",
    )  # fmt: skip
    for process in context.processes:
        process.join(180)
        if process.is_alive():
            process.kill()


def main(folder: Path, ranks: int, full: bool) -> None:
    torch.set_num_threads(1)
    build("llama")  # what that imports is imported once, and not by every rank
    start(folder / "saved", ranks, compute, MODELS if full else FAST)
    start(folder / "agree", ranks, agree)
    start(folder / "copies", ranks, stochastic)
    start(folder / "resumed", ranks, resume)
    for where in ("forward", "backward", "late") if full else ("backward",):
        start(folder / where, ranks, die, where)
    if full:
        start(folder / "continued", 4 if ranks == 2 else 2, continue_from)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "--full" in sys.argv)
