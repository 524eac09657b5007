"""`moduli convert`: dense to modular, or a list of what would be converted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moduli.cli.options import Common, parse_with_method


@dataclass(frozen=True, kw_only=True)
class Convert(Common):
    """Turn a dense model into a modular one without training it, and say what that changed.

    The method comes last, with its own settings. The directory that is written loads with plain
    transformers as the dense model it was, and with moduli as the modular one.

    examples:
      moduli convert --model minilm --dry-run emoe --layers every:2
      moduli convert --model minilm --out runs/minilm-emoe emoe --num-experts 16 --top-k 4
    """

    model: str
    """A name that `moduli fetch` knows (minilm), a directory, or a Hugging Face name."""
    out: Path | None = None
    """Directory to write."""
    dry_run: bool = False
    """Write nothing; list which FFNs would be converted, and why the others would not."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args, method = parse_with_method("convert", Convert, argv)
    import moduli
    from moduli.cli.output import Output, table
    from moduli.errors import ConfigError
    from moduli.study.tuned import load_any, survey_layers
    from moduli.surgery.files import check_target

    output = Output(args.json)
    if not args.dry_run:
        if args.out is None:
            raise ConfigError("Say where to write with --out DIR, or only look with --dry-run.")
        check_target(args.out)
    model, tokenizer = load_any(args.model)
    blocks = survey_layers(model, method) if args.dry_run else []
    report = moduli.convert(model, method, progress=output.note)
    result = {"model": args.model, "report": None if report is None else report.to_dict()}
    if args.dry_run:
        output.data(result | {"blocks": blocks})
        rows = [
            (
                block["name"],
                str(block["neurons"] or ""),
                str(block["family"] or ""),
                "convert" if block["converted"] else f"leave: {block['reason']}",
            )
            for block in blocks
        ]
        output.text(table(("block", "neurons", "family", "what would happen"), rows, text=4), "")
        output.text(str(report or f"{method.name} converts nothing"))
        return 0
    assert args.out is not None
    saved = moduli.save(model, args.out, tokenizer)
    output.data(
        result | {"directory": str(args.out), "gap": saved.gap, "measured_on": saved.measured_on}
    )
    if report is not None:
        output.text(str(report))
    output.text(str(saved))
    return 0
