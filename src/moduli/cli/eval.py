"""`moduli eval`: scores of a model on the domains of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moduli.cli.options import Data, parse


@dataclass(frozen=True, kw_only=True)
class Eval(Data):
    """Scores of a model on every domain of a task.

    A directory that moduli wrote is evaluated as the modular model it is; --dense evaluates its
    ordinary part with plain transformers instead, as somebody without moduli would. A language
    model reads the texts of any named task.

    examples:
      moduli eval --model runs/mine --data sentiment
      moduli eval --model runs/mf --data brown
      moduli eval --model runs/mine --data csv:elsewhere.csv --split all --dense
    """

    model: str
    """Directory of the model, or a Hugging Face name."""
    split: Literal["train", "validation", "test", "all"] = "test"
    """Which part of each domain; "all" rows for data that took no part in training."""
    dense: bool = False
    """Evaluate the ordinary part, with plain transformers."""
    max_length: int | None = None
    """Longest text in tokens. Default: what the model was tuned with, else what it was made for,
    1024 at most."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("eval", Eval, argv)
    from moduli.cli.output import Output
    from moduli.cli.tables import score_table
    from moduli.cli.tasks import load_task_for
    from moduli.study import tuned
    from moduli.training.kinds.base import get_kind

    output = Output(args.json)
    task = load_task_for(args, args.model, output)
    kind = get_kind(task.kind)
    model, processor = tuned.load_tuned(args.model, kind, dense=args.dense)
    scores = tuned.evaluate_task(
        model,
        processor,
        task,
        split=args.split,
        max_length=args.max_length or tuned.text_length(args.model, model, processor),
        on_domain=lambda name: output.note(f"testing on {name}"),
    )
    shown = {name: score.to_dict() for name, score in scores.items()}
    output.data(
        {
            "model": args.model,
            "split": args.split,
            "dense": args.dense,
            "metrics": kind.signatures(),
            "scores": shown,
        }
    )
    output.text(score_table(shown, (), kind))
    return 0
