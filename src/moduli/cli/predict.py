"""`moduli predict`: labels and probabilities for texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from moduli.cli.options import Common, parse


@dataclass(frozen=True, kw_only=True)
class Predict(Common):
    """Labels and probabilities for texts, one JSON object per line.

    --json prints one JSON document instead.

    examples:
      moduli predict --model runs/mine --text "a lovely film" "not for me"
      moduli predict --model runs/mine --data csv:unlabelled.csv > predictions.jsonl
    """

    model: str
    """Directory of the model, or a Hugging Face name."""
    text: tuple[str, ...] = ()
    """Texts."""
    data: str | None = None
    """Or a file with texts: csv:PATH, jsonl:PATH or parquet:PATH. It needs no labels."""
    text_column: str = "text"
    """The column with the texts."""
    dense: bool = False
    """Use the ordinary part, with plain transformers."""
    max_length: int | None = None
    """Longest text in tokens. Default: what the model was tuned with."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("predict", Predict, argv)
    import json

    from moduli.cli.output import Output
    from moduli.errors import ConfigError
    from moduli.study.tuned import label_texts, load_tuned, read_texts, trained_length

    output = Output(args.json)
    if bool(args.text) == bool(args.data):
        raise ConfigError("Give texts with --text, or a file with --data; one of the two.")
    texts = list(args.text) or read_texts(str(args.data), args.text_column)
    model, tokenizer = load_tuned(args.model, dense=args.dense)
    length = args.max_length or trained_length(args.model)
    predictions = label_texts(model, tokenizer, texts, max_length=length)
    output.data({"model": args.model, "predictions": predictions})
    if not args.json:
        for prediction in predictions:
            sys.stdout.write(json.dumps(prediction, ensure_ascii=False) + "\n")
    return 0
