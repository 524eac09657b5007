"""One rank of a run in which transformers spreads the experts of an upcycled model over all."""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.expert_parallel import apply_expert_parallelism

import moduli
from moduli.parallel import expert_parallel_plan
from tests import families, tiny
from tests.surgery.test_owned import scatter

FAMILIES = ("llama", "bert")
WAYS = ("all_reduce", "all_to_all")


def build(family: str) -> torch.nn.Module:
    model = families.build(family)
    moduli.convert(model, moduli.SparseUpcycling(num_experts=4, layers="all", aux="none"))
    torch.manual_seed(1)
    return scatter(model)


def step(model: torch.nn.Module, family: str) -> dict[str, torch.Tensor]:
    """Logits, and gradients of everything that is whole on this rank."""
    batch = tiny.batch(tiny.rows(family, 3))
    out = model(**batch)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "experts." not in n}
    return {"logits": out.logits.detach(), **{n: g for n, g in grads.items() if g is not None}}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for way in WAYS:
        for family in FAMILIES:
            # All ranks hold one batch: by all-reduce each computes its experts on it, by
            # all-to-all each has a slice of it.
            mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
            model = build(family)
            plan = expert_parallel_plan(model)
            apply_expert_parallelism(model, mesh, mesh, plan, way)
            found = step(model, family)
            save_file(
                {n: t.contiguous() for n, t in found.items()},
                folder / f"{way}.{family}.{rank}.safetensors",
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    gc.collect()  # whatever holds on to the process group goes before it
    dist.destroy_process_group()
