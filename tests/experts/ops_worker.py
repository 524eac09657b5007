"""Compile layers of experts; run by `test_ops.py` in a process of its own, because the compiler
cannot trace the shape checks of the other tests.

Usage: ops_worker.py BACKEND KERNEL...
"""

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F

from tests.experts.random_layers import Case, Layer, assert_close, build

CASES = (
    Case(tokens=20, width=12, first_bias=True, out_bias=True, active=0.7),
    Case(tokens=20, width=12, form="apart", up_bias=True, layout="conv1d", x="transposed"),
    Case(tokens=20, width=12, form="concatenated", layout="owned", activation=F.silu),
    Case(tokens=20, width=12, form="interleaved", layout="sliced", x="sliced"),
    Case(tokens=20, width=12, sizes=(3, 8, 1), form="concatenated"),
)


def results(layer: Layer, kernel: str, backend: str | None) -> list[torch.Tensor]:
    """Output and gradients, and the output without a graph."""

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        return replace(layer, leaves=dict(zip(layer.leaves, leaves, strict=True))).run(kernel)

    run = call if backend is None else torch.compile(call, fullgraph=True, backend=backend)
    leaves = list(layer.leaves.values())
    y = run(*leaves)
    grads = torch.autograd.grad(y, leaves, layer.push())
    with torch.no_grad():
        bare = run(*leaves)
    return [y, bare, *grads]


def main(backend: str, kernels: list[str]) -> None:
    for kernel in kernels:
        for case in CASES:
            if kernel == "padded" and not case.equal:
                continue
            torch.compiler.reset()
            layer = build(case)
            found = results(layer, kernel, backend)
            expected = results(layer, "eager", None)
            names = ["y", "y without a graph", *layer.leaves]
            for name, a, b in zip(names, found, expected, strict=True):
                assert_close(a, b, 1e-5, f"{kernel}, {case}: {name}", 0.1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
