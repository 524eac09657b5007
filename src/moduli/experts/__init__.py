"""What experts compute: groups of neurons of an FFN, and the kernels that run them."""

from moduli.experts.ffn import ExpertFFN, StackedFFN, gather_experts, members_of, scatter_experts
from moduli.experts.kernels import run_experts

__all__ = [
    "ExpertFFN",
    "StackedFFN",
    "gather_experts",
    "members_of",
    "run_experts",
    "scatter_experts",
]
