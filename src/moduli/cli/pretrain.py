"""`moduli pretrain`: a small language model from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from moduli.cli.options import Data, parse
from moduli.training.architectures import Architecture, Size
from moduli.training.settings import FinetuneSettings

DEFAULTS = FinetuneSettings(
    max_steps=300, learning_rate=3e-3, batch_size=8, max_length=256, weight_decay=0.1, warmup=0.05
)


@dataclass(frozen=True, kw_only=True)
class Pretrain(Data):
    """Train a small language model from scratch on text, and test it on every domain.

    A ModuleFormer (experts of attention and feed-forward experts, chosen per token), or a dense
    model whose blocks have as many parameters as a token uses there. A tokenizer is learnt from
    the training texts. The result is an ordinary directory: after `import moduli` plain
    transformers loads it. The same command goes on from the last checkpoint after Ctrl-C.

    examples:
      moduli pretrain --out runs/mf
      moduli pretrain --out runs/news --train-domain news,editorial --max-steps 300
      moduli pretrain --out runs/dense --architecture dense
      moduli pretrain --out runs/wide --data jsonl:texts.jsonl --config n_embd=256 n_mlp_experts=32
    """

    data: str = "brown"
    """Texts: brown, or a file as csv:PATH, jsonl:PATH or parquet:PATH."""
    kind: str | None = "language-modeling"
    """Texts are learnt as they are; other kinds are for `moduli tune`."""
    out: Path
    """Directory of the result."""
    architecture: Architecture = "moduleformer"
    """moduleformer, or dense: a Llama of the same cost per token."""
    size: Size = "tiny"
    """Widths and numbers of layers and experts."""
    config: tuple[str, ...] = ()
    """Single fields of the model's configuration with other values, as NAME=VALUE."""
    vocab_size: int = 2048
    """Tokens of the tokenizer, at most."""
    train_domain: str | None = None
    """The domain to train on, or several with commas between them; the others are only tested on.
    Default: all."""
    settings: tyro.conf.OmitArgPrefixes[FinetuneSettings] = field(default_factory=lambda: DEFAULTS)
    seed: int = 0
    """Weights at the start, order of the data."""
    checkpoint_every: int | None = 100
    """Steps between checkpoints from which an interrupted run goes on."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("pretrain", Pretrain, argv)
    from moduli.cli.output import Output
    from moduli.cli.progress import StepProgress
    from moduli.data import load_task
    from moduli.study.pretraining import Listener, plan, pretrain
    from moduli.training.architectures import fresh_config

    output = Output(args.json)
    changes = _fields(args.config)
    fresh_config(args.architecture, args.size, changes)  # before the data, which takes longer
    task = load_task(args.data, on_event=output.note, **args.data_options())
    for note in task.notes:
        output.note(note)
    spec = plan(
        task,
        architecture=args.architecture,
        size=args.size,
        changes=changes,
        vocab_size=args.vocab_size,
        train_domains=tuple(args.train_domain.split(",")) if args.train_domain else (),
        settings=args.settings,
        seed=args.seed,
    )
    with StepProgress(output.log, "training") as progress:
        record = pretrain(
            spec,
            task,
            args.out,
            checkpoint_every=args.checkpoint_every,
            listener=Listener(progress.note, progress.show),
        )
    output.data({"directory": str(args.out), **record})
    output.text(*_tables(record), "", f"written to {args.out}")
    return 0


def _fields(words: Sequence[str]) -> dict[str, Any]:
    """Values by the names of fields; numbers, true, false and null are read as in JSON."""
    import json

    from moduli.errors import ConfigError

    found = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign:
            raise ConfigError(f"--config is {word!r}; write NAME=VALUE, such as n_embd=256.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _tables(record: dict[str, Any]) -> list[Any]:
    """Size, scores of every domain, and the load of the experts of every router."""
    from moduli.cli.output import table

    trained = record["spec"]["train_domains"]
    all_of_them = set(trained) == set(record["scores"])
    rows = [
        (
            name if all_of_them or name not in trained else f"{name} (trained on)",
            *(f"{score[key]:.3f}" for key in ("loss", "perplexity", "bits_per_byte")),
            str(score["n"]),
        )
        for name, score in record["scores"].items()
    ]
    parts: list[Any] = [
        f"{record['parameters']:,} parameters; a token uses {record['active_parameters']:,} of "
        "those in blocks",
        "",
        table(("tested on", "loss", "perplexity", "bits per byte", "tokens"), rows),
    ]
    if record["load"]:
        shares = [
            (
                name,
                str(len(load)),
                f"{max(load) * len(load):.2f}",
                f"{min(load) * len(load):.2f}",
                str(sum(share == 0 for share in load)),
            )
            for name, load in record["load"].items()
        ]
        columns = ("router", "experts", "most used", "least used", "never used")
        parts += ["", table(columns, shares), "most and least used: in units of an even share"]
    return parts
