"""Linear maps as transformers holds them: `nn.Linear` [out, in] and GPT-2's `Conv1D` [in, out].

The only place that knows which dimension of a weight is which.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether the weight is stored [in, out]; by name, so that nothing has to be imported."""
    return type(module).__name__ == "Conv1D"


def is_stock(module: nn.Module) -> bool:
    """Whether the module is exactly `nn.Linear` or `Conv1D` with a plain 2-D weight."""
    if not (type(module) is nn.Linear or is_conv1d(module)):
        return False
    weight = module.weight
    plain: tuple[type, ...] = (nn.Parameter, Tensor)
    return isinstance(weight, Tensor) and type(weight) in plain and weight.dim() == 2


def out_dim(module: nn.Module) -> int:
    """Dimension of `module.weight` that runs over outputs."""
    return 1 if is_conv1d(module) else 0


def in_dim(module: nn.Module) -> int:
    """Dimension of `module.weight` that runs over inputs."""
    return 1 - out_dim(module)


def weight_of(module: nn.Module) -> Tensor:
    """The weight tensor; fails where it is not one (a quantiser's own object)."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__}.weight is a {type(weight).__name__}")
    return weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias, or None."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def rows(module: nn.Module) -> Float[Tensor, "out in"]:
    """The weight as [out, in]; a view."""
    weight = weight_of(module)
    return weight.T if is_conv1d(module) else weight
