"""Use a model directory: load it as what it is, and score it on the domains of a task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moduli.data.task import Splits, Task
from moduli.errors import CheckpointError, ConfigError, DataError, nearest
from moduli.study.records import RECORD, read_record
from moduli.training.metrics import Scores
from moduli.training.settings import FinetuneSettings


def load_any(name: str) -> tuple[Any, Any]:
    """A model by name or directory, as the class its config names, and its tokenizer (or None).

    A directory that moduli wrote comes back modular, as it was saved.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
    """
    import moduli
    from moduli.data import resolve_model

    path = resolve_model(name)
    model = moduli.load(path) if Path(path).is_dir() else _from_hub(path)
    return model, _tokenizer(path)


def load_tuned(name: str, *, dense: bool = False) -> tuple[Any, Any]:
    """A classifier and its tokenizer.

    Args:
        name: directory or hub name.
        dense: load the ordinary part with plain transformers, as somebody without moduli would.

    Raises:
        CheckpointError: no such model, damaged, without a tokenizer, or not a classifier.
    """
    if dense:
        from transformers import AutoModelForSequenceClassification

        from moduli.data import resolve_model

        path = resolve_model(name)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} does not load as a classifier: {error}") from error
        tokenizer = _tokenizer(path)
    else:
        model, tokenizer = load_any(name)
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise CheckpointError(
            f"{name} is a {type(model).__name__}, not a classifier; `moduli tune` makes one of it."
        )
    if tokenizer is None:
        raise CheckpointError(f"{name} has no tokenizer; save one beside the model.")
    return model, tokenizer


def trained_length(name: str) -> int:
    """The text length (tokens) that a model was tuned with; the default where it does not say."""
    directory = Path(name)
    if (directory / RECORD).is_file():
        return read_record(directory).spec.settings.max_length
    return FinetuneSettings().max_length


def evaluate_task(
    model: Any,
    tokenizer: Any,
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
    import torch

    from moduli.training.finetune import labels_of, predict
    from moduli.training.metrics import score

    if split not in ("train", "validation", "test", "all"):
        raise ConfigError(f"There is no split {split!r}; it is train, validation, test or all.")
    index = torch.tensor(class_indices(model, task))
    found: dict[str, Scores] = {}
    for name, splits in task.domains.items():
        rows = _all_rows(splits) if split == "all" else getattr(splits, split)
        if rows is None:
            continue
        if on_domain is not None:
            on_domain(name)
        logits = predict(model, tokenizer, rows, max_length=max_length)
        found[name] = score(logits, index[labels_of(rows)])
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


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
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


def read_texts(source: str, column: str) -> list[str]:
    """The texts of a file "csv:PATH", "jsonl:PATH" or "parquet:PATH"; labels are not needed.

    Raises:
        DataError: the file cannot be read, has no such column, or a row without text.
    """
    from moduli.data.readers import READERS, read_files
    from moduli.data.task import DataOptions

    kind, _, path = source.partition(":")
    if kind not in READERS or not path:
        raise DataError(
            f"{source!r} names no file; write {', '.join(f'{k}:PATH' for k in READERS)}."
        )
    (table, *_) = read_files(kind, path, DataOptions(text_column=column))
    if column not in table.columns:
        raise DataError(
            f"{path} has no column {column!r}. {nearest(column, table.columns)} "
            "The option text_column says which one to take."
        )
    texts = table.columns[column]
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}: row {number} has no text in column {column!r}.")
    return texts


def label_texts(
    model: Any, tokenizer: Any, texts: list[str], *, max_length: int
) -> list[dict[str, Any]]:
    """For each text its label, the label's probability, and the probability of every label."""
    from moduli.training.finetune import predict

    logits = predict(model, tokenizer, [{"text": text} for text in texts], max_length=max_length)
    names = [str(model.config.id2label[i]) for i in range(logits.shape[-1])]
    found = []
    for text, row in zip(texts, logits.double().softmax(-1).tolist(), strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        found.append(
            {
                "text": text,
                "label": names[best],
                "probability": row[best],
                "probabilities": dict(zip(names, row, strict=True)),
            }
        )
    return found


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
