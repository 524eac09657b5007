"""What the experts of a tuned THOR model are to one another: every way to use them, scored.

A record, modes.json, is written beside that of the run, whose model has to be there:

    languages    BLEU and chrF by language, for each expert used everywhere and for all together
                 ("ensemble_prob"); those of the mean of the weights are the run's own scores
    report       `moduli.thor_report` over the tests of all languages
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from moduli.data.task import Task
from moduli.study.records import read_record, write_json

RECORD = "modes.json"


def write_modes(run: Path, task: Task) -> None:
    """Measure the model of a finished run, and write the record beside its own.

    Args:
        run: directory of the run, with its model.
        task: that it was trained on.
    """
    write_json(run / RECORD, measure(run, task))


def measure(run: Path, task: Task) -> dict[str, Any]:
    """The record, as plain values."""
    import moduli
    from moduli.study.tuned import evaluate_task, load_any
    from moduli.training.evaluate import batches_of
    from moduli.training.kinds.base import get_kind

    spec = read_record(run).spec
    length = spec.settings.max_length
    model, tokenizer = load_any(str(run))
    learnt = dataclasses.replace(task, domains={n: task.domains[n] for n in spec.train_domains})
    batches = [
        batch
        for splits in learnt.domains.values()
        for _, batch in batches_of(get_kind(task.kind), model, tokenizer, splits.test, length)[1]
    ]
    report = moduli.thor_report(model, batches)
    languages = {}
    for mode in report.losses:
        if mode.startswith("fixed:") or mode == "ensemble_prob":
            moduli.set_inference(model, mode)
            found = evaluate_task(model, tokenizer, learnt, max_length=length)
            languages[mode] = {name: scores.to_dict() for name, scores in found.items()}
    return {"report": report.to_dict(), "languages": languages}
