"""What has to be known about a GPU before kernels are chosen for it: one command, one record.

    python benchmarks/gpu.py [--parts PART ...] [--rounds N] [--out FILE]

Everything is in bfloat16, by the protocol of `moduli.bench.protocol`; layers are checked against
the reference first. Parts:

    layers     the shapes of `moduli bench --set accelerator`: the dense layer, our kernels that
               suit a GPU and transformers' "grouped_mm", also against the time of the arithmetic
    crossover  experts of 1024 to 16 neurons at the same work, k = E / 4: from which width on it
               pays to compute chosen experts alone instead of masking the dense layer
    routing    top-k, sort, the whole order of slots, spreading tokens and collecting rows
    launches   one layer at few tokens, called from Python and replayed as a CUDA graph
    stick      stick-breaking attention in Triton and in PyTorch's tiles against causal softmax
               attention, to T 8192, heads of 64, 128 and (MoLM) 1024

Whether kernels are right is for the tests to say: `pytest -m gpu tests`.

The record goes to benchmarks/results/gpu.json unless --out says otherwise. Without a CUDA device
there is nothing to measure: it says so and ends well.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from moduli.bench.candidates import candidates
from moduli.bench.cases import LayerCase, Mode, accelerator
from moduli.bench.layer import measure_layer
from moduli.bench.machine import Machine, inspect_machine
from moduli.bench.protocol import ROUNDS, Clock, Timing, measure
from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import KERNELS, Between, run_experts
from moduli.experts.kernels.order import order
from moduli.models.stick_breaking import stick_breaking_attention, triton
from moduli.routing import Routing

Call = Callable[[], object]
RESULTS = Path(__file__).resolve().parent / "results"
SUITABLE = ("masked", "grouped", "triton")
TAKE_PART = ("dense", *SUITABLE, "transformers grouped_mm")


def crossover() -> list[LayerCase]:
    """Experts of ever fewer neurons, cut from one FFN of 4 D neurons."""
    modes: tuple[Mode, ...] = ("forward", "train")
    return [
        LayerCase(
            tokens=8192, hidden=hidden, experts=4 * hidden // width, top_k=hidden // width,
            dtype="bfloat16", mode=mode,
        )
        for hidden in (1024, 2048)
        for width in (1024, 512, 256, 128, 64, 32, 16)
        if hidden // width <= 64
        for mode in modes
    ]  # fmt: skip


def layers(cases: Sequence[LayerCase], machine: Machine, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds by candidate, and what they come to."""
    device = torch.device(machine.device)
    found = []
    for case in cases:
        among = [c for c in candidates(case, device) if c.name in TAKE_PART]
        row = measure_layer(case, machine, settings="defaults", rounds=rounds, among=among)
        arithmetic = case.flops / (machine.gemm[case.dtype] * 1e6)  # ms
        entries = {
            entry.name: {
                "ms": entry.ms,
                "to arithmetic": None if entry.ms is None else entry.ms / arithmetic,
                "note": entry.note,
            }
            for entry in row.entries
        }
        found.append({"case": case.to_dict(), "arithmetic ms": arithmetic, "entries": entries})
        print(case.label, {n: e["ms"] or e["note"] for n, e in entries.items()}, flush=True)
    return found


