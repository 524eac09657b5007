"""What stick-breaking attention costs on a CPU, relative to PyTorch's causal softmax attention.

    python benchmarks/stick_breaking.py [--rounds N] [--out DIRECTORY]
    python benchmarks/stick_breaking.py --decoding [--rounds N] [--out DIRECTORY]

12 heads of 64, float32, one thread, by the protocol of `moduli.bench.protocol` (CPU time,
candidates taking turns, medians). Queries and keys are random, with a given mean of the logits:
the higher it is, the sooner a stick is used up. Nothing may be left out in "exact", which stops
only where float32 has nothing left of any stick of a tile; "exit" stops at 1e-7.

    time     forward, and forward with backward, as ratios to `scaled_dot_product_attention`
    memory   the growth of the process, each call in a process of its own, after a small one;
             "published" forms all weights, with a product of [T, T] by a triangle
    error    of outputs and gradients against the same in float64, relative to the largest number

The record goes to DIRECTORY/cpu.json. With --decoding, to decoding.json: forward of one query over
a cache, as a ratio to softmax attention of the same cache: one sequence; four with padding on the
left, which both are told of; and one key of width 1024 that is its own value, for two queries, as
in the published MoLM models. `stick_breaking_trained.py` does the same with logits that a model
has learnt.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moduli.bench.machine import processor
from moduli.bench.protocol import Clock, measure
from moduli.experts.kernels.precision import fast_fp32, fp32_is_safe
from moduli.models.stick_breaking import native, stick_breaking_attention

HEADS, WIDTH, EXIT = 12, 64, 1e-7
TIMES = (512, 1024, 2048, 4096)
MEANS = (0.0, -2.0, -4.0, -6.0)
LEARNT = (0.0, -6.0)  # means at which gradients are timed: the first and the last
CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parent / "results/stick_breaking"
CACHES = (128, 256, 512, 1024, 2048, 4096)
# Batch, heads of queries and of keys, width; whether the left half is padding for every other row.
DECODED = {
    "one sequence": (1, 12, 12, 64, False),
    "four, padded": (4, 12, 12, 64, True),
    "MoLM": (1, 2, 1, 1024, False),
}
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def operands(times: int, mean: float, heads: int = HEADS) -> list[Tensor]:
    """Query, key, value and gradient of the outputs; logits have this mean and variance 1."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(1, heads, times, WIDTH, generator=generator) for _ in range(4)]
    found[0][..., 0] = mean * WIDTH**0.5
    found[1][..., 0] = 1
    return found


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with fast_fp32():  # as ours
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return stick_breaking_attention(query, key, value, backend="blocked")  # type: ignore[return-value]


