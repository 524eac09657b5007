"""The bench of one layer: candidates that are right take turns; the row says what came out.

Letters: T tokens, D width, E experts, K experts per token, S = T K routed rows, e neurons of an
expert, b bytes of a number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moduli.bench.candidates import Candidate, candidates, chosen_kernel
from moduli.bench.cases import LayerCase
from moduli.bench.checking import (
    Results,
    deviation,
    evaluate,
    expected,
    right_enough,
    saved_bytes,
    train_step,
)
from moduli.bench.layers import Layer, build
from moduli.bench.machine import Machine
from moduli.bench.protocol import ROUNDS, Clock, measure
from moduli.bench.rows import Entry, LayerRow
from moduli.bench.settings import Settings, scope
from moduli.routing import RouteContext
from moduli.routing.learned import LinearRouter
from moduli.routing.rule import Rule

ROUTER = "router"


def measure_layer(
    case: LayerCase,
    machine: Machine,
    *,
    settings: Settings = "tuned",
    rounds: int = ROUNDS,
    clock: Clock | None = None,
    among: Sequence[Candidate] | None = None,
    seed: int = 0,
) -> LayerRow:
    """Measure all candidates of a case against each other, in this process.

    Args:
        case: the case; the process should have as many threads as it says.
        machine: of this process, for floors.
        settings: what everything runs under; `moduli.bench.settings.prepare` went before.
        rounds: rounds of the protocol.
        clock: what to time with; that of the device by default.
        among: who takes part; all by default.
        seed: of the numbers and of the order of candidates.

    Returns:
        The row, with a reason instead of a time for whoever is wrong or cannot do it.
    """
    device = torch.device(machine.device)
    clock = clock or Clock.of(device, case.threads)
    layers = build(case, device, seed)
    calls: dict[str, Callable[[], object]] = {}
    entries: dict[str, Entry] = {}
    with scope(settings, device):
        references = _References(layers)
        for candidate in candidates(case, device) if among is None else among:
            entry = _check(candidate, references)
            entries[candidate.name] = entry
            if entry.note is None:
                calls[candidate.name] = _run(candidate, layers)
        calls[ROUTER] = _router(layers)
        timings = measure(
            calls, clock, rounds=rounds, rng=random.Random(seed), per_call=len(layers)
        )
        choice = chosen_kernel(layers[0])
    router = timings.pop(ROUTER)
    return LayerRow(
        case=case,
        settings=settings,
        device=machine.device,
        entries=tuple(
            entry.timed(timings[name]) if name in timings else entry
            for name, entry in entries.items()
        ),
        choice=choice,
        router_ms=router.median,
        dense_share=case.top_k / layers[0].dense_experts,
        machine_floor_ms=machine_floor(case, machine),
        peak_gflops=machine.gemm[case.dtype],
    )


def machine_floor(case: LayerCase, machine: Machine) -> float:
    """Milliseconds that the arithmetic or the bytes take at the machine's measured rates.

    For one token, the time of reading the weights of its experts; else the larger of all
    products at GEMM rate and of tokens, output and weights at copy rate.
    """
    if case.decode:
        return 1000 * case.weight_bytes / (machine.read * 1e9)
    passes = 1 if case.mode == "forward" else 3
    moved = 2 * case.tokens * case.hidden * case.torch_dtype.itemsize + case.layer_bytes
    products = case.flops / (machine.gemm[case.dtype] * 1e9)
    return 1000 * max(products, passes * moved / (machine.copy * 1e9))


class _References:
    """What is right for the first and the last layer, computed once for all candidates."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list({id(layer): layer for layer in (layers[0], layers[-1])}.values())
        self.found: dict[bool, list[Results]] = {}

    def __call__(self, routed: bool) -> list[tuple[Layer, Results]]:
        if routed not in self.found:
            self.found[routed] = [
                expected(layer, layer.visits[-1], routed=routed) for layer in self.layers
            ]
        return list(zip(self.layers, self.found[routed], strict=True))


def _check(candidate: Candidate, references: _References) -> Entry:
    """An entry without a time; its note says why there will be none."""
    worst, saved = 0.0, None
    layer = references.layers[0]
    try:
        for one, reference in references(candidate.routed):
            found = deviation(evaluate(candidate, one, one.visits[-1]), reference)
            worst = found if not found <= worst else worst
        if layer.case.mode == "train":
            saved = saved_bytes(candidate, layer, layer.visits[0])
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return Entry(candidate.name, candidate.role, note=f"{type(error).__name__}: {reason}")
    right = right_enough(worst, layer.case)
    return Entry(
        candidate.name,
        candidate.role,
        error=worst,
        saved_bytes=saved,
        note=None if right else f"wrong: deviates from the reference by {worst:.1e}",
    )


def _run(candidate: Candidate, layers: Sequence[Layer]) -> Callable[[], None]:
    """All layers once; each time with the next input."""
    turn = 0

    def forward() -> None:
        nonlocal turn
        with torch.no_grad(), candidate.scope():
            for layer in layers:
                candidate.compute(layer, layer.visits[turn % len(layer.visits)])
        turn += 1

    def train() -> None:
        with candidate.scope():
            for layer in layers:
                train_step(candidate, layer, layer.visits[0])

    return forward if layers[0].case.mode == "forward" else train


def _router(layers: Sequence[Layer]) -> Callable[[], None]:
    """A linear gate with top-k and softmax, in front of every layer."""
    case = layers[0].case
    x = layers[0].visits[0].x
    rule = Rule(case.top_k, combine="softmax")
    gates = [LinearRouter(case.hidden, case.experts, rule).to(x.device, x.dtype) for _ in layers]
    context = RouteContext()

    def forward() -> None:
        with torch.no_grad():
            for gate in gates:
                gate(x, context)

    def train() -> None:
        leaf: Any = x.detach().requires_grad_()
        for gate in gates:
            gate.zero_grad()
            gate(leaf, context).weights.sum().backward()

    return forward if case.mode == "forward" else train
