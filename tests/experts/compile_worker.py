"""Compile MoE models of transformers and a bank with our kernels; run by `test_interface.py`.

Usage: compile_worker.py BACKEND CASE... In a process of its own, because the compiler cannot trace
the shape checks of the other tests.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from moduli.experts.bank import ExpertBank
from moduli.experts.ffn import ExpertFFN
from tests.experts import moe_families as families


def step(model: Any, call: Any) -> dict[str, Tensor]:
    """Logits, and the gradients of all parameters."""
    model.zero_grad()
    logits = call(**families.inputs(model), use_cache=False).logits
    logits.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def bank(backend: str) -> None:
    """The same for a bank of owned experts, which compiles with our kernels too."""
    ours = ExpertBank(ExpertFFN(torch.randn(4, 8, 16), torch.randn(4, 8, 16)), torch.nn.GELU())
    index, weights = torch.randint(4, (12, 2)), torch.rand(12, 2)
    found = []
    for call in (ours, torch.compile(ours, fullgraph=True, backend=backend)):
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = call(x, index, weights)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *ours.parameters()])])
    torch.testing.assert_close(found[1], found[0])


def main(backend: str, cases: list[str]) -> None:
    bank(backend)
    for case in cases:
        torch.compiler.reset()
        model = families.build(case)
        model.set_experts_implementation("eager")
        expected = step(model, model)
        model.set_experts_implementation("moduli")
        found = step(model, torch.compile(model, fullgraph=True, backend=backend))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            error = float((found[name] - tensor).norm() / tensor.norm())
            assert error < 1e-4, f"{case}, {name}: {error}"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
