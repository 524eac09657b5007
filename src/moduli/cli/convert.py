"""`moduli convert`: dense to modular, or a list of what would be converted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moduli.cli.options import Data, parse_with_method
from moduli.data.task import Task


@dataclass(frozen=True, kw_only=True)
class Convert(Data):
    """Turn a dense model into a modular one without training it, and say what that changed.

    The method comes last, with its own settings. The directory that is written loads with plain
    transformers as the dense model it was, and with moduli as the modular one.

    With --data, output errors are measured on training rows of a task instead of random inputs.
    Methods that look at data (--split coactivation of emoe and moefication, --select mlp of
    moefication, --split importance of llama-moe) are shown these rows, and need them.

    examples:
      moduli convert --model minilm --dry-run emoe --layers every:2
      moduli convert --model minilm --out runs/minilm-emoe emoe --num-experts 16 --top-k 4
      moduli convert --model smollm2 --data csv:notes.csv --examples 256 --out runs/smollm2-moe \\
        llama-moe --split importance
    """

    # The other commands with data cannot do without it.
    data: str | None = None  # type: ignore[assignment]
    """The task to take rows of: sentiment, emoji, brown or brown-pos; csv:PATH, jsonl:PATH,
    parquet:PATH; or a name that datasets.load_dataset knows. Default: random inputs."""
    domain: str | None = None
    """With --data: the domain to take training rows of. Default: the first one."""
    examples: int = 64
    """With --data: at most so many rows."""
    max_length: int | None = None
    """With --data: longest text in tokens. Default: what the model was tuned with."""
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
    from moduli.study.sample import own_padding, task_batches
    from moduli.study.tuned import load_any, survey_layers
    from moduli.surgery.files import check_target

    output = Output(args.json)
    if args.examples < 1:
        raise ConfigError(f"--examples is {args.examples}; at least 1 row is needed.")
    if args.domain is not None and args.data is None:
        raise ConfigError("--domain is one of a task; name the task with --data as well.")
    if not args.dry_run:
        if args.out is None:
            raise ConfigError("Say where to write with --out DIR, or only look with --dry-run.")
        check_target(args.out)
    task = _task(args, output.note)
    model, tokenizer = load_any(args.model)
    blocks = survey_layers(model, method) if args.dry_run else []
    with own_padding(model):
        batches = None
        if task is not None:
            batches = task_batches(
                method,
                model,
                args.model,
                task,
                domain=args.domain,
                count=args.examples,
                max_length=args.max_length,
                on_event=output.note,
            )
        report = moduli.convert(model, method, batch=batches, progress=output.note)
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
    saved = moduli.save(model, args.out, tokenizer, batch=batches[0] if batches else None)
    output.data(
        result | {"directory": str(args.out), "gap": saved.gap, "measured_on": saved.measured_on}
    )
    if report is not None:
        output.text(str(report))
    output.text(str(saved))
    return 0


def _task(args: Convert, note: Callable[[str], None]) -> Task | None:
    """The task to take rows of, or None without --data."""
    from moduli.data import load_task, task_names
    from moduli.study.tuned import model_kind

    if args.data is None:
        return None
    options = args.data_options()
    known = model_kind(args.model)
    # A named task has a kind of its own, and a language model learns from any text.
    if "kind" not in options and known is not None and args.data not in task_names():
        options["kind"] = known.name
    task = load_task(args.data, on_event=note, **options)
    for line in task.notes:
        note(line)
    return task
