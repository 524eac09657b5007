"""Where the fast path beats masking: both on one layer, in one process, as ratios.

    python benchmarks/paths.py [--threads N]

For widths, numbers of experts and tokens it prints the time of the masked and of the fast path
relative to the dense layer (medians of interleaved rounds; forward, and forward + backward). The
thresholds in `moduli.surgery.fast` are read off this table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import moduli
from moduli.surgery.modular import routed_layers


def build(hidden: int, experts: int, top_k: int, path: str) -> torch.nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=hidden, num_hidden_layers=1, num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTModel(config)
    settings = moduli.EMoE(
        num_experts=experts, top_k=top_k, layers="all", split="random", path=path
    )
    moduli.convert(model, settings)
    return model


def timed(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def measure(hidden: int, experts: int, top_k: int, tokens: int, train: bool, rounds: int) -> str:
    calls: dict[str, Callable[[], object]] = {}
    for path in ("masked", "fast"):
        model = build(hidden, experts, top_k, path)
        layer = next(iter(routed_layers(model).values()))
        calls[path] = runner(layer.ffn.block, torch.randn(1, tokens, hidden), train)
    plain = build(hidden, experts, top_k, "masked")
    plain_block = next(iter(routed_layers(plain).values())).ffn.block
    moduli.merge(plain)
    calls["dense"] = runner(plain_block, torch.randn(1, tokens, hidden), train)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(timed(call))
    medians = {name: statistics.median(s) for name, s in samples.items()}
    ratio = {name: medians[name] / medians["dense"] for name in ("masked", "fast")}
    return f"{ratio['masked']:8.2f} {ratio['fast']:8.2f}"


def runner(block: torch.nn.Module, x: Tensor, train: bool) -> Callable[[], object]:
    if not train:
        return torch.no_grad()(lambda: block(x))

    def step() -> None:
        block.zero_grad()
        block(x.detach().requires_grad_()).sum().backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"time relative to the dense layer, {options.threads} thread(s), medians")
    print(
        f"{'D':>5} {'E':>4} {'k':>3} {'e':>5} {'T':>6}   forward: masked fast    train: masked fast"
    )
    for hidden in (384, 768):
        for experts, top_k in ((8, 2), (16, 4), (16, 8), (32, 8), (64, 16), (64, 32)):
            for tokens in (64, 256, 1024, 4096):
                cells = [
                    measure(hidden, experts, top_k, tokens, train, options.rounds)
                    for train in (False, True)
                ]
                size = 4 * hidden // experts
                print(
                    f"{hidden:>5} {experts:>4} {top_k:>3} {size:>5} {tokens:>6}  "
                    f"{cells[0]}  {cells[1]}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
