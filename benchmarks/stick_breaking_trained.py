"""What early exit of stick-breaking attention saves with logits that a model has learnt.

    moduli pretrain --out runs/mf --domains news fiction learned --max-steps 250 --batch-size 4
    python -m benchmarks.stick_breaking_trained --model runs/mf [--rounds N] [--out DIRECTORY]

The model reads 2048 tokens of held-out documents of the Brown corpus, one after the other, and the
operands of every layer's attention are kept. One thread, float32; "exit" stops at 1e-7.

    left    of the sticks after so many keys, the query's own among them: the mean over heads and
            queries that have so many, the largest, and the share of sticks with at most 1e-7
    read    logits that are formed with an exit, as a share of those without
    time    forward, and one query over a cache, as ratios to softmax attention

The record goes to DIRECTORY/trained.json.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import moduli  # noqa: F401 - registers the model
from benchmarks.stick_breaking import CPU, EXIT, RESULTS, opened, write
from moduli.bench.protocol import Clock, measure
from moduli.data import load_task
from moduli.experts.kernels.precision import fast_fp32
from moduli.models.moduleformer import attention
from moduli.models.stick_breaking import (
    stick_breaking_attention,
    stick_breaking_weights,
    tiles,
)

TIMES = (512, 1024, 2048)
DISTANCES = (1, 4, 16, 64, 256, 1024)
Operands = tuple[Tensor, Tensor, Tensor]


def tokens(directory: Path, count: int) -> Tensor:
    """Ids [1, count] of held-out documents of the domains that the model was trained on."""
    spec = json.loads((directory / "pretraining.json").read_text())["spec"]
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    task = load_task("brown", domains=tuple(spec["train_domains"]))
    texts = [row["text"] for splits in task.domains.values() for row in splits.test]
    ids = [i for text in texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    return torch.tensor([ids[:count]])


def learnt(directory: Path, ids: Tensor) -> list[Operands]:
    """Queries, keys and values of every layer."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
    found: list[Operands] = []

    def kept(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        found.append((query, key, value))
        return stick_breaking_attention(query, key, value, **options)

    with torch.no_grad(), mock.patch.object(attention, "stick_breaking_attention", kept):
        model(ids)
    return found


def left(query: Tensor, key: Tensor) -> list[dict[str, float]]:
    """What is left of the sticks by distance."""
    weights = stick_breaking_weights(query.double(), key.double())
    taken = weights.flip(-1).cumsum(-1).flip(-1)
    rows = []
    for keys in DISTANCES:
        rest = 1 - taken.diagonal(1 - keys, dim1=2, dim2=3)
        rows.append({
            "keys": keys, "mean": float(f"{float(rest.mean()):.2g}"),
            "largest": float(f"{float(rest.max()):.2g}"),
            "used up": round(float((rest <= EXIT).double().mean()), 3),
        })  # fmt: skip
    return rows


@contextmanager
def counted() -> Any:
    """Counts logits that are formed."""
    sizes: list[int] = []
    spend = tiles.spend

    def counting(logits: Tensor, rest: Tensor) -> None:
        sizes.append(logits.numel())
        spend(logits, rest)

    with mock.patch.object(tiles, "spend", counting):
        yield sizes


def read(operands: Operands) -> float:
    """Logits formed with an exit, as a share."""
    formed = []
    for early_exit in (None, EXIT):
        with counted() as sizes:
            stick_breaking_attention(*operands, early_exit=early_exit)
        formed.append(sum(sizes))
    return round(formed[1] / formed[0], 3)


def ratios(operands: Operands, causal: bool, rounds: int, rng: random.Random) -> dict[str, float]:
    """Times to that of softmax attention."""

    def softmax() -> Tensor:
        with fast_fp32():
            return F.scaled_dot_product_attention(*operands, is_causal=causal, enable_gqa=True)

    calls: dict[str, Callable[[], object]] = {
        "softmax": softmax,
        "exact": lambda: stick_breaking_attention(*operands),
        "exit": lambda: stick_breaking_attention(*operands, early_exit=EXIT),
    }
    found = measure(calls, Clock.of(CPU, 1), rounds=rounds, rng=rng)
    return {n: round(found[n].median / found["softmax"].median, 3) for n in ("exact", "exit")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="of moduli pretrain")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    record = opened(
        f"-m benchmarks.stick_breaking_trained --model runs/mf --rounds {options.rounds}"
    )
    run = json.loads((options.model / "pretraining.json").read_text())
    record["model"] = {
        "steps": run["steps"], "final_loss": run["final_loss"], "settings": run["spec"]["settings"],
    }  # fmt: skip
    record["layers"] = []
    layers = learnt(options.model, tokens(options.model, TIMES[-1]))
    with torch.no_grad():
        for number, (q, k, v) in enumerate(layers):
            row: dict[str, Any] = {"layer": number, "left": left(q, k), "forward": []}
            for times in TIMES:
                part: Any = tuple(t[:, :, :times].contiguous() for t in (q, k, v))
                found = {"read": read(part), **ratios(part, True, options.rounds, rng)}
                row["forward"].append({"times": times, **found})
            last: Any = (q[:, :, -1:].contiguous(), k.contiguous(), v.contiguous())
            row["decoding"] = ratios(last, False, options.rounds, rng)
            record["layers"].append(row)
            print(json.dumps(row), flush=True)
    write(record, options.out / "trained.json")


if __name__ == "__main__":
    main()
