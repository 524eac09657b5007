"""`load_task(name)`: one door to named tasks, own files and `datasets`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moduli.data.fetching import fetch
from moduli.data.kinds import DataKind, data_kind, guess_kind
from moduli.data.named import NAMED
from moduli.data.readers import READERS, read_files, read_hub
from moduli.data.rows import checked_rows
from moduli.data.splits import split_rows
from moduli.data.task import DataOptions, Task
from moduli.errors import ConfigError, DataError, UnknownNameError, nearest

Event = Callable[[str], None]


def load_task(name: str, *, on_event: Event | None = None, **options: Any) -> Task:
    """A task with its domains and splits.

    Args:
        name: a named task (`task_names()`); csv:PATH, jsonl:PATH or parquet:PATH, optionally
            followed by ,validation=PATH and ,test=PATH; or a name or directory that
            `datasets.load_dataset` takes, NAME or NAME:CONFIGURATION.
        on_event: called with one line for every step that takes time.
        **options: fields of `DataOptions`.

    Raises:
        UnknownNameError: an option or a kind does not exist, or a name is nearly that of a named
            task.
        ConfigError: an option has a value that cannot work.
        DataError: the data cannot be read, or cannot be trained and tested on.
        FetchError: a named task cannot be fetched.
    """
    known = {field.name: field.default for field in dataclasses.fields(DataOptions)}
    for option in options:
        if option not in known:
            raise UnknownNameError(f"Data has no option {option!r}. {nearest(option, known)}")
    if isinstance(options.get("domains"), str):
        options["domains"] = (options["domains"],)
    elif options.get("domains") is not None:
        options["domains"] = tuple(options["domains"])
    settings = DataOptions(**options)
    asked = None if settings.kind is None else data_kind(settings.kind)
    if name in NAMED:
        return _named(name, settings, on_event)
    prefix, colon, spec = name.partition(":")
    notes: list[str] = []
    if colon and prefix in READERS:
        tables = read_files(prefix, spec, settings)
    else:
        _refuse_near_misses(name)
        tables, notes = read_hub(name, settings)
    if asked is None:
        kind, reason = guess_kind(tables[0].columns, tables[0].class_names, settings)
        guessed = [f"Taken as {kind.name}: {reason}. The option kind says otherwise."]
    else:
        kind, guessed = asked, []
    rows, label_names, more = checked_rows(tables, settings, kind)
    domains, removed = split_rows(rows, label_names, settings, kind)
    said = (*notes, *more, *removed, *guessed)
    return Task(name, kind.name, label_names, domains, notes=said)


def task_names() -> list[str]:
    """The named tasks."""
    return sorted(NAMED)


def _named(name: str, options: DataOptions, on_event: Event | None) -> Task:
    known = NAMED[name]
    kind = data_kind(options.kind or known.kind)
    _refuse_columns(name, data_kind(known.kind), kind, options)
    content = known.read(fetch(known.package, on_event=on_event), options.domains)
    if content.rows and content.rows[0].split is not None:
        _refuse_sizes(name, options)
    options = replace(options, domains=options.domains or content.usual)
    domains, notes = split_rows(content.rows, content.label_names, options, kind, content.domains)
    sources = tuple(domains) if known.together else ()
    return Task(name, kind.name, content.label_names, known.add(domains), sources, tuple(notes))


def _refuse_columns(task: str, kind: DataKind, asked: DataKind, options: DataOptions) -> None:
    """Named tasks have one kind, or are taken as another of the same columns; these are fixed."""
    if (asked.columns, asked.encode) != (kind.columns, kind.encode):
        raise ConfigError(f"The task {task!r} is one of {kind.name}, not of {asked.name}.")
    for field in dataclasses.fields(DataOptions):
        if field.name.endswith("_column") and getattr(options, field.name) != field.default:
            raise ConfigError(
                f"{field.name} is for own files; the task {task!r} has its columns fixed."
            )


def _refuse_sizes(task: str, options: DataOptions) -> None:
    """Some named tasks come split, for everybody in the same way."""
    default = DataOptions()
    for size in ("validation_size", "test_size"):
        if getattr(options, size) != getattr(default, size):
            raise ConfigError(
                f"{size} is for data that does not come split; the task {task!r} does. "
                f"max_{size.removesuffix('_size')} takes fewer rows."
            )


_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def _refuse_near_misses(name: str) -> None:
    """Say what was probably meant before asking a hub, which takes long and says less."""
    if Path(name).is_file():
        kind = _SUFFIXES.get(Path(name).suffix, "csv")
        raise DataError(f"{name!r} is a file; name its kind as well: {kind}:{name}")
    if "/" not in name and not Path(name).exists():
        if difflib.get_close_matches(name, NAMED, n=1, cutoff=0.8):
            raise UnknownNameError(f"There is no task {name!r}. {nearest(name, NAMED)}")
        kind, colon, _ = name.partition(":")
        if colon and difflib.get_close_matches(kind, READERS, n=1, cutoff=0.6):
            raise UnknownNameError(f"There is no kind of file {kind!r}. {nearest(kind, READERS)}")
