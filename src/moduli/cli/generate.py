"""`moduli generate`: what a language model writes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import tyro

from moduli.cli.options import Common, parse
from moduli.study.writing import WritingSettings


@dataclass(frozen=True, kw_only=True)
class Generate(Common):
    """Write on from texts, by any language model: ours, stock, or one that moduli made modular.

    The text is shown while it is written. Models from text to text show what they make of each.
    --json prints tokens and their log-probabilities instead.

    examples:
      moduli generate --model runs/mf --text "The President said"
      moduli generate --model smollm2 --text "One day" "At night" --temperature 0
      moduli generate --model runs/mine --text "It was" --beams 4 --max-new-tokens 30 --json
    """

    model: str
    """Directory of the model, or a name that `moduli fetch` or the Hugging Face hub knows."""
    text: tuple[str, ...]
    """Texts to write on from."""
    settings: tyro.conf.OmitArgPrefixes[WritingSettings] = field(default_factory=WritingSettings)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("generate", Generate, argv)
    from dataclasses import asdict, replace

    from moduli.cli.output import Output
    from moduli.errors import ConfigError
    from moduli.study.writing import load_writer, write_on

    output = Output(args.json)
    if not all(args.text):
        raise ConfigError("A --text is empty; give at least a word to write on from.")
    model, tokenizer = load_writer(args.model)

    waiting = ""  # what stands before the next piece is shown with it

    def show(piece: str) -> None:
        nonlocal waiting
        if not args.json:
            sys.stdout.write(waiting + piece)
            sys.stdout.flush()
        waiting = ""

    found = []
    for number, text in enumerate(args.text):
        waiting += text + ("\n" if model.config.is_encoder_decoder else "")
        # seeds differ, or every text would be drawn with the same luck
        settings = replace(args.settings, seed=args.settings.seed + number)
        found.append(write_on(model, tokenizer, text, settings, on_text=show))
        waiting += "\n\n" if number + 1 < len(args.text) else "\n"
    show("")
    output.data({"model": args.model, "written": [asdict(one) for one in found]})
    return 0
