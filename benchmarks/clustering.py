"""Balanced clustering against k-means-constrained, and its assignment step against scipy.

    python -m pip install k-means-constrained       # the peer; in an environment of its own if it
    python benchmarks/clustering.py                 # disturbs yours

Three tables, one thread, CPU time, medians over seeds with the tools taking turns:

- fit: layers of the real MiniLM into 8, 16 and 64 experts. `balanced_clusters` with its defaults
  against k-means-constrained as EMoE calls it (10 starts, at most 1000 iterations); and both with
  one start.
- assignment: the same values to the same sizes, by prices and by `linear_sum_assignment`. The
  values are those that a fit meets: centres of a random start, no prices to start from.
- large: 11008 x 4096 random keys into 64 experts; `--peer-large` lets k-means-constrained take two
  iterations of one start at it.

The record is written to benchmarks/results/clustering.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from moduli.data import fetch
from moduli.surgery.partition import balanced_clusters, random_labels, split_quality
from moduli.surgery.partition.lloyd import cluster_sums, exchange_values
from moduli.surgery.partition.prices import assign
from moduli.surgery.partition.quality import unit_keys

RECORD = Path(__file__).parent / "results" / "clustering.json"
Fit = Callable[[int], torch.Tensor]


def peer(keys: torch.Tensor, experts: int, starts: int, seed: int, steps: int = 1000) -> Any:
    """Labels of k-means-constrained, called as EMoE does."""
    from k_means_constrained import KMeansConstrained

    size = len(keys) // experts
    model = KMeansConstrained(
        n_clusters=experts, size_min=size, size_max=size, random_state=seed, n_init=starts,
        max_iter=steps, n_jobs=1,
    )  # fmt: skip
    return torch.from_numpy(model.fit(unit_keys(keys).numpy()).labels_.astype(np.int64))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def compare(keys: torch.Tensor, fits: dict[str, Fit], seeds: range) -> dict[str, Any]:
    """Median seconds and explained sums of squares of each fit, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in fits}
    explained: dict[str, list[float]] = {name: [] for name in fits}
    for seed in seeds:
        for name, fit in fits.items():
            spent, labels = timed(lambda fit=fit, seed=seed: fit(seed))
            seconds[name].append(spent)
            explained[name].append(split_quality(keys, labels).explained)
    return {
        name: {
            "seconds": round(statistics.median(seconds[name]), 4),
            "explained": round(statistics.median(explained[name]), 3),
            "explained_least": round(min(explained[name]), 3),
            "explained_most": round(max(explained[name]), 3),
        }
        for name in fits
    }


def fits_of(keys: torch.Tensor, experts: int) -> dict[str, Fit]:
    return {
        "moduli": lambda seed: balanced_clusters(keys, experts, seed=100 * seed),
        "k-means-constrained": lambda seed: peer(keys, experts, 10, seed),
        "moduli, 1 start": lambda seed: balanced_clusters(keys, experts, seed=seed, starts=1),
        "k-means-constrained, 1 start": lambda seed: peer(keys, experts, 1, seed),
    }


def assignment(keys: torch.Tensor, experts: int, seeds: range) -> dict[str, float]:
    """Median seconds of one assignment, and the largest relative gap between the two optima."""
    u = unit_keys(keys).numpy()
    everyone = np.arange(len(u))
    ours, theirs, gaps = [], [], []
    for seed in seeds:
        labels = random_labels(len(u), experts, seed).numpy()
        sizes = np.bincount(labels)
        sums = cluster_sums(u, labels, experts)
        square = np.einsum("fd,fd->f", u, u, dtype=np.float64)
        values = exchange_values(u, square, labels, sums, sizes)
        spent, (found, _) = timed(lambda v=values, s=sizes: assign(v, s))
        ours.append(spent)
        slots = np.repeat(values, sizes, axis=1)
        spent, (rows, columns) = timed(lambda v=slots: linear_sum_assignment(v, maximize=True))
        theirs.append(spent)
        best = slots[rows, columns].sum()
        gaps.append(abs(best - values[everyone, found].sum()) / abs(best))
    return {
        "prices": round(statistics.median(ours), 5),
        "linear_sum_assignment": round(statistics.median(theirs), 5),
        "gap": float(max(gaps)),
    }


def machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    wanted = ("torch", "numpy", "scipy", "k-means-constrained", "ortools")
    return {
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in wanted},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peer-large", action="store_true")
    options = parser.parse_args()
    try:
        import k_means_constrained  # noqa: F401
    except ImportError:
        parser.exit(1, "the peer is missing: python -m pip install k-means-constrained\n")
    torch.set_num_threads(1)
    from safetensors.torch import load_file

    weights = load_file(fetch("minilm") / "model.safetensors")
    seeds = range(options.seeds)
    record: dict[str, Any] = {"machine": machine(), "fit": [], "assignment": []}
    print("MiniLM: seconds and explained sum of squares, medians")
    for layer in options.layers:
        keys = weights[f"encoder.layer.{layer}.intermediate.dense.weight"]
        for experts in options.experts:
            row = compare(keys, fits_of(keys, experts), seeds)
            record["fit"].append({"layer": layer, "experts": experts, "results": row})
            for name, cell in row.items():
                print(
                    f"  layer {layer}, {experts:3} experts  {name:30}"
                    f"{cell['seconds']:8.3f} s  {cell['explained']:8.2f}",
                    flush=True,
                )
            step = assignment(keys, experts, seeds)
            record["assignment"].append({"layer": layer, "experts": experts, **step})
            print(f"  one assignment: {step}", flush=True)
    keys = torch.randn(11008, 4096, generator=torch.Generator().manual_seed(0))
    fits: dict[str, Fit] = {"moduli": lambda seed: balanced_clusters(keys, 64, seed=seed)}
    if options.peer_large:
        fits["k-means-constrained, 1 start, 2 iterations"] = lambda seed: peer(
            keys, 64, 1, seed, steps=2
        )
    record["large"] = compare(keys, fits, range(1))
    print(f"11008 x 4096 into 64: {record['large']}")
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
