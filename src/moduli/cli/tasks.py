"""The task that was named, as the kind that a model has a head for."""

from __future__ import annotations

from moduli.cli.options import Data
from moduli.cli.output import Output
from moduli.data.task import Task


def load_task_for(args: Data, model: str, output: Output) -> Task:
    """The task of a command's options, for a model that is there already.

    Its kind is that of the model. A language model reads the texts of a named task of any kind,
    unless a kind is asked for.

    Args:
        args: options of the command.
        model: name or directory.
        output: where notes on the data go.

    Raises:
        ConfigError: the model is a language model, and the task has no texts.
        DataError: the data cannot be read as that kind.
    """
    from moduli.data import load_task
    from moduli.study.language import KIND, as_texts
    from moduli.study.tuned import model_kind

    options = args.data_options()
    known = None if "kind" in options else model_kind(model)
    reads = known is not None and known.name == KIND and ":" not in args.data
    if known is not None and not reads:  # a file need not hold more than texts
        options["kind"] = known.name
    task = load_task(args.data, on_event=output.note, **options)
    for note in task.notes:
        output.note(note)
    return as_texts(task) if reads else task
