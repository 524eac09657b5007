"""What routers cost: ours against what a user would write, relative to the dense layer.

    python benchmarks/routers.py [--rounds N] [--out DIRECTORY]

Forward in float32 on one thread, by the protocol of `moduli.bench.protocol`. Routers run as they
are; the dense layer, at its best (with fast float32 products where the probe allows them). For
each shape:

    choice   top-k alone: `torch.topk`, and ours
    learned  a linear gate with softmax: as transformers' Mixtral and OLMoE write it, and ours
    avg-k    the derived gate of EMoE: mean keys and `torch.topk` at every call, and ours, which
             keeps the gate for as long as the keys do not change

Times are relative to the dense FFN (D, 4D, D); "share" is that of our avg-k router in a layer of
router and experts. The record goes to DIRECTORY/routers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moduli.bench.machine import processor
from moduli.bench.protocol import Clock, measure
from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import run_experts
from moduli.experts.kernels.precision import fast_fp32, fp32_is_safe
from moduli.routing import AvgKRouter, LinearRouter, RouteContext, Rule, gate_from_keys
from moduli.routing.topk import best

SHAPES = [
    (tokens, hidden, experts, top_k)
    for tokens in (1, 256, 4096)
    for hidden, experts, top_k in (
        (384, 16, 4),
        (384, 64, 8),
        (576, 16, 4),
        (768, 16, 4),
        (768, 64, 8),
    )
]
PAIRS = (("topk", "best"), ("softmax_topk", "learned"), ("means_topk", "avgk"))
CPU = torch.device("cpu")


def candidates(
    tokens: int, hidden: int, experts: int, top_k: int
) -> dict[str, Callable[[], object]]:
    """Calls by name; those of a pair are checked to choose the same experts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator)
    first, second = (
        torch.randn(4 * hidden, hidden, generator=generator) / hidden**0.5 for _ in range(2)
    )
    sizes = (4 * hidden // experts,) * experts
    linear = LinearRouter(hidden, experts, Rule(top_k, combine="softmax")).eval()
    avgk = AvgKRouter(lambda: first, sizes, Rule(top_k)).eval()
    context = RouteContext()
    weight = linear.gate.weight
    scores = linear.scores(x).detach()
    stacked = StackedFFN(
        first.view(experts, -1, hidden), second.view(experts, -1, hidden), sizes=sizes
    )
    routing = avgk(x, context)

    def softmax_topk() -> tuple[Tensor, Tensor]:
        probs = F.softmax(F.linear(x, weight), dim=-1, dtype=torch.float)
        weights, chosen = torch.topk(probs, top_k, dim=-1)
        return chosen, weights / weights.sum(dim=-1, keepdim=True)

    def means_topk() -> tuple[Tensor, Tensor]:
        chosen = (x @ gate_from_keys(first, sizes).T).topk(top_k).indices
        return chosen, torch.ones(chosen.shape)

    def ours(router: LinearRouter | AvgKRouter) -> tuple[Tensor, Tensor]:
        found = router(x, context)
        return found.experts, found.weights

    chosen = {
        "topk": lambda: (scores.topk(top_k).indices, x),
        "best": lambda: (best(scores, top_k), x),
        "softmax_topk": softmax_topk,
        "learned": lambda: ours(linear),
        "means_topk": means_topk,
        "avgk": lambda: ours(avgk),
    }
    for theirs, own in PAIRS:
        (a, weights), (b, own_weights) = chosen[theirs](), chosen[own]()
        if not torch.equal(a.sort().values, b.sort().values):
            raise SystemExit(f"{own} does not choose what {theirs} chooses")
        torch.testing.assert_close(weights, own_weights, rtol=1e-4, atol=1e-6)

    def dense() -> Tensor:
        with fast_fp32():
            return F.gelu(x @ first.T) @ second

    return chosen | {
        "dense": dense,
        "experts": lambda: run_experts(x, routing, stacked, F.gelu),
    }


def row(shape: tuple[int, int, int, int], rounds: int, rng: random.Random) -> dict[str, Any]:
    """The medians of one shape in milliseconds."""
    with torch.no_grad():
        found = measure(candidates(*shape), Clock.of(CPU, 1), rounds=rounds, rng=rng)
    names = ("tokens", "hidden", "experts", "top_k")
    return {
        **dict(zip(names, shape, strict=True)),
        "ms": {name: timing.median for name, timing in found.items()},
    }


def line(entry: dict[str, Any]) -> str:
    """One row of the table."""
    ms = entry["ms"]
    cells = [f"{ms[name] / ms['dense']:9.3f}" for pair in PAIRS for name in pair]
    share = ms["avgk"] / (ms["avgk"] + ms["experts"])
    shape = "".join(f"{entry[name]:>6}" for name in ("tokens", "hidden", "experts", "top_k"))
    return f"{shape} {ms['dense']:9.3f} {''.join(cells)} {1000 * ms['avgk']:9.1f} {share:7.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    print(f"{processor(CPU)}, torch {torch.__version__}, 1 thread, float32, forward")
    print(f"{'':24} {'dense':>9} {'choice':>18}{'learned':>18}{'avg-k':>18} {'avg-k':>9}")
    print(
        f"{'T':>6}{'D':>6}{'E':>6}{'k':>6} {'ms':>9} {'torch     ours':>18}"
        f"{'torch     ours':>18}{'torch     ours':>18} {'us':>9} {'share':>7}"
    )
    rows = []
    for shape in SHAPES:
        rows.append(row(shape, options.rounds, rng))
        print(line(rows[-1]), flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        machine = {
            "processor": processor(CPU),
            "torch": torch.__version__,
            "threads": 1,
            "fast_fp32": fp32_is_safe(),
            "load": os.getloadavg()[0],
        }
        record = {"command": "python benchmarks/routers.py", "machine": machine, "rows": rows}
        (options.out / "routers.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
