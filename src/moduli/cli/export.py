"""`moduli export`: a modular model as a checkpoint of a stock mixture-of-experts class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moduli.cli.options import Common, parse


@dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Write a modular decoder as an ordinary Mixtral, Qwen2-MoE or Qwen3-MoE checkpoint.

    It works where the stock class computes the same: every FFN of a Llama, Mistral or Qwen was
    replaced by full copies behind a linear router. Otherwise it says what does not fit.

    examples:
      moduli export --model runs/upcycled --out runs/mixtral
    """

    model: str
    """Directory of a modular model."""
    out: Path
    """Directory to write."""
    target: str | None = None
    """model_type of the class, where there is a choice."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("export", Export, argv)
    import moduli
    from moduli.cli.output import Output
    from moduli.study.tuned import load_any
    from moduli.surgery.files import check_target

    output = Output(args.json)
    check_target(args.out)
    model, tokenizer = load_any(args.model)
    moduli.export(model, args.out, tokenizer, target=args.target)
    output.data({"directory": str(args.out)})
    output.text(f"written to {args.out}; plain transformers loads it")
    return 0
