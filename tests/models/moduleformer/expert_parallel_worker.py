"""One rank of a ModuleFormer whose feed-forward experts transformers spreads over all ranks."""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import moduli  # noqa: F401 - makes the architecture known
from tests.models.moduleformer import small

BACKENDS = ("moduli", "eager", "grouped_mm")


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
    ranks = dist.get_world_size()
    for backend in BACKENDS:
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model",
            distributed_config=DistributedConfig(tp_size=ranks, ep_size=ranks),
            experts_implementation=backend,
        )
        found = {name: tensor.contiguous() for name, tensor in step(model).items()}
        save_file(found, folder / f"{backend}.{dist.get_rank()}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    gc.collect()  # whatever holds on to the process group goes before it
    dist.destroy_process_group()
