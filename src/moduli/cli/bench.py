"""`moduli bench`: speed of layers and models against peers and floors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moduli.cli.options import Common, parse


@dataclass(frozen=True, kw_only=True)
class Bench(Common):
    """Measure layers, or a whole model, against the dense one and transformers' backends.

    All candidates run in one process on the same tensors, are checked against the reference
    first, and take turns in shuffled rounds. What is compared are ratios: to the floor (the chosen
    experts' share of the fastest dense layer) and to the best peer. "tuned" gives the dense layer
    and the peers our allocator and float32 settings too; "defaults" leaves everything as it is.

    Without a set, one layer is measured, of the shape that --tokens and others give.

    examples:
      moduli bench --quick
      moduli bench --set grid --only "T256 D384" --settings tuned
      moduli bench --set acceptance --out runs/bench
      moduli bench --tokens 4096 --hidden 768 --experts 64 --top-k 8 --mode train --details
      moduli bench --model minilm --task tune
      moduli bench --model smollm2 --task generate --threads 1 2
    """

    quick: bool = False
    """The set of three shapes that takes less than a minute; the same as --set quick."""
    set: Literal["quick", "acceptance", "grid", "families", "accelerator"] | None = None
    """A named set of layers: "acceptance" has targets, "grid" judges the automatic choice,
    "families" has the layers of known MoE checkpoints, "accelerator" is for GPUs."""
    only: str = ""
    """With --set: only layers that have this in their name, such as "T256 " or "bfloat16 train"."""
    tokens: tuple[int, ...] = (4096,)
    """One layer: tokens, or several numbers of them."""
    hidden: int = 384
    """One layer: its width."""
    experts: int = 16
    """Experts of the layer, or of the converted model."""
    top_k: int = 4
    """Experts per token, of the layer or the converted model."""
    width: int = 0
    """One layer: neurons of an expert; 0 divides 4 x hidden among the experts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and tokens, of the layer or the model."""
    mode: tuple[Literal["forward", "train"], ...] = ("forward",)
    """One layer: without gradients, or forward and backward."""
    gated: bool = False
    """One layer: SwiGLU instead of two matrices with GELU."""
    owned: bool = False
    """One layer: experts in stacked tensors of their own instead of views of a dense FFN."""
    router: Literal["balanced", "skewed"] = "balanced"
    """One layer: how tokens spread over experts."""
    model: str | None = None
    """A whole model instead of layers: a name that `moduli fetch` knows, or a directory."""
    task: Literal["tune", "generate"] = "tune"
    """With --model: tuning steps, or generation."""
    threads: tuple[int, ...] = (1,)
    """Threads; every number is measured in a process of its own. Sets bring their own."""
    settings: tuple[Literal["tuned", "defaults"], ...] = ()
    """What to measure under. Default: both; with the quick set "tuned" alone."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    rounds: int = 5
    """Rounds, at least; more where other processes disturb too many samples."""
    details: bool = False
    """Show every candidate of every layer."""
    out: Path | None = None
    """Directory for the record and the figure of what was measured."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("bench", Bench, argv)
    from moduli.bench.calls import Shape, ask, label, measure, typed
    from moduli.bench.figures import floor_plot
    from moduli.bench.records import write_record
    from moduli.bench.targets import met
    from moduli.bench.wording import (
        LEGEND,
        compiled,
        details,
        heading,
        machine_line,
        model_table,
        summary,
    )
    from moduli.cli.output import Output, table

    output = Output(args.json)
    shape = Shape(
        **{name: getattr(args, name) for name in Shape.__dataclass_fields__ if name != "spread"},
        spread=args.router,
    )
    chosen = "quick" if args.quick else args.set
    settings = args.settings or (("tuned",) if chosen == "quick" else ("tuned", "defaults"))
    jobs = ask(
        shape,
        chosen=chosen,
        only=args.only,
        model=args.model,
        task=args.task,
        settings=settings,
        device=args.device,
        rounds=args.rounds,
    )
    name = label(chosen, args.model, args.task, args.device)
    record = measure(
        jobs,
        name=name,
        command=typed(argv),
        on_row=lambda row: output.note(f"measured {row.case.label}, {row.settings}"),
    )
    output.data(record.to_dict())
    for part in record.parts:
        output.text(f"{part.machine['settings']}: {machine_line(part.machine)}", "")
        for row in part.layers if args.details else ():
            output.text(heading(row), table(*details(row)), "")
        if part.layers:
            output.text(table(*summary(part.layers), text=2), "")
        with_both = compiled(part.layers)
        if with_both[1]:
            output.text("time over floor:", table(*with_both), "")
        if part.models:
            output.text(table(*model_table(part.models), text=2), "")
    if record.layers:
        output.text(LEGEND)
        reached, of = met(record.layers)
        if of:
            output.text(f"targets met: {reached} of {of}")
    if args.out is not None:
        write_record(record, args.out / f"{name}.json")
        tuned = [row for row in record.layers if row.settings == settings[0]]
        if tuned:
            (args.out / f"{name}.svg").write_text(floor_plot(tuned), encoding="utf-8")
        output.note(f"written to {args.out}")
    return 0
