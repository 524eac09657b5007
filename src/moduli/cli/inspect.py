"""`moduli inspect`: what the experts of a model do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moduli.cli.options import Data, parse

if TYPE_CHECKING:
    from moduli.inspect.record import TokenTrace

LAYERS = 3
"""Layers whose tokens are shown in the terminal; the page shows all."""
COLOURS = ("red", "green", "yellow", "blue", "magenta", "cyan")


@dataclass(frozen=True, kw_only=True)
class Inspect(Data):
    """Which experts of a model do what, on the rows of a task.

    For modular models of moduli and for MoE models of transformers (Mixtral, OLMoE, Qwen-MoE and
    others). Padding is never counted. --html writes a page with all figures, --json prints the
    whole record.

    examples:
      moduli inspect --model runs/mine --data sentiment --html experts.html
      moduli inspect --model runs/mine --data csv:reviews.csv --text "a lovely film"
      moduli inspect --model ./olmoe --data csv:notes.csv --kind language-modeling --split all
    """

    model: str
    """Directory of the model, or a Hugging Face name."""
    split: Literal["train", "validation", "test", "all"] = "test"
    """Which part of each domain."""
    max_rows: int = 256
    """At most so many rows per domain."""
    max_length: int | None = None
    """Longest text in tokens. Default: what the model was tuned with, else what it was made for,
    1024 at most."""
    text: tuple[str, ...] = ()
    """Texts whose tokens are followed through the layers."""
    file: tuple[str, ...] = ()
    """Or image or wav files, for models of these."""
    html: Path | None = None
    """Write a page with all figures: one file, no scripts."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("inspect", Inspect, argv)
    from moduli.cli.output import Output, table
    from moduli.data import load_task
    from moduli.errors import ConfigError
    from moduli.inspect.inspecting import inspect_model
    from moduli.inspect.tables import LEGEND, domain_rows, overlap_rows, tokens_seen
    from moduli.inspect.watching import expert_layers
    from moduli.inspect.wording import headline
    from moduli.study import tuned
    from moduli.training.kinds.base import get_kind

    output = Output(args.json)
    if args.text and args.file:
        raise ConfigError("Give texts with --text or files with --file, not both.")
    options = args.data_options()
    known = tuned.model_kind(args.model)
    # A language model reads the texts of any named task; a file need not hold more than texts.
    as_it_is = known is not None and known.name == "language-modeling" and ":" not in args.data
    if "kind" not in options and known is not None and not as_it_is:
        options["kind"] = known.name
    model, _ = tuned.load_any(args.model)
    expert_layers(model)  # before data is read: a dense model cannot be inspected
    task = load_task(args.data, on_event=output.note, **options)
    for note in task.notes:
        output.note(note)
    kind = get_kind(task.kind)
    words = args.text or args.file
    processor = tuned.load_processor(args.model, kind)
    inspection = inspect_model(
        model,
        processor,
        task,
        split=args.split,
        max_rows=args.max_rows,
        max_length=args.max_length or tuned.text_length(args.model, model, processor),
        texts=tuned.given_inputs(words, kind, files=bool(args.file)) if words else (),
        title=f"{args.model} on {args.data}",
        on_domain=lambda name: output.note(f"running on {name}"),
    )
    if args.html is not None:
        from moduli.inspect.page import write_page

        write_page(inspection, args.html, command=("moduli", "inspect", *argv))
    output.data({"model": args.model, "split": args.split, "inspection": inspection.to_dict()})
    output.text(f"{tokens_seen(inspection)}\n", _table(table, inspection.table()), LEGEND)
    output.text("", *headline(inspection))
    if len(inspection.domains) > 1:
        output.text(
            "\nIn every domain, used more than elsewhere:",
            _table(table, domain_rows(inspection), 2),
        )
    if len(alike := overlap_rows(inspection)) > 1:
        output.text(
            "\nDo two layers sort tokens alike? (mutual information of first choices: 0 no, 1 just "
            "so)",
            _table(table, alike, 2),
        )
    for trace in inspection.tokens:
        output.text("", *_coloured(trace))
    if args.html is not None:
        output.text(f"\npage: {args.html}")
    return 0


def _table(table: Any, rows: Sequence[Sequence[str]], text: int = 1) -> Any:
    return table(rows[0], rows[1:], text=text)


def _coloured(trace: TokenTrace) -> list[Any]:
    """The tokens of a text, each with the number and in the colour of its first expert."""
    from rich.text import Text

    from moduli.inspect.text import layer_names, visible

    names = dict(zip(trace.experts, layer_names(list(trace.experts)), strict=True))
    last = len(names) - 1
    shown = sorted({last * i // (LAYERS - 1) for i in range(LAYERS)})
    lines = []
    for name in (list(names)[i] for i in shown):
        line = Text(f"{names[name]}:")
        for piece, experts in zip(trace.pieces, trace.experts[name], strict=True):
            number = f"{experts[0]}" if experts else "-"
            style = COLOURS[experts[0] % len(COLOURS)] if experts else "dim"
            line.append(" ").append(visible(piece.strip()), style=style)
            line.append(f":{number}", style="dim")
        lines.append(line)
    return lines
