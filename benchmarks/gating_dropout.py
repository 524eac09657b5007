"""What gating dropout saves: a model of the step's time up to 1,024 ranks, and a measurement here.

    python -m benchmarks.gating_dropout             computes, measures, writes record and tables
    python -m benchmarks.gating_dropout --tables    writes the tables of the pages from the record
    python -m benchmarks.gating_dropout --check     exits 1 if they are not up to date

A place is `<!-- gating:NAME -->` ... `<!-- /gating -->`; NAME is scaling or measured, and with
` short` behind it scaling has fewer ranks and columns.

The model: every rank has as many tokens, whatever the number of ranks R (weak scaling). A mixture
layer exchanges rows four times in a step, two forth and two back, by pairwise messages, and before
them how many there are:

    a(R) = a_in (min(R, g) - 1) + a_out max(R - g, 0)
    t(R) = a(R) + m h ((min(R, g) - 1) / b_in + max(R - g, 0) / b_out) / R
    exchange = layers (4 t(R) + a(R))
    step(p) = compute + (1 - p) exchange
    step(p) = compute - p experts + (1 - p) exchange                 where experts are skipped too

with g ranks on a node, latency a and bandwidth b within a node and between nodes, m bytes of a rank
and h how much more than that the busiest rank gets. The simulation draws who is sent how much
(tokens choose among experts evenly and by themselves, which is the best case) and the decisions of
the product, and takes the mean over steps. Not in it: gradients, which are reduced with and without
dropout alike, overlap of messages with computing, and what dropping does to learning.
The assumptions are in the record, benchmarks/results/gating_dropout/record.json. The measurement is
of real gloo ranks on this machine, whose messages go through memory; ratios only.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

import moduli
from benchmarks.shared.tables import check_option, lines_of, write_places
from moduli.parallel import GatingDropout, expert_parallel_plan, gating_dropout

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "gating_dropout" / "record.json"
PAGES = ("README.md", "docs/methods/gating-dropout.md")
PLACE = re.compile(r"(<!-- gating:(\w+)( short)? -->\n).*?(<!-- /gating -->)", re.DOTALL)
COMMAND = "`python -m benchmarks.gating_dropout`"
ROUNDS = 16
RATES = (0.1, 0.2, 0.3, 0.5)
WORLDS = tuple(2**n for n in range(1, 11))
SHORT_WORLDS = (8, 32, 128, 1024)


@dataclass(frozen=True)
class Cluster:
    """Assumptions of the model; none is a measurement.

    Attributes:
        tokens, width, top_k, layers: per rank and step, of the model, and mixture layers.
        bytes_per_number: of what is sent.
        parameters: of a token's way through the model; a step computes 6 of them per token.
        expert_share: of the computing that experts do.
        flops: that a rank really does in a second.
        per_node: g.
        latency_in, latency_out: a, in seconds per message.
        bandwidth_in, bandwidth_out: b, in bytes per second and rank.
    """

    tokens: int = 4096
    width: int = 1024
    top_k: int = 1
    layers: int = 12
    bytes_per_number: int = 2
    parameters: float = 3.5e8
    expert_share: float = 0.3
    flops: float = 1e14
    per_node: int = 8
    latency_in: float = 2e-6
    latency_out: float = 6e-6
    bandwidth_in: float = 2e11
    bandwidth_out: float = 1.25e10

    @property
    def compute(self) -> float:
        """Seconds of computing in a step."""
        return 6 * self.parameters * self.tokens / self.flops

    def latency(self, ranks: int) -> float:
        """a(R), in seconds."""
        near, far = min(ranks, self.per_node) - 1, max(ranks - self.per_node, 0)
        return self.latency_in * near + self.latency_out * far

    def rows(self, ranks: int, heaviest: float = 1.0) -> float:
        """t(R), in seconds."""
        near, far = min(ranks, self.per_node) - 1, max(ranks - self.per_node, 0)
        sent = self.tokens * self.top_k * self.width * self.bytes_per_number * heaviest
        moved = near / self.bandwidth_in + far / self.bandwidth_out
        return self.latency(ranks) + sent * moved / ranks

    def exchange(self, ranks: int, heaviest: float = 1.0) -> float:
        """Seconds of all messages of a mixture layer in a step."""
        return 4 * self.rows(ranks, heaviest) + self.latency(ranks)

    def step(self, ranks: int, p: float, skip: bool = False) -> float:
        """Mean seconds of a step."""
        saved = p * self.expert_share * self.compute if skip else 0.0
        return self.compute - saved + (1 - p) * self.layers * self.exchange(ranks)


def simulated(cluster: Cluster, ranks: int, p: float, steps: int = 400) -> float:
    """Mean seconds of a step with the product's decisions and loads that are drawn."""
    config, generator = GatingDropout(p=p), np.random.default_rng(ranks)
    rows, total = cluster.tokens * cluster.top_k, 0.0
    for step in range(steps):
        total += cluster.compute
        if not config.decisions(step, 1)[0]:
            loads = generator.multinomial(rows * ranks, [1 / ranks] * ranks, size=cluster.layers)
            heaviest = loads.max(axis=1) / rows
            total += sum(cluster.exchange(ranks, float(h)) for h in heaviest)
    return total / steps


