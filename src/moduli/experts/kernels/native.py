"""The C++ kernel: to come."""

from torch import Tensor

from moduli.experts.ffn import StackedFFN


def refuses(x: Tensor, experts: StackedFFN) -> str | None:
    """Why it cannot compute these experts."""
    return "it is not built"
