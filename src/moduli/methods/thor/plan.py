"""The routing plan: which expert every layer computes with in every pass of one training step.

A plan is a function of (seed, step, micro-step, pass) alone: a new generator is seeded by them each
time. So every process of a data-parallel run draws the same, a resumed run draws what it would
have drawn, and nothing else that is random moves.

Letters: K passes, L layers with experts, N experts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

Pair = Literal["independent", "distinct"]


@dataclass(frozen=True)
class RoutingPlan:
    """Experts of one training forward.

    Attributes:
        step: optimiser step, from 0.
        micro: forward within the step, from 0.
        experts: [K][L] the expert of each layer in each pass.
    """

    step: int
    micro: int
    experts: tuple[tuple[int, ...], ...]


def draw_plan(
    seed: int,
    step: int,
    micro: int,
    *,
    layers: int,
    num_experts: int,
    passes: int,
    pair: Pair = "independent",
) -> RoutingPlan:
    """Draw an expert for every layer and pass, uniformly.

    Args:
        seed: of the method.
        step: optimiser step.
        micro: forward within the step.
        layers: L.
        num_experts: N.
        passes: K.
        pair: "independent" draws with replacement, so that two passes may use the same expert in
            a layer; "distinct" draws among those that no earlier pass uses there (K <= N).
    """
    drawn: list[tuple[int, ...]] = []
    for number in range(passes):
        generator = seeded(seed, step, micro, number)
        one = []
        for layer in range(layers):
            used = {earlier[layer] for earlier in drawn} if pair == "distinct" else set()
            free = [e for e in range(num_experts) if e not in used]
            one.append(free[int(torch.randint(len(free), (), generator=generator))])
        drawn.append(tuple(one))
    return RoutingPlan(step, micro, tuple(drawn))


def seeded(*numbers: int) -> torch.Generator:
    """A generator on the CPU whose seed is a hash of the numbers."""
    return torch.Generator().manual_seed(hashed(repr(numbers).encode()))


def hashed(data: bytes) -> int:
    """A number in [0, 2^63) that depends on every byte."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
