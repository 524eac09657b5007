"""`moduli extend`: new experts beside old ones that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from moduli.cli.options import Data, parse
from moduli.training.settings import FinetuneSettings

DEFAULTS = FinetuneSettings(
    max_steps=300, learning_rate=1e-3, batch_size=8, max_length=256, weight_decay=0.1
)


@dataclass(frozen=True, kw_only=True)
class Extend(Data):
    """Add experts to every layer of a ModuleFormer, and train nothing but them.

    Old tensors stay as they are, bit for bit, which is checked in what is written. What can move
    is their share: new experts take probability from old ones. --leakage holds that low on the
    training rows of --replay-domain. The result is an ordinary checkpoint with more experts.

    Without --data nothing is trained. The same command goes on from the last checkpoint after
    Ctrl-C.

    examples:
      moduli extend --model runs/mf --out runs/mf-grown --attention 2 --feed-forward 4
      moduli extend --model runs/news --out runs/news-fiction --attention 2 --feed-forward 4 \\
        --data brown --domains news fiction --train-domain fiction --replay-domain news \\
        --leakage 1
    """

    # The other commands with data cannot do without it.
    data: str | None = None  # type: ignore[assignment]
    """The task to train on: brown; csv:PATH, jsonl:PATH, parquet:PATH; or a name that
    datasets.load_dataset knows. Default: nothing is trained."""
    model: str
    """Directory of a ModuleFormer, or a Hugging Face name."""
    out: Path
    """Directory to write."""
    attention: int = 0
    """New attention experts of every layer."""
    feed_forward: int = 0
    """New feed-forward experts of every layer."""
    start: Literal["fresh", "copy", "closed"] = "fresh"
    """fresh: drawn like those of a new model; copy: copies of the experts that are least probable
    on --replay-domain (without it, of the first ones); closed: fresh, with rows by which routers
    hardly ever choose them (not for "gmm" gates; needs --replay-domain to hold there)."""
    noise: float = 0.0
    """With --start copy: what is added to copies, in units of their standard deviation."""
    train_domain: str | None = None
    """The domain to train on, or several with commas between them. Default: the first one."""
    replay_domain: str | None = None
    """The old domain, on whose training rows the share of new experts is measured and held low."""
    leakage: float = 0.0
    """Weight of the mean share of probability that new experts take on the old domain."""
    rows: float = 0.0
    """Weight of the squares of the routers' new rows."""
    settings: tyro.conf.OmitArgPrefixes[FinetuneSettings] = field(default_factory=lambda: DEFAULTS)
    seed: int = 0
    """New experts, order of the data."""
    checkpoint_every: int | None = 100
    """Steps between checkpoints from which an interrupted run goes on."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("extend", Extend, argv)
    from moduli.cli.edited import score_changes
    from moduli.cli.output import Output
    from moduli.cli.progress import StepProgress
    from moduli.cli.tasks import load_task_for
    from moduli.study.editing import require_editable, require_new
    from moduli.study.extending import Extension, extend_directory

    output = Output(args.json)
    require_new(args.out)
    require_editable(args.model, "extend")  # before the data, which takes longer
    spec = Extension(
        attention=args.attention,
        feed_forward=args.feed_forward,
        start=args.start,
        noise=args.noise,
        train_domains=tuple(args.train_domain.split(",")) if args.train_domain else (),
        replay_domain=args.replay_domain,
        leakage=args.leakage,
        rows=args.rows,
        settings=args.settings,
        seed=args.seed,
    )
    task = load_task_for(args, args.model, output) if args.data is not None else None
    with StepProgress(output.log, "training new experts") as progress:
        record, report = extend_directory(
            args.model,
            args.out,
            spec,
            task,
            checkpoint_every=args.checkpoint_every,
            tell=progress.note,
            on_progress=progress.show,
        )
    output.data({"directory": str(args.out), **record})
    output.text(str(report))
    if task is not None:
        output.text("", score_changes(record, task.kind, record["train_domains"]))
    output.text(
        "",
        f"written to {args.out}; all {record['unchanged_tensors']} old tensors are in it bit for "
        "bit",
    )
    return 0
