"""Compile the grouped kernel; run by `test_grouped.py`.

Usage: grouped_worker.py BACKEND. In a process of its own, because the compiler cannot trace the
shape checks of the other tests.
"""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import run_experts
from moduli.routing import Routing

T, D, E, e, K = 24, 16, 5, 8, 2


def operands(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """x, index, weights, active, first, second, first_bias, up, out_bias."""
    torch.manual_seed(seed)
    index = torch.rand(T, E).topk(K).indices % (seed + 1)  # fewer experts for small seeds
    active = torch.rand(T, K) > 0.3
    shapes = ((T, D), (T, K), (E, e, D), (E, e, D), (E, e), (E, e, D), (E, D))
    x, weights, *rest = (torch.randn(s).to(dtype).requires_grad_() for s in shapes)
    return [x, index, weights, active, *rest]


def layer(x: Tensor, index: Tensor, weights: Tensor, active: Tensor, *tensors: Tensor) -> Any:
    first, second, first_bias, up, out_bias = tensors
    experts = StackedFFN(first, second, (e,) * E, first_bias, up=up, out_bias=out_bias)
    return run_experts(x, Routing(index, weights, active), experts, F.silu, "grouped")


def main(backend: str) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for seed in range(4):
        found = []
        for call in (compiled, layer):
            tensors = operands(seed, torch.bfloat16)
            y = call(*tensors)
            leaves = [t for t in tensors if t.requires_grad]
            found.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
        for a, b in zip(*found, strict=True):
            # Compilers keep float32 between operations that round to bfloat16 one by one.
            a, b = a.detach().float(), b.detach().float()
            gap = float((a - b).norm()) / (float(b.norm()) + 1e-9)
            assert gap < 1e-2, gap
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with pytest.raises(Exception, match="compiles grouped products in bfloat16 only"):
        compiled(*operands(0, torch.float32))


if __name__ == "__main__":
    main(sys.argv[1])
