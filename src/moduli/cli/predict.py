"""`moduli predict`: what a model makes of new inputs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from moduli.cli.options import Common, parse


@dataclass(frozen=True, kw_only=True)
class Predict(Common):
    """What a tuned model makes of new inputs, one JSON object per line.

    Classifiers give labels and probabilities, regression a value, taggers a tag per word,
    language models the loss of the text, models from text to text what they write.
    --json prints one JSON document instead.

    examples:
      moduli predict --model runs/mine --text "a lovely film" "not for me"
      moduli predict --model runs/mine --data csv:unlabelled.csv > predictions.jsonl
      moduli predict --model runs/vit --file cat.png
    """

    model: str
    """Directory of the model, or a Hugging Face name."""
    text: tuple[str, ...] = ()
    """Texts."""
    file: tuple[str, ...] = ()
    """Or image or wav files, for models of these."""
    data: str | None = None
    """Or a table with inputs: csv:PATH, jsonl:PATH or parquet:PATH. It needs no labels."""
    text_column: str = "text"
    """The column with the texts."""
    text_pair_column: str | None = None
    """The column with the second texts, for models of pairs."""
    tokens_column: str = "tokens"
    """The column with the words of a sentence, for taggers."""
    source_column: str = "source"
    """The column with the texts to start from, for models from text to text."""
    image_column: str = "image"
    """The column with images."""
    audio_column: str = "audio"
    """The column with sounds."""
    dense: bool = False
    """Use the ordinary part, with plain transformers."""
    max_length: int | None = None
    """Longest text in tokens. Default: what the model was tuned with, else what it was made for,
    1024 at most."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("predict", Predict, argv)
    import dataclasses
    import json

    from moduli.cli.output import Output
    from moduli.data.task import DataOptions
    from moduli.errors import ConfigError
    from moduli.study import tuned
    from moduli.training.kinds.base import get_kind

    output = Output(args.json)
    if sum(map(bool, (args.text, args.file, args.data))) != 1:
        raise ConfigError(
            "Give texts with --text, files with --file, or a table with --data; one of the three."
        )
    kind = tuned.model_kind(args.model) or get_kind("classification")
    if args.data:
        names = {f.name for f in dataclasses.fields(args)}
        columns = {f.name for f in dataclasses.fields(DataOptions) if f.name in names}
        options = DataOptions(**{name: getattr(args, name) for name in columns})
        rows = tuned.read_inputs(args.data, kind, options)
    else:
        rows = tuned.given_inputs(args.text or args.file, kind, files=bool(args.file))
    model, processor = tuned.load_tuned(args.model, kind, dense=args.dense)
    length = args.max_length or tuned.text_length(args.model, model, processor)
    predictions = tuned.describe_rows(model, processor, kind, rows, max_length=length)
    output.data({"model": args.model, "predictions": predictions})
    if not args.json:
        for prediction in predictions:
            sys.stdout.write(json.dumps(prediction, ensure_ascii=False) + "\n")
    return 0
