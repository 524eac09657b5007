"""Linear maps as models hold them: `nn.Linear` [out, in], GPT-2's `Conv1D` [in, out], and others.

The only place that knows which dimension of a weight is which, what an adapter wraps, and how to
read the matrix of a projection that keeps it in a form of its own (quantised layers) or spread
over processes (FSDP2).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether the weight is stored [in, out]; by name, so that nothing has to be imported."""
    return _class_name(module) == "Conv1D"


def _class_name(module: nn.Module) -> str:
    """Name of the class, without what `fully_shard` puts before it."""
    return type(module).__name__.removeprefix("FSDP")


def is_stock(module: nn.Module) -> bool:
    """Whether the module is exactly `nn.Linear` or `Conv1D` with a plain 2-D weight."""
    if not (type(module) is nn.Linear or type(module).__name__ == "Conv1D"):
        return False
    weight = module.weight
    return isinstance(weight, Tensor) and _is_plain(weight)


def is_matrix(module: nn.Module) -> bool:
    """Whether the weight is the matrix itself: a stock module's, be it whole or sharded."""
    if is_stock(module):
        return True
    weight = getattr(module, "weight", None)
    stock = _class_name(module) == "Linear" or is_conv1d(module)
    return stock and isinstance(weight, Tensor) and (is_sharded(weight) or _is_plain(weight))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (nn.Parameter, Tensor) and tensor.dim() == 2


def is_sharded(tensor: Tensor) -> bool:
    """Whether processes hold the tensor together, each a part of it (a `DTensor`)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor; gathered if it is sharded, for which every process must call this."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    full: Tensor = sharded.full_tensor()
    return full


def placed_like(full: Tensor, tensor: Tensor) -> Tensor:
    """`full` in the form of `tensor`: this process's part of it where that one is sharded."""
    if not is_sharded(tensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    return distribute_tensor(full, sharded.device_mesh, sharded.placements, src_data_rank=None)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear map of any make: stock, quantised, sharded."""
    if is_conv1d(module):
        return True
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes)


def base_of(module: nn.Module) -> nn.Module:
    """The layer inside a tuner's wrapper (PEFT calls it `base_layer`)."""
    copies = full_copies(module)
    if copies:
        active = getattr(module, "active_adapters", ())
        chosen = [copies[f"modules_to_save.{name}"] for name in active]
        return chosen[0] if chosen else copies["original_module"]
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def full_copies(module: nn.Module) -> dict[str, nn.Module]:
    """The layers in PEFT's `modules_to_save` wrapper, by name within it; empty for others, such
    as a wrapper of a whole head or router, whatever layers that has inside."""
    if type(module).__name__ != "ModulesToSaveWrapper":
        return {}
    return {
        name: inner
        for name, inner in module.named_modules()
        if re.fullmatch(r"original_module|modules_to_save\.[^.]+", name) and is_matrix(inner)
    }


def out_dim(module: nn.Module) -> int:
    """Dimension of `module.weight` that runs over outputs."""
    return 1 if is_conv1d(module) else 0


def in_dim(module: nn.Module) -> int:
    """Dimension of `module.weight` that runs over inputs."""
    return 1 - out_dim(module)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a projection, wrapped or not."""
    base = base_of(module)
    if is_conv1d(base):
        inputs, outputs = weight_of(base).shape
        return outputs, inputs
    return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]


def weight_of(module: nn.Module) -> Tensor:
    """The weight tensor; fails where it is not one (a quantiser's own object)."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__}.weight is a {type(weight).__name__}")
    return weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias, or None; quantised layers may have a method that returns it."""
    bias = getattr(module, "bias", None)
    if callable(bias) and not isinstance(bias, Tensor):
        bias = bias()
    return bias if isinstance(bias, Tensor) else None


def rows(module: nn.Module) -> Float[Tensor, "out in"]:
    """The weight as [out, in]; a view."""
    weight = weight_of(module)
    return weight.T if is_conv1d(module) else weight


def weight_rows(module: nn.Module) -> Float[Tensor, "out in"]:
    """The matrix of a projection [out, in]: a view of a plain weight, else what it computes.

    A sharded weight is gathered, for which every process must call this. A quantised layer is
    asked for its outputs on the unit vectors, so that the result is the matrix that it really
    applies, whatever its storage; hooks of the layer do not see that.
    """
    base = base_of(module)
    if is_matrix(base):
        return whole(rows(base))
    floats = [t for t in (*base.parameters(), *base.buffers()) if t.is_floating_point()]
    device = floats[0].device if floats else torch.device("cpu")
    dtype = floats[0].dtype if floats else torch.float32
    with torch.no_grad():
        bias = bias_of(base)
        columns: Tensor = base.forward(torch.eye(shape_of(base)[1], dtype=dtype, device=device))
        return (columns if bias is None else columns - bias).T
