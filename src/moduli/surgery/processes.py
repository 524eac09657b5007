"""One checkpoint by several processes: models wrapped for data parallelism, weights in shards.

With `DistributedDataParallel` every process holds the whole model; with FSDP2 (`fully_shard`) each
holds a part of every tensor, and reading one whole is something that all processes do together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moduli.errors import CheckpointError
from moduli.surgery.projection import is_sharded, whole


def unwrapped(model: Any) -> Any:
    """The model that `DistributedDataParallel` or `torch.compile` wraps, or the model itself."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def is_shared(model: Any) -> bool:
    """Whether the processes of a group train this model together: wrapped in DDP, or sharded."""
    while not isinstance(model, nn.parallel.DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return isinstance(model, nn.Module) and any(map(is_sharded, model.parameters()))
        model = inner
    return True


def reshard(model: nn.Module) -> None:
    """Give up what FSDP2 has gathered for a pass, so that parameters are what is trained.

    The root keeps its weights gathered after a forward; a change of those would be lost.
    """
    for module in model.modules():
        if type(module).__name__.startswith("FSDP"):
            sharded: Any = module
            sharded.reshard()


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """The tensors, detached; sharded ones whole and on the CPU.

    Args:
        tensors: by name; the same object under two names stays one tensor.
        keep: False in a process that only takes part in gathering; the result is empty.
    """
    found: dict[str, Tensor] = {}
    full: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in full:
            one = whole(tensor.detach())
            full[id(tensor)] = one.cpu() if is_sharded(tensor) else one
            if not keep:
                full[id(tensor)] = one.new_empty(0)
        found[name] = full[id(tensor)]
    return found if keep else {}


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Within the block no parameter of the module is sharded; every process enters it."""
    held = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    for owner, name, parameter in held:
        owner._parameters[name] = nn.Parameter(whole(parameter.detach()), requires_grad=False)
    try:
        yield
    finally:
        for owner, name, parameter in held:
            owner._parameters[name] = parameter


def is_writer(together: bool) -> bool:
    """Whether this process writes: process 0 of a group that acts together, else any."""
    return not together or torch.distributed.get_rank() == 0


def write_once(write: Callable[[], None], together: bool) -> None:
    """Call `write`; if processes act `together`, in process 0, while the others wait for it.

    Raises:
        CheckpointError: writing failed in process 0, said in all of them.
    """
    if not together:
        write()
        return
    failure: list[str | None] = [None]
    error: Exception | None = None
    if is_writer(together):
        try:
            write()
        except Exception as caught:  # the others must hear of it, or they wait for ever
            error, failure = caught, [str(caught)]
    torch.distributed.broadcast_object_list(failure, src=0)
    if error is not None:
        raise error
    if failure[0] is not None:
        raise CheckpointError(f"process 0 could not write the checkpoint: {failure[0]}")