def routing(
    shapes: Sequence[tuple[int, int, int, int]], device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """What stands between a router's scores and the products, for shapes T, D, E, K."""
    found = []
    for tokens, hidden, experts, top_k in shapes:
        scores = torch.rand(tokens, experts, device=device)
        x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
        chosen = scores.topk(top_k)
        record = Routing(chosen.indices, chosen.values)
        ids = chosen.indices.flatten().int()
        todo = order(record, experts)
        rows = todo.spread(x)
        calls: dict[str, Call] = {
            "top-k": lambda s=scores, k=top_k: s.topk(k),
            "sort": lambda i=ids: i.sort(stable=True),
            "order": lambda r=record, n=experts: order(r, n),
            "spread": lambda t=todo, y=x: t.spread(y),
            "collect": lambda t=todo, y=rows: t.collect(y),
        }
        shape = dict(zip(("tokens", "hidden", "experts", "top_k"), shapes[len(found)], strict=True))
        found.append({**shape, "ms": _milliseconds(calls, device, rounds)})
        print(found[-1], flush=True)
    return found


def launches(tokens: Sequence[int], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """One layer of 16 experts of 256 neurons, D 1024, k 4: called, and replayed where graphs are.

    The difference is what Python and the launches cost.
    """
    D, E, e, K = 1024, 16, 256, 4
    found = []
    for count in tokens:
        first, second = (
            torch.randn(E, e, D, device=device).to(torch.bfloat16) / D**0.5 for _ in range(2)
        )
        experts = StackedFFN(first, second, (e,) * E)
        x = torch.randn(count, D, device=device, dtype=torch.bfloat16)
        chosen = torch.rand(count, E, device=device).topk(K)
        record = Routing(chosen.indices, chosen.values.to(x.dtype))
        calls: dict[str, Call] = {}
        for kernel in SUITABLE:
            if KERNELS[kernel].refuses(x, experts, Between(F.gelu)) is None:

                def call(k: str = kernel, x: Any = x, r: Any = record, s: Any = experts) -> object:
                    return run_experts(x, r, s, F.gelu, k)

                calls[kernel] = call
                if device.type == "cuda":
                    calls[f"{kernel}, graph"] = _replayed(call)
        found.append({"tokens": count, "ms": _milliseconds(calls, device, rounds)})
        print(found[-1], flush=True)
    return found


def stick(
    shapes: Sequence[tuple[int, int, int, int]], device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """Stick-breaking attention of shapes T, heads of queries and of keys, width."""
    found = []
    for times, heads, own, width in shapes:
        query, push = (_normal(1, heads, times, width, device=device) for _ in range(2))
        key, value = (_normal(1, own, times, width, device=device) for _ in range(2))
        leaves = [t.requires_grad_() for t in (query, key, value)]
        of: dict[str, Callable[..., Any]] = {
            "softmax": partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True),
            "blocked": partial(stick_breaking_attention, backend="blocked"),
        }
        if triton.refuses(query, key, value) is None:
            of["triton"] = partial(stick_breaking_attention, backend="triton")
        calls: dict[str, Call] = {name: partial(call, *leaves) for name, call in of.items()}
        row: dict[str, Any] = {"times": times, "heads": heads, "own": own, "width": width}
        row["forward ms"] = _milliseconds(calls, device, rounds)

        def trained(call: Call, leaves: Any = leaves, push: Any = push) -> object:
            with torch.enable_grad():
                return torch.autograd.grad(call(), leaves, push)  # type: ignore[arg-type]

        steps: dict[str, Call] = {name: partial(trained, call) for name, call in calls.items()}
        row["with backward ms"] = _milliseconds(steps, device, rounds)
        found.append(row)
        print(row, flush=True)
    return found


def _normal(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(torch.bfloat16)


def _replayed(call: Call) -> Call:
    """A call captured in a CUDA graph, after it has run once beside the current stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _milliseconds(calls: dict[str, Call], device: torch.device, rounds: int) -> dict[str, float]:
    with torch.no_grad():
        clock = Clock.of(device, torch.get_num_threads())
        found: dict[str, Timing] = measure(calls, clock, rounds=rounds, rng=random.Random(0))
    return {name: timing.median for name, timing in found.items()}


ROUTED = [(t, 2048, e, k) for t in (256, 8192, 32768) for e, k in ((16, 4), (64, 8), (128, 8))]
STUCK = [
    (times, *heads)
    for times in (512, 2048, 8192)
    for heads in ((12, 12, 64), (16, 16, 128), (2, 1, 1024))
]
PARTS: dict[str, Callable[[Machine, int], list[dict[str, Any]]]] = {
    "layers": lambda machine, rounds: layers(accelerator(), machine, rounds),
    "crossover": lambda machine, rounds: layers(crossover(), machine, rounds),
    "routing": lambda machine, rounds: routing(ROUTED, torch.device(machine.device), rounds),
    "launches": lambda machine, rounds: launches(
        (1, 16, 256, 2048), torch.device(machine.device), rounds
    ),
    "stick": lambda machine, rounds: stick(STUCK, torch.device(machine.device), rounds),
}


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(argv)
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device here: nothing was measured")
        return
    machine = inspect_machine("defaults", torch.device("cuda"))
    record = {"command": "python benchmarks/gpu.py", "machine": machine.to_dict()}
    for part in asked.parts:  # written after each, so that a part that fails costs only itself
        record[part] = PARTS[part](machine, asked.rounds)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(asked.out)


if __name__ == "__main__":
    main()
