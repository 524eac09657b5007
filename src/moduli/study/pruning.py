"""Prune a model directory and test it before and after: `moduli prune`.

The new directory appears by one rename, with a record of what was cut out and what came of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from moduli.data.task import Task
from moduli.models.editing import expert_use, prune
from moduli.models.moduleformer.pruning import check_keep
from moduli.study.editing import (
    PRUNING,
    Tell,
    load_editable,
    require_new,
    row_batches,
    scores_by_domain,
    training_rows,
)
from moduli.study.records import write_json
from moduli.study.tuned import text_length
from moduli.surgery.files import new_directory
from moduli.training.plain import BATCH_SIZE
from moduli.training.settings import FinetuneSettings


def prune_directory(
    name: str,
    out: Path,
    task: Task,
    *,
    keep: float | None = None,
    by: Literal["frequency", "mass"] = "frequency",
    per_layer: bool = False,
    threshold: float | None = None,
    max_length: int | None = None,
    batch_size: int = BATCH_SIZE,
    tell: Tell = lambda line: None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], Any]:
    """Measure the use of experts on the training rows of all domains, prune, test, and write.

    Args:
        name: of the model.
        out: directory to write.
        task: to measure and test on.
        keep, by, per_layer, threshold: of `moduli.models.moduleformer.pruning.prune`.
        max_length: longest text in tokens; longer ones are cut into pieces. None: what the model
            was made for.
        batch_size: pieces per forward pass, at most.
        tell: called with a line about what is going on.
        on_batch: called in measuring with the number of batches that are done, and of all.

    Returns:
        The record (scores before and after by domain among it), and the report of `prune`.

    Raises:
        ModelError, ConfigError, DataError, CheckpointError: what is given cannot work; nothing is
            written.
    """
    require_new(out)
    model, tokenizer, kind = load_editable(name, task, "prune")
    check_keep(model, keep, threshold)  # before what takes long
    length = max_length or text_length(name, model, tokenizer)
    settings = FinetuneSettings(max_length=length, batch_size=batch_size)
    domains = tuple(domain for domain, splits in task.domains.items() if splits.train is not None)
    tell(f"measuring the use of experts on {', '.join(domains)}")
    batches = [
        batch
        for domain in domains
        for batch in row_batches(kind, model, tokenizer, training_rows(task, (domain,)), settings)
    ]
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += 1
        on_batch(done, len(batches))

    use = expert_use(model, batches, on_batch=count)
    before = scores_by_domain(model, tokenizer, task, length, tell, "before")
    report = prune(model, use, keep=keep, by=by, per_layer=per_layer, threshold=threshold)
    record = {
        "model": name,
        "data": task.name,
        "measured_on": list(domains),
        "max_length": length,
        "report": report.to_dict(),
        "use": use.to_dict(),
        "before": before,
        "after": scores_by_domain(model, tokenizer, task, length, tell, "after"),
    }
    with new_directory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / PRUNING, record)
    return record, report
