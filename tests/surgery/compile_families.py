"""Compile a converted model of each named family as one graph; run as a script by test_compile.

In a process of its own, because the compiler cannot trace the shape checks of the other tests.
"""

from __future__ import annotations

import sys

import torch

import moduli
from tests.tiny import batch, build, rows


def main(families: list[str]) -> None:
    for family in families:
        model = build(family)
        moduli.convert(model, moduli.EMoE(num_experts=6, top_k=2))
        example = batch(rows(family, 3))
        example.pop("labels")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        plain, fast = model(**example), compiled(**example)
        torch.testing.assert_close(fast.logits, plain.logits, rtol=1e-5, atol=1e-6)
        fast.logits.square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        plain.logits.square().mean().backward()
        expected = [p.grad for p in model.parameters() if p.grad is not None]
        for one, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    main(sys.argv[1:])
