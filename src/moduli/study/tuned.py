"""Use a model directory: load it as what it is, and score it on the domains of a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moduli.data.task import DataOptions, Splits, Task
from moduli.errors import CheckpointError, ConfigError, DataError
from moduli.study.records import RECORD, read_record
from moduli.training.kinds.base import TaskKind, get_kind, kind_of_config, require_kind
from moduli.training.metrics import Scores
from moduli.training.settings import FinetuneSettings

LONGEST = 1024
"""Tokens that a model is given at once where nobody says, though it may have been made for more."""
BEYOND = 10**9


def load_any(name: str) -> tuple[Any, Any]:
    """A model by name or directory, as the class its config names, and its processor (or None).

    A directory that moduli wrote comes back modular, as it was saved.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
    """
    import moduli
    from moduli.data import resolve_model

    path = resolve_model(name)
    model = moduli.load(path) if Path(path).is_dir() else _from_hub(path)
    return model, _processor(path, kind_of_config(model.config, type(model).__name__))


def load_tuned(name: str, kind: TaskKind, *, dense: bool = False) -> tuple[Any, Any]:
    """A model with the head of a kind of task, and its processor.

    Args:
        name: directory or hub name.
        kind: of the task.
        dense: load the ordinary part with plain transformers, as somebody without moduli would.

    Raises:
        CheckpointError: no such model, damaged, without a processor, or with another head.
    """
    from moduli.data import resolve_model

    path = resolve_model(name)
    if dense:
        import transformers

        try:
            model = getattr(transformers, kind.auto_class).from_pretrained(
                path, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} does not load as {kind.noun}: {error}") from error
    else:
        model, _ = load_any(name)
    require_kind(model, kind, name)
    return model, load_processor(name, kind)


def load_processor(name: str, kind: TaskKind) -> Any:
    """The tokenizer or other processor by which rows of a kind become inputs of a model.

    Raises:
        CheckpointError: there is none.
    """
    from moduli.data import resolve_model

    processor = _processor(resolve_model(name), kind)
    if processor is None:
        raise CheckpointError(f"{name} has no tokenizer or processor; save one beside the model.")
    return processor


def model_kind(name: str) -> TaskKind | None:
    """The kind of task that a model has a head for, by its record or its config; or None."""
    from transformers import AutoConfig

    from moduli.data import resolve_model

    directory = Path(name)
    if (directory / RECORD).is_file():
        return get_kind(read_record(directory).kind)
    try:
        config = AutoConfig.from_pretrained(resolve_model(name))
    except (OSError, ValueError):
        return None
    return kind_of_config(config, (config.architectures or [""])[0])


def trained_length(name: str) -> int:
    """The text length (tokens) that a model was tuned with; the default where it does not say."""
    directory = Path(name)
    if (directory / RECORD).is_file():
        return read_record(directory).spec.settings.max_length
    return FinetuneSettings().max_length


def text_length(name: str, model: Any, processor: Any) -> int:
    """The text length (tokens) to use a model with where nobody says: what it was tuned with, else
    what its tokenizer or its configuration was made for, `LONGEST` at most.

    Args:
        name: directory or hub name.
        model: loaded from it.
        processor: of the model.
    """
    if not (Path(name) / RECORD).is_file():
        # A tokenizer that does not know says so by a number beyond all lengths.
        for own in (processor, model.config):
            for field in ("model_max_length", "max_position_embeddings"):
                length = getattr(own, field, None)
                if isinstance(length, int) and 0 < length < BEYOND:
                    return min(length, LONGEST)
    return trained_length(name)


def evaluate_task(
    model: Any,
    processor: Any,
    task: Task,
    *,
    split: str = "test",
    max_length: int,
    on_domain: Callable[[str], None] | None = None,
) -> dict[str, Scores]:
    """Scores by domain, on one split or on "all" rows (for data that took no part in training).

    Classes are matched by name, so the data may number them differently than the model.

    Raises:
        DataError: the data has a class that the model does not, or no domain has this split.
        ConfigError: there is no such split.
    """
    from moduli.training.evaluate import outputs_of

    if split not in ("train", "validation", "test", "all"):
        raise ConfigError(f"There is no split {split!r}; it is train, validation, test or all.")
    kind = get_kind(task.kind)
    index = class_indices(model, task) if task.label_names else None
    found: dict[str, Scores] = {}
    for name, splits in task.domains.items():
        rows = _all_rows(splits) if split == "all" else getattr(splits, split)
        if rows is None:
            continue
        if on_domain is not None:
            on_domain(name)
        if index is not None:
            rows = renumbered(rows, kind, index)
        examples, outputs = outputs_of(kind, model, processor, rows, max_length=max_length)
        found[name] = kind.score(outputs, examples, rows)
    if not found:
        raise DataError(f"No domain of {task.name!r} has a {split} split.")
    return found


def _all_rows(splits: Splits) -> Any:
    from datasets import concatenate_datasets

    parts = (splits.train, splits.validation, splits.test)
    return concatenate_datasets([part for part in parts if part is not None])


def class_indices(model: Any, task: Task) -> list[int]:
    """For each class of the task, the output of the model that stands for it.

    Raises:
        DataError: the model has no output of that name.
    """
    names = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    missing = [name for name in task.label_names if name not in names]
    if missing:
        raise DataError(
            f"The data has the class {missing[0]!r}, the model has {', '.join(names)}. "
            "They are matched by name."
        )
    return [names.index(name) for name in task.label_names]


def renumbered(rows: Any, kind: TaskKind, index: list[int]) -> list[dict[str, Any]]:
    """The rows with their labels, one or a list of them, as the model numbers them."""
    column = kind.columns[-1]

    def of_model(value: Any) -> Any:
        return [index[one] for one in value] if isinstance(value, list) else index[value]

    return [{**row, column: of_model(row[column])} for row in rows]


def _processor(path: str, kind: TaskKind | None) -> Any:
    from transformers import AutoTokenizer

    load = AutoTokenizer.from_pretrained if kind is None else kind.load_processor
    try:
        return load(path)
    except (OSError, ValueError, KeyError):
        return None


def _from_hub(name: str) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        return architecture.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"No model {name!r}: it is no directory and no name that can be fetched, and the "
            f"Hugging Face hub says: {str(error).strip().splitlines()[0]}"
        ) from error


def read_inputs(source: str, kind: TaskKind, options: DataOptions) -> list[dict[str, Any]]:
    """The inputs in a file "csv:PATH", "jsonl:PATH" or "parquet:PATH"; labels are not needed.

    Raises:
        DataError: the file cannot be read, has no such column, or a row without an input.
    """
    from moduli.data.kinds import data_kind
    from moduli.data.readers import READERS, read_files
    from moduli.data.rows import checked_rows

    prefix, _, path = source.partition(":")
    if prefix not in READERS or not path:
        raise DataError(
            f"{source!r} names no file; write {', '.join(f'{k}:PATH' for k in READERS)}."
        )
    inputs = dataclasses.replace(data_kind(kind.name), target=None)
    rows, _, _ = checked_rows(read_files(prefix, path, options), options, inputs)
    return [row.values for row in rows]


def given_inputs(words: tuple[str, ...], kind: TaskKind, *, files: bool) -> list[dict[str, Any]]:
    """Rows of texts, or of files, that were given one by one.

    Raises:
        ConfigError: models of this kind take the other of the two.
        DataError: a file is not what the kind reads.
    """
    if kind.files != files:
        wanted = "files, with --file" if kind.files else "texts, with --text"
        raise ConfigError(f"The model is {kind.noun}; give it {wanted}.")
    found = []
    for word in words:
        try:
            found.append(kind.example(word))
        except ValueError as error:
            raise DataError(f"{word}: {error}.") from error
    return found


def describe_rows(
    model: Any, processor: Any, kind: TaskKind, rows: list[dict[str, Any]], *, max_length: int
) -> list[dict[str, Any]]:
    """For each row what the model makes of it: label and probabilities, a number, tags, a text."""
    from moduli.training.evaluate import outputs_of

    examples, outputs = outputs_of(kind, model, processor, rows, max_length=max_length)
    return kind.describe(model, processor, rows, examples, outputs)


def survey_layers(model: Any, method: Any) -> list[dict[str, Any]]:
    """Every block that is or resembles an FFN: whether the method would convert it, or why not.

    Raises:
        ModelError: the model has no FFN at all.
        ConfigError: the method's settings cannot work for this model.
    """
    from moduli.surgery.layers import choose_layers
    from moduli.surgery.locate import find_ffns, survey

    ffns = find_ffns(model)
    spec = getattr(method, "layers", None)
    chosen = {ffn.name for ffn in choose_layers(ffns, spec)} if spec is not None else set()
    _, rejected = survey(model)
    blocks: list[dict[str, Any]] = [
        {
            "name": ffn.name,
            "index": ffn.index,
            "neurons": ffn.width,
            "family": ffn.family.name,
            "converted": ffn.name in chosen,
            "reason": None if ffn.name in chosen else f"not in layers={spec!r}",
        }
        for ffn in ffns
    ]
    blocks += [
        {
            "name": block.name,
            "index": None,
            "neurons": None,
            "family": None,
            "converted": False,
            "reason": block.reason,
        }
        for block in rejected
    ]
    return blocks
