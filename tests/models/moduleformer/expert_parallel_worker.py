"""One rank of a ModuleFormer whose feed-forward experts transformers spreads over all ranks."""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.distributed.expert_parallel import apply_expert_parallelism

from tests.models.moduleformer import small

EXPERTS = 6
CASES = (("all_reduce", "moduli"), ("all_reduce", "eager"), ("all_to_all", "moduli"))


def step(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Logits, and gradients of everything that this rank has."""
    ids = small.tokens()
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    found = {"logits": out.logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name] = grad.to_local() if isinstance(grad, DTensor) else grad.clone()
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for way, backend in CASES:
        # All ranks hold one batch: by all-reduce each computes its experts on it, by all-to-all
        # each has a slice of it.
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
        model = small.build(n_mlp_experts=EXPERTS)
        model.set_experts_implementation(backend)
        plan = model._expand_parallel_plan(model.ep_plan)
        apply_expert_parallelism(model, mesh, mesh, plan, way)
        found = {name: tensor.contiguous() for name, tensor in step(model).items()}
        save_file(found, folder / f"{way}.{backend}.{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    gc.collect()  # whatever holds on to the process group goes before it
    dist.destroy_process_group()
