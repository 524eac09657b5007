"""`moduli merge`: modular to an ordinary dense checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moduli.cli.options import Common, parse


@dataclass(frozen=True, kw_only=True)
class Merge(Common):
    """Turn a modular model into an ordinary dense checkpoint.

    For experts that are groups of neurons the weights are only moved back to where they were. The
    merged model uses all experts for every token, so its outputs differ from the modular one's.

    examples:
      moduli merge --model runs/mine --out runs/mine-dense
    """

    model: str
    """Directory of a modular model."""
    out: Path
    """Directory to write."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("merge", Merge, argv)
    import moduli
    from moduli.cli.output import Output
    from moduli.study.tuned import load_any
    from moduli.surgery.files import check_target

    output = Output(args.json)
    check_target(args.out)
    model, tokenizer = load_any(args.model)
    report = moduli.merge(model)
    moduli.save(model, args.out, tokenizer)
    output.data({"directory": str(args.out), "report": report.to_dict()})
    output.text(str(report), f"written to {args.out}")
    return 0
