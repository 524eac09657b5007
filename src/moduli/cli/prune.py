"""`moduli prune`: experts that given data hardly uses are cut out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moduli.cli.options import Data, parse


@dataclass(frozen=True, kw_only=True)
class Prune(Data):
    """Cut out the experts of a ModuleFormer that a task uses least.

    The use is measured on the training rows of all domains of the task (--domains names them),
    and the model is tested on their test rows before and after. With the same number of experts
    in every layer, the result is an ordinary checkpoint of the published format.

    examples:
      moduli prune --model runs/mf --out runs/mf-half --data brown --domains news --keep 0.5
      moduli prune --model runs/mf --out runs/mf-small --data jsonl:notes.jsonl --keep 0.25 \\
        --by mass --per-layer
    """

    model: str
    """Directory of a ModuleFormer, or a Hugging Face name."""
    out: Path
    """Directory to write."""
    keep: float | None = None
    """Share of the experts that stays, or above 1 their number in a layer; for attention experts
    and for feed-forward experts."""
    threshold: float | None = None
    """Instead of --keep: experts stay whose frequency (or mass) is not below it; their number
    differs by layer."""
    by: Literal["frequency", "mass"] = "frequency"
    """Rank experts by how often they are chosen, or by the probability with which they are."""
    per_layer: bool = False
    """Rank the experts of all layers together, so that some layers keep more than others. moduli
    loads such a model, the published code cannot."""
    max_length: int | None = None
    """Longest text in tokens; longer ones are cut into pieces. Default: what the model was made
    for, 1024 at most."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("prune", Prune, argv)
    from moduli.cli.edited import score_changes
    from moduli.cli.output import Output
    from moduli.cli.progress import StepProgress
    from moduli.cli.tasks import load_task_for
    from moduli.study.editing import require_editable, require_new
    from moduli.study.pruning import prune_directory

    output = Output(args.json)
    require_new(args.out)
    require_editable(args.model, "prune")  # before the data, which takes longer
    task = load_task_for(args, args.model, output)
    with StepProgress(output.log, "measuring", unit="batch") as progress:
        record, report = prune_directory(
            args.model,
            args.out,
            task,
            keep=args.keep,
            by=args.by,
            per_layer=args.per_layer,
            threshold=args.threshold,
            max_length=args.max_length,
            tell=progress.note,
            on_batch=progress.count,
        )
    output.data({"directory": str(args.out), **record})
    output.text(str(report), "", score_changes(record, task.kind))
    output.text("", f"written to {args.out}")
    return 0