def scaling(cluster: Cluster) -> dict[str, Any]:
    """Of every number of ranks: the exchange's share, and times relative to never dropping."""
    rows = []
    for ranks in WORLDS:
        base = cluster.step(ranks, 0.0)
        rows.append(
            {
                "ranks": ranks,
                "share": 1 - cluster.compute / base,
                "gate_drop": {str(p): cluster.step(ranks, p) / base for p in RATES},
                "gate_expert_drop": {str(p): cluster.step(ranks, p, True) / base for p in RATES},
                "simulated": simulated(cluster, ranks, 0.3) / simulated(cluster, ranks, 0.0),
            }
        )
    return {"assumptions": asdict(cluster), "rows": rows}


# --- measurement ----------------------------------------------------------------------------------

ARMS = {
    "never": GatingDropout(p=0.0),
    "gate_drop": GatingDropout(p=1.0),
    "gate_expert_drop": GatingDropout(p=1.0, mode="gate_expert_drop"),
}
SHAPE = {"width": 256, "neurons": 512, "layers": 4, "experts": 8, "rows": 4, "length": 128}


def model_of_shape() -> Any:
    """A small Llama whose FFNs are all upcycled."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=SHAPE["width"], intermediate_size=SHAPE["neurons"],
        num_hidden_layers=SHAPE["layers"], num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    method = moduli.SparseUpcycling(num_experts=SHAPE["experts"], top_k=1, layers="all", aux="none")
    moduli.convert(model, method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:  # otherwise all tokens go to expert 0
                parameter.normal_()
    return model.train()


def rank_main(rank: int, ranks: int, folder: str, rounds: int) -> None:
    """Seconds of every step of every arm, in turns."""
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks
    )
    model = model_of_shape()
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
    plan = expert_parallel_plan(model)
    apply_expert_parallelism(model, mesh["ep"], mesh["tp"], plan, "gating_dropout")
    generator = torch.Generator().manual_seed(rank)
    size = (SHAPE["rows"], SHAPE["length"])
    ids = torch.randint(0, 512, size, generator=generator)
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for turn in range(rounds + 1):
        for name, config in ARMS.items():
            attached = gating_dropout(model, config)
            attached.set_step(0)
            model.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            dist.barrier()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
            attached.remove()
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(seconds), encoding="utf-8")
    dist.barrier()
    os._exit(0)


def measured(ranks: int, rounds: int) -> dict[str, Any]:
    """Times of a forward and backward pass relative to never dropping: median of the turns' ratios,
    and the quarter of them on either side."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            rank_main, args=(ranks, folder, rounds), nprocs=ranks, start_method="fork"
        )
        seconds = json.loads(Path(folder, f"{ranks}.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {"ranks": ranks, "rounds": rounds}
    for name in list(ARMS)[1:]:
        ratios = [t / base for t, base in zip(seconds[name], seconds["never"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {"median": middle, "quartiles": [low, high]}
    return found


# --- tables ---------------------------------------------------------------------------------------


def filled(text: str) -> str:
    """The page with every place filled anew."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))

    def content(place: re.Match[str]) -> str:
        made = (
            measured_table(record)
            if place[2] == "measured"
            else scaling_table(record, short=bool(place[3]))
        )
        return f"{place[1]}{made}{place[4]}"

    return PLACE.sub(content, text)


def scaling_table(record: dict[str, Any], *, short: bool = False) -> str:
    """Relative times by number of ranks, and what they rest on."""
    found = record["scaling"]
    rows = [["ranks", "share of the exchange", *(f"p = {p}" for p in RATES)]]
    if not short:
        rows[0] += ["p = 0.3, simulated", "p = 0.3, experts skipped"]
    for row in found["rows"]:
        if short and row["ranks"] not in SHORT_WORLDS:
            continue
        cells = [str(row["ranks"]), f"{100 * row['share']:.0f} %"]
        cells += [f"{row['gate_drop'][str(p)]:.2f}" for p in RATES]
        if not short:
            cells += [f"{row['simulated']:.2f}", f"{row['gate_expert_drop']['0.3']:.2f}"]
        rows.append(cells)
    said = ", ".join(f"{name} {value:g}" for name, value in found["assumptions"].items())
    said = "on the page of the method" if short else said
    note = f"A model, not a measurement. Assumptions: {said}. {COMMAND}"
    return "\n".join([*lines_of(rows), "", note, ""])


def measured_table(record: dict[str, Any]) -> str:
    """Relative times on real ranks of one machine."""
    rows = [["ranks", "Gate-Drop step", "Gate-Expert-Drop step"]]
    for row in record["measured"]:
        cells = [str(row["ranks"])]
        for name in ("gate_drop", "gate_expert_drop"):
            low, high = row[name]["quartiles"]
            cells.append(f"{row[name]['median']:.2f} ({low:.2f} to {high:.2f})")
        rows.append(cells)
    shape = ", ".join(f"{name} {value}" for name, value in record["shape"].items())
    rounds = record["measured"][0]["rounds"]
    note = (
        f"Forward and backward pass of a step that drops, over one that does not; median and "
        f"quartiles of {rounds} turns, gloo ranks of one thread on {record['cores']} cores of one "
        f"machine. {shape}. {COMMAND}"
    )
    return "\n".join([*lines_of(rows), "", note, ""])


def main() -> int:
    """Run the command."""
    parser = check_option(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not (options.tables or options.check):
        record = {
            "scaling": scaling(Cluster()),
            # Forked before anything here runs a backward pass.
            "measured": [measured(ranks, options.rounds) for ranks in (2, 4)],
            "shape": SHAPE,
            "cores": len(os.sched_getaffinity(0)),
        }
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    command = "python -m benchmarks.gating_dropout --tables"
    return write_places(PAGES, filled, check=options.check, command=command)


if __name__ == "__main__":
    sys.exit(main())