def leaving(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return stick_breaking_attention(  # type: ignore[return-value]
        query, key, value, backend="blocked", early_exit=EXIT
    )


def published(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The formula as published code computes it: sums over keys by a product with a triangle."""
    ones = torch.ones(key.shape[2], key.shape[2])
    logits = query @ key.mT * WIDTH**-0.5
    seen = ones.tril().bool()
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    rest = F.logsigmoid(-logits).masked_fill(~seen, 0)
    weights = torch.sigmoid(logits) * (rest @ ones.tril(-1)).exp()
    return weights @ value


CALLS: dict[str, Call] = {
    "softmax": softmax, "exact": exact, "exit": leaving, "published": published,
}  # fmt: skip


def step(call: Call, tensors: list[Tensor], backward: bool) -> Callable[[], object]:
    *leaves, push = tensors
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return call(*leaves)

        return forward
    leaves = [t.requires_grad_() for t in leaves]
    return lambda: torch.autograd.grad(call(*leaves), leaves, push)


def timed(times: int, mean: float, rounds: int, rng: random.Random) -> dict[str, Any]:
    """Ratios at one length and mean."""
    row: dict[str, Any] = {"times": times, "mean": mean}
    for way in ("forward", "with backward") if mean in LEARNT else ("forward",):
        calls = {
            name: step(CALLS[name], operands(times, mean), way == "with backward")
            for name in ("softmax", "exact", "exit")
        }
        found = {
            n: t.median for n, t in measure(calls, Clock.of(CPU, 1), rounds=rounds, rng=rng).items()
        }
        row[way] = {n: round(found[n] / found["softmax"], 3) for n in ("exact", "exit")}
    return row


def decoded(
    what: str, keys: int, mean: float, dtype: torch.dtype, rounds: int, rng: random.Random
) -> dict[str, Any]:
    """Ratios of one query over a cache."""
    batch, heads, own, width, padded = DECODED[what]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, 1, width, generator=generator)
    key, value = (torch.randn(batch, own, keys, width, generator=generator) for _ in range(2))
    query[..., 0] = mean * width**0.5
    key[..., 0] = 1
    query, key, value = (t.to(dtype) for t in (query, key, value))
    value = key if heads > own else value
    mask = None
    if padded:
        mask = torch.ones(batch, keys, dtype=torch.bool)
        mask[::2, : keys // 2] = False

    def softmax() -> Tensor:
        seen = None if mask is None else mask[:, None, None]
        with fast_fp32():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, enable_gqa=heads > own
            )

    def stick(early_exit: float | None = None) -> object:
        return stick_breaking_attention(query, key, value, key_mask=mask, early_exit=early_exit)

    calls: dict[str, Callable[[], object]] = {
        "softmax": softmax, "exact": stick, "exit": lambda: stick(EXIT),
    }  # fmt: skip
    with torch.no_grad():
        found = {
            n: t.median for n, t in measure(calls, Clock.of(CPU, 1), rounds=rounds, rng=rng).items()
        }
    ratios = {n: round(found[n] / found["softmax"], 3) for n in ("exact", "exit")}
    return {"what": what, "keys": keys, "mean": mean, "dtype": str(dtype)[6:], **ratios}


def decoding(record: dict[str, Any], rounds: int, rng: random.Random) -> None:
    """Add the rows of --decoding."""
    record["decoding"] = []
    print(f"{'':14}{'':>10}{'keys':>6}{'mean':>6}{'exact':>9}{'exit':>9}   ratios to softmax")
    for what in DECODED:
        for dtype in (torch.float32, torch.bfloat16):
            for keys in CACHES:
                for mean in LEARNT:
                    row = decoded(what, keys, mean, dtype, rounds, rng)
                    record["decoding"].append(row)
                    print(
                        f"{what:14}{row['dtype']:>10}{keys:6}{mean:6}"
                        f"{row['exact']:9.2f}{row['exit']:9.2f}",
                        flush=True,
                    )


def grown(name: str, times: int, backward: bool) -> int:
    """MiB that the process has at most more, after one call, than after a small one."""
    command = [sys.executable, __file__, "--memory", name, str(times), str(int(backward))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def grow(name: str, times: int, backward: bool) -> int:
    step(CALLS[name], operands(128, 0.0), backward)()
    call = step(CALLS[name], operands(times, LEARNT[-1]), backward)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what there is now
    before = resident("VmRSS")
    call()
    return (resident("VmHWM") - before) // 1024


def resident(what: str) -> int:
    """KiB of this process in memory, as Linux counts them. (`ru_maxrss` would be the parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1])


def errors(times: int, mean: float) -> dict[str, float]:
    """Largest errors of outputs and gradients, of the largest number of each."""
    *leaves, push = operands(times, mean, heads=2)
    results = []
    for dtype in (torch.float64, torch.float32):
        own = [t.to(dtype).requires_grad_() for t in leaves]
        out = exact(*own)
        results.append([out.detach(), *torch.autograd.grad(out, own, push.to(dtype))])
    pairs = zip(("out", "dq", "dk", "dv"), *results, strict=True)
    return {n: float(f"{float((w - g).abs().max() / w.abs().max()):.2g}") for n, w, g in pairs}


def whole(record: dict[str, Any], rounds: int, rng: random.Random) -> None:
    """Add the rows of whole sequences."""
    record |= {"time": [], "memory": [], "error": []}
    print(f"{'':12}{'forward':>18}{'with backward':>18}   ratios to softmax")
    print(f"{'T':>6}{'mean':>6}{'exact':>9}{'exit':>9}{'exact':>9}{'exit':>9}")
    for times in TIMES:
        for mean in MEANS:
            row = timed(times, mean, rounds, rng)
            record["time"].append(row)
            cells = [
                row[way][n]
                for way in ("forward", "with backward")
                if way in row
                for n in ("exact", "exit")
            ]
            print(f"{times:6}{mean:6}" + "".join(f"{c:9.2f}" for c in cells), flush=True)
    for name, times, backward in (
        ("published", 2048, False), ("softmax", 4096, False), ("softmax", 4096, True),
        *(("exact", t, b) for t in (2048, 4096, 16384) for b in (False, True)),
    ):  # fmt: skip
        mib = grown(name, times, backward)
        row = {"what": name, "times": times, "with backward": backward, "MiB": mib}
        record["memory"].append(row)
        print(f"memory of {name}, T {times}{', with backward' * backward}: {mib} MiB", flush=True)
    for mean in MEANS:
        record["error"].append({"times": TIMES[-1], "mean": mean, **errors(TIMES[-1], mean)})
        print(f"errors at mean {mean}: {record['error'][-1]}", flush=True)


def opened(command: str) -> dict[str, Any]:
    """A record without rows."""
    step_in = "PyTorch" if native.library() is None else "C++"
    print(f"{processor(CPU)}, torch {torch.__version__}, 1 thread, tiles in {step_in}")
    return {
        "command": f"python {command}",
        "machine": {
            "processor": processor(CPU), "torch": torch.__version__, "threads": 1,
            "fast_fp32": fp32_is_safe(), "tiles": step_in, "load": os.getloadavg()[0],
        },
    }  # fmt: skip


def write(record: dict[str, Any], path: Path) -> None:
    """Keep a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--decoding", action="store_true", help="one query over a cache")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)  # of a process of its own
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        name, times, backward = options.memory
        print(grow(name, int(times), bool(int(backward))))
        return
    mode = "--decoding " if options.decoding else ""
    record = opened(f"benchmarks/stick_breaking.py {mode}--rounds {options.rounds}")
    (decoding if options.decoding else whole)(record, options.rounds, random.Random(0))
    write(record, options.out / ("decoding.json" if options.decoding else "cpu.json"))


if __name__ == "__main__":
    main()
