"""`moduli tune`: one run, written as a model directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moduli.cli.options import Training, groups_of, parse_with_method


@dataclass(frozen=True, kw_only=True)
class Tune(Training):
    """Fine-tune a pretrained model by a method and test it in and out of domain.

    The method comes last, with its own settings: moduli tune [options] METHOD [settings].
    `moduli methods` lists them; `moduli tune emoe --help` shows the settings of one.

    The result is a directory with an ordinary checkpoint that plain transformers loads, plus
    moduli.json, with which moduli makes it modular again, and record.json, the run. The same
    command goes on from the last checkpoint after Ctrl-C or a crash.

    examples:
      moduli tune --model minilm --data sentiment --train-domain amazon emoe --num-experts 64
      moduli tune --model minilm --data csv:reviews.csv --domain-column source dense
      moduli tune --model ./my-bert --data jsonl:a.jsonl,test=b.jsonl --out runs/mine emoe
      moduli tune --model smollm2 --data csv:notes.csv --kind language-modeling emoe
      moduli tune --model translator:tiny --data debian-descriptions dense
    """

    out: Path | None = None
    """Directory of the result. Default: runs/ and the hash of all settings."""
    train_domain: str | None = None
    """The domain to train on, or several with commas between them; the others are only tested on.
    Default: the first one; of translations all languages."""
    seed: int = 0
    """New head, order of the data, dropout."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args, method = parse_with_method("tune", Tune, argv)
    from moduli.cli.live import StudyProgress
    from moduli.cli.output import Output
    from moduli.cli.tables import score_table
    from moduli.data import load_task
    from moduli.study.compare import Study
    from moduli.study.plan import Plan, TaskSpec, arm
    from moduli.study.run import execute
    from moduli.training.kinds.base import get_kind

    output = Output(args.json)
    task = load_task(args.data, on_event=output.note, **args.data_options())
    for note in task.notes:
        output.note(note)
    plan = Plan(
        model=args.model,
        tasks=(TaskSpec(args.data, args.data_options()),),
        sources=groups_of(() if args.train_domain is None else (args.train_domain,)),
        arms=(arm(method),),
        seeds=(args.seed,),
        settings=args.settings,
    )
    runs = tuple(plan.runs([task]))
    spec = runs[0].spec
    target = args.out or Path("runs") / spec.key
    with StudyProgress(output.log, Study(plan, runs, {}, ())) as progress:
        record = execute(
            spec,
            task,
            target,
            keep_model=True,
            checkpoint_every=args.checkpoint_every,
            on_event=progress.show,
        )
    output.data({"directory": str(target), **record.to_dict()})
    kind = get_kind(record.kind)
    output.text(score_table(record.scores, spec.train_domains, kind))
    for variant in record.variants.values():  # merged, where there are experts
        output.text("", "merged back to dense (what plain transformers loads):")
        output.text(score_table(variant.scores, spec.train_domains, kind))
        tested = sum(int(score["n"]) for score in record.scores.values())
        output.text(f"merging changed {sum(variant.changed.values())} of {tested} predictions")
    output.text("", f"written to {target}")
    return 0
